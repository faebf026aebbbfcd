// Compiles what follows in this file for AVX-512 (F, BW, DQ, VL), into the namespace
// tgi::cpu::avx512. Include it first.
#pragma once
#include <immintrin.h>

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#define TGI_ISA avx512
#define TGI_AVX512 1
// GCC 12 takes the undefined pass-through operand of its own intrinsics for a mistake (bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
