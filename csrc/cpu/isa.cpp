#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

namespace tgi::cpu {

namespace {

constexpr Isa kAll[] = {Isa::kPortable, Isa::kAvx2, Isa::kAvx512};  // best last

Isa detect() {
  const char* wanted = std::getenv("TGI_ISA");
  Isa best = Isa::kPortable;
  for (const Isa isa : kAll) {
    if (!isa_is_supported(isa)) continue;
    if (wanted != nullptr && std::strcmp(wanted, isa_name(isa)) == 0) return isa;
    best = isa;
  }
  return best;
}

std::atomic<Isa>& chosen() {
  static std::atomic<Isa> value{detect()};
  return value;
}

}  // namespace

Isa isa() { return chosen().load(std::memory_order_relaxed); }

bool isa_is_supported(Isa isa) {
#if defined(__x86_64__)
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                        __builtin_cpu_supports("avx");
  if (isa == Isa::kAvx2) return has_avx2;
  if (isa == Isa::kAvx512) {
    return has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  }
#endif
  return isa == Isa::kPortable;
}

void force_isa(Isa isa) { chosen().store(isa, std::memory_order_relaxed); }

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx2:
      return "avx2";
    default:
      return "portable";
  }
}

}  // namespace tgi::cpu
