#include "supported_sets.h"

#include "amx_grant.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace tgi::cpu::step {

namespace {

#if defined(__x86_64__)
bool has_avx_vnni() {  // not known to __builtin_cpu_supports of GCC 12
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0 && (a >> 4 & 1) != 0;
}
#endif

}  // namespace

// Sets are generally in order of speed; the last one defines this machine's arithmetic. The bits of
// a text therefore depend on the processor and on what the operating system grants, not on a
// measurement: a restart and a second replica give the same bits.
SupportedSets supported_sets() {
  SupportedSets found;
  std::vector<const char*>& names = found.names;
  names.push_back("portable");
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                        __builtin_cpu_supports("f16c") && __builtin_cpu_supports("bmi2");
  const bool has_avx512 =
      has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512vnni");
  const bool is_intel = __builtin_cpu_is("intel") != 0;
  const bool has_bf16 = has_avx512 && __builtin_cpu_supports("avx512bf16");
  if (has_bf16) names.push_back("amx_model");  // for tests
  if (has_avx2) names.push_back("avx2");
  if (has_avx2 && has_avx_vnni()) names.push_back("avx_vnni");
  // Intel's VDPBF16PS does a sixth fewer products than two FMAs (Sapphire Rapids); AMD's does twice
  // as many (Zen 4 and 5).
  if (has_bf16 && is_intel) names.push_back("avx512");
  if (has_avx512) names.push_back("avx512_vnni");
  if (has_bf16 && !is_intel) names.push_back("avx512");
  if (has_bf16 && request_tiles(read_amx_state(), &found.refused)) names.push_back("amx");
#endif
#if defined(__aarch64__) && defined(__linux__)
  // Bits from the Linux kernel's asm/hwcap.h, which old headers lack.
  const bool has_dot = (getauxval(AT_HWCAP) >> 20 & 1) != 0;
  const bool has_i8mm = (getauxval(AT_HWCAP2) >> 13 & 3) == 3;  // I8MM and BF16
  if (has_dot) names.push_back("neon");
  if (has_dot && has_i8mm) names.push_back("i8mm");
#endif
  return found;
}

}  // namespace tgi::cpu::step
