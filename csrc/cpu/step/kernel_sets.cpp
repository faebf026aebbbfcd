#include "kernel_sets.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <cstring>

#include "amx_grant.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace tgi::cpu::step {

extern const Kernels kPortableKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels;
extern const Kernels kAvxVnniKernels;
extern const Kernels kAvx512VnniKernels;
extern const Kernels kAvx512Kernels;
extern const Kernels kAmxKernels;
extern const Kernels kAmxModelKernels;
#endif
#if defined(__aarch64__)
extern const Kernels kNeonKernels;
extern const Kernels kI8mmKernels;
#endif

namespace {

#if defined(__x86_64__)
bool has_avx_vnni() {  // not known to __builtin_cpu_supports of GCC 12
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0 && (a >> 4 & 1) != 0;
}
#endif

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

// On Intel's cores, panels that are prefetched a whole unit ahead come at half to two thirds of the
// memory's speed while several tokens are computed. Probably a prefetch into L2 takes one of the
// few places for misses in L1, too, and lines that come into L1 that early are gone when they are
// read. At 4 KB, a step of four sequences takes 0.76 to 0.90 of the time (bench/README.md).
bool is_intel() {
#if defined(__x86_64__)
  return __builtin_cpu_is("intel") != 0;
#endif
  return false;
}

struct Found {
  std::vector<const Kernels*> sets;
  const char* refused = nullptr;
};

// Sets are generally in order of speed; the last one defines this machine's arithmetic. The bits of
// a text therefore depend on the processor and on what the operating system grants, not on a
// measurement: a restart and a second replica give the same bits.
Found find() {
  Found found;
  std::vector<const Kernels*>& sets = found.sets;
  sets.push_back(&kPortableKernels);
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                        __builtin_cpu_supports("f16c") && __builtin_cpu_supports("bmi2");
  const bool has_avx512 =
      has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512vnni");
  const bool has_bf16 = has_avx512 && __builtin_cpu_supports("avx512bf16");
  if (has_bf16) sets.push_back(&kAmxModelKernels);  // for tests
  if (has_avx2) sets.push_back(&kAvx2Kernels);
  if (has_avx2 && has_avx_vnni()) sets.push_back(&kAvxVnniKernels);
  // Intel's VDPBF16PS does a sixth fewer products than two FMAs (Sapphire Rapids); AMD's does twice
  // as many (Zen 4 and 5).
  if (has_bf16 && is_intel()) sets.push_back(&kAvx512Kernels);
  if (has_avx512) sets.push_back(&kAvx512VnniKernels);
  if (has_bf16 && !is_intel()) sets.push_back(&kAvx512Kernels);
  if (has_bf16 && request_tiles(read_amx_state(), &found.refused)) sets.push_back(&kAmxKernels);
#endif
#if defined(__aarch64__) && defined(__linux__)
  // Bits from the Linux kernel's asm/hwcap.h, which old headers lack.
  const bool has_dot = (getauxval(AT_HWCAP) >> 20 & 1) != 0;
  const bool has_i8mm = (getauxval(AT_HWCAP2) >> 13 & 3) == 3;  // I8MM and BF16
  if (has_dot) sets.push_back(&kNeonKernels);
  if (has_dot && has_i8mm) sets.push_back(&kI8mmKernels);
#endif
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
