// Random numbers for sampling: Philox4x32-10, a function of key and counter only. Salmon et al.,
// Parallel Random Numbers: As Easy as 1, 2, 3, section 3.3 and table 2. csrc/cpu/step/philox.h
// computes the same for sixteen counters at a time.
#pragma once

#include "launch.cuh"

namespace tgi::cuda {

// Returns the first output word for counter (token, choice, position low, position high) and key =
// seed.
__device__ __forceinline__ uint32_t philox(uint32_t token, uint32_t choice, uint64_t position,
                                           uint64_t seed) {
  uint32_t c0 = token, c1 = choice, c2 = uint32_t(position), c3 = uint32_t(position >> 32);
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint32_t high0 = __umulhi(c0, 0xD2511F53u), low0 = c0 * 0xD2511F53u;
    const uint32_t high1 = __umulhi(c2, 0xCD9E8D57u), low1 = c2 * 0xCD9E8D57u;
    c0 = high1 ^ c1 ^ k0;
    c2 = high0 ^ c3 ^ k1;
    c1 = low1;
    c3 = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c0;
}

// Returns the logarithm of an exponential variable made from a word. The lowest log E - score wins
// the race, which is Gumbel-max. u = (word + 1/2) / 2^32.
__device__ __forceinline__ double log_arrival(uint32_t word) {
  return log(-log1p(-(double(word) + 0.5) * 0x1p-32));
}

// Returns the same to about 1e-6, enough to rule out losers. Near u = 1 it counts from the other
// end.
__device__ __forceinline__ float log_arrival_nearly(uint32_t word) {
  const float e = word < 0x80000000u ? -log1pf(-(float(word) + 0.5f) * 0x1p-32f)
                                     : -logf((float(~word) + 0.5f) * 0x1p-32f);
  return logf(e);
}

}  // namespace tgi::cuda
