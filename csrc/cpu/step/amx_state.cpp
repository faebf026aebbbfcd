#include "amx_grant.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace tgi::cpu::step {

AmxState read_amx_state() {
#if defined(__x86_64__)
  constexpr unsigned kBF16 = 1u << 22, kTile = 1u << 24, kInt8 = 1u << 25,
                     kAll = kBF16 | kTile | kInt8;
  constexpr unsigned kXsave = 1u << 27, kTileState = 3u << 17;
  unsigned a = 0, b = 0, c = 0, d = 0;
  const bool is_supported = __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 && (d & kAll) == kAll;
  unsigned enabled = 0, upper = 0;
  if (__get_cpuid(1, &a, &b, &c, &d) != 0 && (c & kXsave) != 0) {
    asm volatile("xgetbv" : "=a"(enabled), "=d"(upper) : "c"(0));
  }
  return {is_supported, (enabled & kTileState) == kTileState};
#else
  return {false, false};
#endif
}

}  // namespace tgi::cpu::step
