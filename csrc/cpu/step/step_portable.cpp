// The step's kernels in plain C++: the reference of the others, and what runs where they cannot.
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors are passed between inline functions only
#pragma GCC optimize("O2")                // at O3 the compiler spends a minute on unrolling
#include "simd_portable.h"
// After the simd type.
#include "step_kernels.h"

namespace tgi::cpu::step {
extern const Kernels kPortableKernels;
const Kernels kPortableKernels = make_kernels<Portable>("portable");
}  // namespace tgi::cpu::step
