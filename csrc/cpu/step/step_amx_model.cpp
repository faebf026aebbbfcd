// The kernels of step_amx.cpp with tiles that are emulated in plain code, for tests: the same bits
// at a hundredth of the speed, on any machine with AVX-512 and BF16. setup.py compiles this file
// with few optimisations: nothing else uses it, and the emulation itself is as fast.
#if defined(__x86_64__)
#include "kernel_headers.h"

// GCC 12 warns about the deliberately undefined pass-through operand of its own intrinsics (bug
// 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC push_options
// No tune=: GCC does not inline functions of the headers above into functions with another tuning.
#pragma GCC target( \
    "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,prfchw,fma,f16c,avx2,bmi2")
#define TGI_HAS_BF16
#include "simd_avx512.h"
// Must come after the simd type.
#include "amx_set.h"

namespace tgi::cpu::step {
extern const Kernels kAmxModelKernels;
const Kernels kAmxModelKernels = make_kernels<WithTiles<ModelTiles<Avx512>>>("amx_model");
}  // namespace tgi::cpu::step
#pragma GCC pop_options
#endif
