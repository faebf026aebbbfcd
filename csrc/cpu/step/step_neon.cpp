// The step's kernels for NEON with dot product instructions (Armv8.2: Graviton 2, Apple M1,
// Raspberry Pi 5).
#if defined(__aarch64__)
#include "kernel_headers.h"

#pragma GCC push_options
#pragma GCC target("arch=armv8.2-a+dotprod+fp16")
#include "simd_neon.h"
// Must come after the simd type.
#include "step_kernels.h"

namespace tgi::cpu::step {
extern const Kernels kNeonKernels;
const Kernels kNeonKernels = make_kernels<Neon>("neon");
}  // namespace tgi::cpu::step
#pragma GCC pop_options
#endif
