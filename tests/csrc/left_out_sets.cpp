// Prints the kernel sets that kernel_sets.cpp finds in a build that has only the dummy sets named
// by TGI_HAS_BEST and TGI_HAS_PORTABLE, a line each, and why the best is not among them.
#include <cstdio>

#include "cpu/step/kernel_sets.h"
#include "cpu/step/supported_sets.h"

namespace tgi::cpu::step {

// The same on every machine.
SupportedSets supported_sets() { return {{"portable", "avx2", "avx512"}, nullptr}; }

namespace {

double spin(Precision, int64_t) { return 0.0; }

[[maybe_unused]] Kernels named(const char* name) {
  Kernels kernels = {};
  kernels.name = name;
  kernels.arithmetic = name;
  kernels.spin = spin;
  return kernels;
}

}  // namespace

#if defined(TGI_HAS_PORTABLE)
extern const Kernels kPortableKernels = named("portable");
#endif
#if defined(TGI_HAS_BEST)
extern const Kernels kAvx512Kernels = named("avx512");
#endif

}  // namespace tgi::cpu::step

int main() {
  for (const tgi::cpu::step::Kernels* set : tgi::cpu::step::kernel_sets()) std::puts(set->name);
  const char* const refused = tgi::cpu::step::refused_kernel_set();
  std::puts(refused == nullptr ? "" : refused);
}
