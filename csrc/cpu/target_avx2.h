// Compiles what follows in this file for AVX2 and FMA, into the namespace tgi::cpu::avx2. Include
// it first.
#pragma once
#include <immintrin.h>

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#define TGI_ISA avx2
#define TGI_AVX2 1
#pragma GCC target("avx2,fma")
