// The step's kernels with AMX tiles, and AVX-512 for the rest (Sapphire Rapids and later).
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
extern const Kernels kAmxKernels;
const Kernels kAmxKernels = make_kernels<WithTiles<HardwareTiles>>("amx");
}  // namespace tgi::cpu::step
#pragma GCC pop_options
#endif
