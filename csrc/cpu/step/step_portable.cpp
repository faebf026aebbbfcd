// The step's kernels in plain C++: the reference for the other sets, and the fallback on machines
// that cannot run them.
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors are passed between inline functions only
#pragma GCC optimize("O2")                // at O3 the compiler spends a minute on unrolling
#include "simd_portable.h"
// Must come after the simd type.
#include "step_kernels.h"

namespace tgi::cpu::step {
extern const Kernels kPortableKernels;
const Kernels kPortableKernels = make_kernels<Portable>("portable");
}  // namespace tgi::cpu::step
