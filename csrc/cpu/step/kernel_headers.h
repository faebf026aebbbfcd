// What the kernels need of the library and of the other parts. A kernel set includes this before it
// names its instructions: an inline function that two sets have is linked once, from either of
// them, and must run on every machine.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include <array>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "../platform.h"
#include "../team.h"
#include "pack.h"
#include "step.h"
