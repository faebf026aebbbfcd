// The step's kernels for AVX-512 with VNNI but without BF16 (Cascade Lake, Ice Lake, Tiger Lake).
#if defined(__x86_64__)
#include "kernel_headers.h"

// GCC 12 warns about the deliberately undefined pass-through operand of its own intrinsics (bug
// 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC push_options
// No tune=, see step_avx512.cpp.
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,prfchw,fma,f16c,avx2,bmi2")
#include "simd_avx512.h"
// Must come after the simd type.
#include "step_kernels.h"

namespace tgi::cpu::step {
extern const Kernels kAvx512VnniKernels;
const Kernels kAvx512VnniKernels = make_kernels<Avx512>("avx512_vnni");
}  // namespace tgi::cpu::step
#pragma GCC pop_options
#endif
