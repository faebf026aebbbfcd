// The step's kernels for NEON with i8mm and BF16 instructions (Graviton 3, Apple M2, Neoverse V1
// and later).
#if defined(__aarch64__)
#include "kernel_headers.h"

#pragma GCC push_options
#pragma GCC target("arch=armv8.2-a+dotprod+fp16+i8mm+bf16")
#define TGI_NEON_I8MM
#include "simd_neon.h"
// Must come after the simd type.
#include "step_kernels.h"

namespace tgi::cpu::step {
extern const Kernels kI8mmKernels;
const Kernels kI8mmKernels = make_kernels<Neon>("i8mm");
}  // namespace tgi::cpu::step
#pragma GCC pop_options
#endif
