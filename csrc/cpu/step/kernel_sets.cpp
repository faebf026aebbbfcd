#include "kernel_sets.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <cstring>

#include "supported_sets.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace tgi::cpu::step {

// Weak, since a build may leave out the sets that its machine cannot run (setup.py).
#define TGI_KERNEL_SET(name) extern const Kernels name __attribute__((weak))
TGI_KERNEL_SET(kPortableKernels);
#if defined(__x86_64__)
TGI_KERNEL_SET(kAvx2Kernels);
TGI_KERNEL_SET(kAvxVnniKernels);
TGI_KERNEL_SET(kAvx512VnniKernels);
TGI_KERNEL_SET(kAvx512Kernels);
TGI_KERNEL_SET(kAmxKernels);
TGI_KERNEL_SET(kAmxModelKernels);
#endif
#if defined(__aarch64__)
TGI_KERNEL_SET(kNeonKernels);
TGI_KERNEL_SET(kI8mmKernels);
#endif
#undef TGI_KERNEL_SET

namespace {

constexpr const char* kNotInBuild =
    "this build lacks the kernels for this processor: install again on this machine";

// Measured with one sequence and with 16 (bench/README.md): prefetching into L1 loses 11 % and more
// on Zen 4, prefetching into L2 loses it on Zen 5. Other processors are treated like Zen 4.
bool is_zen5_or_later() {
#if defined(__x86_64__)
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (__builtin_cpu_is("amd") && __get_cpuid(1, &a, &b, &c, &d)) {
    const unsigned base = a >> 8 & 0xF, extended = a >> 20 & 0xFF;
    return base == 0xF && base + extended >= 0x1A;
  }
#endif
  return false;
}

// On Intel's cores, panels that are prefetched a whole unit ahead arrive at half to two thirds of
// the memory's bandwidth while several tokens are computed. Probably a prefetch into L2 also
// occupies one of the few slots for misses in L1, and lines that reach L1 so early are evicted
// before they are read. At 4 KB ahead, a step of four sequences takes 0.76 to 0.90 of the time
// (bench/README.md).
bool is_intel() {
#if defined(__x86_64__)
  return __builtin_cpu_is("intel") != 0;
#endif
  return false;
}

// Returns the sets of this build, or null in the place of one that was left out.
std::vector<const Kernels*> compiled_sets() {
  return {
      &kPortableKernels,
#if defined(__x86_64__)
      &kAvx2Kernels,     &kAvxVnniKernels, &kAvx512VnniKernels,
      &kAvx512Kernels,   &kAmxKernels,     &kAmxModelKernels,
#endif
#if defined(__aarch64__)
      &kNeonKernels,     &kI8mmKernels,
#endif
  };
}

struct Found {
  std::vector<const Kernels*> sets;
  const char* refused = nullptr;
};

Found find() {
  const SupportedSets supported = supported_sets();
  Found found{{}, supported.refused};
  for (const char* name : supported.names) {
    for (const Kernels* set : compiled_sets()) {
      if (set != nullptr && std::strcmp(set->name, name) == 0) found.sets.push_back(set);
    }
  }
  const bool has_best =
      !found.sets.empty() && std::strcmp(found.sets.back()->name, supported.names.back()) == 0;
  if (!has_best) found.refused = kNotInBuild;
  return found;
}

const Found& found() {
  static const Found all = find();
  return all;
}

// Int8 operations per second, measured over about 30 us.
double int8_speed(const Kernels& set) {
  constexpr int64_t kTimes = 10000;
  const auto start = std::chrono::steady_clock::now();
  const double operations = set.spin(Precision::kInt8, kTimes);
  const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - start;
  return operations / taken.count();
}

// Whether a set may be chosen automatically. The portable set and the AMX model are slower,
// whatever is measured.
bool may_serve(const Kernels* set) {
#if defined(__x86_64__)
  if (set == &kAmxModelKernels) return false;
#endif
  return set != &kPortableKernels;
}

// Among the sets with the same bits as `best`, returns the fastest. A wider set also does more
// outside its products, so an earlier one must be faster by a clear margin.
const Kernels* fastest_like(const Kernels* best) {
  constexpr double kMargin = 1.3;
  constexpr int kRounds = 5;
  std::vector<const Kernels*> alike = {best};
  for (const Kernels* set : kernel_sets()) {
    const bool is_alike = std::strcmp(set->arithmetic, best->arithmetic) == 0;
    if (set != best && is_alike && may_serve(set)) alike.push_back(set);
  }
  if (alike.size() == 1) return best;
  // In turns, so that a clock that rises during the measurement favours no set.
  std::vector<double> speeds(alike.size());
  for (int round = 0; round < kRounds; ++round) {
    for (size_t i = 0; i < alike.size(); ++i) {
      speeds[i] = std::max(speeds[i], int8_speed(*alike[i]));
    }
  }
  size_t chosen = 0;
  for (size_t i = 1; i < alike.size(); ++i) {
    if (speeds[i] > kMargin * speeds[chosen]) chosen = i;
  }
  return alike[chosen];
}

const Kernels* choose() {
  const char* wanted = std::getenv("TGI_ISA");
  for (const Kernels* set : kernel_sets()) {
    if (wanted != nullptr && std::strcmp(wanted, set->name) == 0) return set;
  }
  return fastest_like(kernel_sets().back());
}

std::atomic<const Kernels*>& chosen() {
  static std::atomic<const Kernels*> value{choose()};
  return value;
}

}  // namespace

const bool kStreamsIntoL1 = is_zen5_or_later();
const int64_t kPanelDistance = is_intel() ? 4096 : 0;
const bool kUnpackingIsSlow = is_intel();  // AMD's cores have other ports for it

const std::vector<const Kernels*>& kernel_sets() { return found().sets; }

const char* refused_kernel_set() { return found().refused; }

const Kernels& kernels() { return *chosen().load(std::memory_order_relaxed); }

void use_kernels(const Kernels& set) { chosen().store(&set, std::memory_order_relaxed); }

}  // namespace tgi::cpu::step
