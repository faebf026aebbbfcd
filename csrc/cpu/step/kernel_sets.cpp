#include "kernel_sets.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

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
#endif
#if defined(__aarch64__)
extern const Kernels kNeonKernels;
extern const Kernels kI8mmKernels;
#endif

namespace {

#if defined(__x86_64__)
bool has_avx_vnni() {  // __builtin_cpu_supports of GCC 12 does not know it
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0 && (a >> 4 & 1) != 0;
}
#endif

// Measured with one sequence and with 16 (bench/README.md): on Zen 4 the first level loses 11 % and
// more, on Zen 5 the second does. Others are taken for Zen 4's kind: Intel's cores have 10 to 16
// misses in flight in the first level, 48 in the second.
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

std::vector<const Kernels*> find() {
  std::vector<const Kernels*> found = {&kPortableKernels};
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                        __builtin_cpu_supports("f16c") && __builtin_cpu_supports("bmi2");
  const bool has_avx512 =
      has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512vnni");
  if (has_avx2) found.push_back(&kAvx2Kernels);
  if (has_avx2 && has_avx_vnni()) found.push_back(&kAvxVnniKernels);
  if (has_avx512) found.push_back(&kAvx512VnniKernels);
  // Intel's VDPBF16PS does fewer products than two FMAs, by a sixth (Sapphire Rapids); AMD's twice as
  // many (Zen 4 and 5). So the set that has it is the best on AMD alone.
  if (has_avx512 && __builtin_cpu_supports("avx512bf16")) {
    found.insert(found.end() - (__builtin_cpu_is("intel") ? 1 : 0), &kAvx512Kernels);
  }
#endif
#if defined(__aarch64__) && defined(__linux__)
  // Bits of the kernel's asm/hwcap.h, which old headers lack.
  const bool has_dot = (getauxval(AT_HWCAP) >> 20 & 1) != 0;
  const bool has_i8mm = (getauxval(AT_HWCAP2) >> 13 & 3) == 3;  // and BF16
  if (has_dot) found.push_back(&kNeonKernels);
  if (has_dot && has_i8mm) found.push_back(&kI8mmKernels);
#endif
  return found;
}

const Kernels* choose() {
  const char* wanted = std::getenv("TGI_ISA");
  for (const Kernels* set : kernel_sets()) {
    if (wanted != nullptr && std::strcmp(wanted, set->name) == 0) return set;
  }
  return kernel_sets().back();
}

std::atomic<const Kernels*>& chosen() {
  static std::atomic<const Kernels*> value{choose()};
  return value;
}

}  // namespace

const bool kStreamsIntoL1 = is_zen5_or_later();

const std::vector<const Kernels*>& kernel_sets() {
  static const std::vector<const Kernels*> sets = find();
  return sets;
}

const Kernels& kernels() { return *chosen().load(std::memory_order_relaxed); }

void use_kernels(const Kernels& set) { chosen().store(&set, std::memory_order_relaxed); }

}  // namespace tgi::cpu::step
