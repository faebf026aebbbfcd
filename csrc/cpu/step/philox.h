// Philox4x32-10, many counters at a time. Salmon et al., Parallel Random Numbers: As Easy as 1, 2,
// 3, section 3.3 and table 2. Included only by the step_<isa>.cpp files.
#pragma once

#include <cstdint>

#include "../sample.h"

namespace tgi::cpu::step {
namespace {

constexpr uint32_t kPhiloxM0 = 0xD2511F53u, kPhiloxM1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxW0 = 0x9E3779B9u, kPhiloxW1 = 0xBB67AE85u;

// Counters processed together. Rounds depend on each other, so there are at least two chains.
constexpr int kCounters = 32;

template <class S>
inline typename S::I words(uint32_t x) {
  return S::iset1(static_cast<int32_t>(x));
}

// Computes the first output word for the counters (token + i, choice, position low, position high),
// key = seed.
template <class S>
inline void philox(uint32_t token, const SampleKey& key, uint32_t* out) {
  constexpr int kGroups = kCounters / 16;
  alignas(64) static constexpr int32_t kLanes[16] = {0, 1, 2,  3,  4,  5,  6,  7,
                                                     8, 9, 10, 11, 12, 13, 14, 15};
  typename S::I c0[kGroups], c1[kGroups], c2[kGroups], c3[kGroups];
#pragma GCC unroll 2  // in portable code too, where the groups would otherwise be in memory
  for (int g = 0; g < kGroups; ++g) {
    c0[g] = S::iadd(words<S>(token + static_cast<uint32_t>(g * 16)), S::iload(kLanes));
    c1[g] = words<S>(key.choice);
    c2[g] = words<S>(static_cast<uint32_t>(key.position));
    c3[g] = words<S>(static_cast<uint32_t>(key.position >> 32));
  }
  auto k0 = static_cast<uint32_t>(key.seed), k1 = static_cast<uint32_t>(key.seed >> 32);
  TGI_UNROLL(10)
  for (int round = 0; round < 10; ++round, k0 += kPhiloxW0, k1 += kPhiloxW1) {
#pragma GCC unroll 2
    for (int g = 0; g < kGroups; ++g) {
      typename S::I high0, low0, high1, low1;
      S::imul_wide(c0[g], kPhiloxM0, high0, low0);
      S::imul_wide(c2[g], kPhiloxM1, high1, low1);
      c0[g] = S::ixor(high1, c1[g], words<S>(k0));
      c2[g] = S::ixor(high0, c3[g], words<S>(k1));
      c1[g] = low1;
      c3[g] = low0;
    }
  }
  for (int g = 0; g < kGroups; ++g) S::istore(out + g * 16, c0[g]);
}

}  // namespace
}  // namespace tgi::cpu::step
