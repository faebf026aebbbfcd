// The step's kernels for AVX2 with AVX-VNNI (Alder Lake and later cores without AVX-512).
#if defined(__x86_64__)
#include "kernel_headers.h"

#pragma GCC push_options
// No tune=, see step_avx512.cpp.
#pragma GCC target("avx2,avxvnni,fma,f16c,bmi2")
#define TGI_HAS_AVX_VNNI
#include "simd_avx2.h"
// Must come after the simd type.
#include "step_kernels.h"

namespace tgi::cpu::step {
extern const Kernels kAvxVnniKernels;
const Kernels kAvxVnniKernels = make_kernels<Avx2>("avx_vnni");
}  // namespace tgi::cpu::step
#pragma GCC pop_options
#endif
