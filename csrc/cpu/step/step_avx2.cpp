// The step's kernels for AVX2 with FMA and F16C (x86-64-v3: Haswell, Zen and later).
#if defined(__x86_64__)
#include "kernel_headers.h"

#pragma GCC push_options
// No tune=, see step_avx512.cpp.
#pragma GCC target("avx2,fma,f16c,bmi2")
#include "simd_avx2.h"
// Must come after the simd type.
#include "step_kernels.h"

namespace tgi::cpu::step {
extern const Kernels kAvx2Kernels;
const Kernels kAvx2Kernels = make_kernels<Avx2>("avx2");
}  // namespace tgi::cpu::step
#pragma GCC pop_options
#endif
