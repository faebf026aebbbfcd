// Philox4x32-10, many counters at a time. Salmon et al., Parallel Random Numbers: As Easy as 1,
// 2, 3, section 3.3 and table 2.
#pragma once

#include <cstdint>

#include "simd.h"

namespace tgi::cpu::TGI_ISA {
namespace {

constexpr uint32_t kPhiloxM0 = 0xD2511F53u, kPhiloxM1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxW0 = 0x9E3779B9u, kPhiloxW1 = 0xBB67AE85u;

#if defined(TGI_AVX512)

using Words = __m512i;  // a word of sixteen counters
constexpr int kWordsLanes = 16;

inline Words words(uint32_t x) { return _mm512_set1_epi32(int(x)); }
inline Words lanes_from(uint32_t first) {
  const Words lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  return _mm512_add_epi32(words(first), lane);
}
inline Words xor3(Words a, Words b, Words c) { return _mm512_ternarylogic_epi32(a, b, c, 0x96); }
inline void multiply(Words a, Words b, Words& high, Words& low) {
  const Words even = _mm512_mul_epu32(a, b), odd = _mm512_mul_epu32(_mm512_srli_epi64(a, 32), b);
  low = _mm512_mask_mov_epi32(even, 0xAAAA, _mm512_slli_epi64(odd, 32));
  high = _mm512_mask_mov_epi32(_mm512_srli_epi64(even, 32), 0xAAAA, odd);
}
inline void put(uint32_t* out, Words a) { _mm512_storeu_si512(out, a); }

#elif defined(TGI_AVX2)

using Words = __m256i;  // a word of eight counters
constexpr int kWordsLanes = 8;

inline Words words(uint32_t x) { return _mm256_set1_epi32(int(x)); }
inline Words lanes_from(uint32_t first) {
  return _mm256_add_epi32(words(first), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline Words xor3(Words a, Words b, Words c) { return _mm256_xor_si256(_mm256_xor_si256(a, b), c); }
inline void multiply(Words a, Words b, Words& high, Words& low) {
  const Words even = _mm256_mul_epu32(a, b), odd = _mm256_mul_epu32(_mm256_srli_epi64(a, 32), b);
  low = _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA);
  high = _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xAA);
}
inline void put(uint32_t* out, Words a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), a); }

#else

using Words = uint32_t;
constexpr int kWordsLanes = 1;

inline Words words(uint32_t x) { return x; }
inline Words lanes_from(uint32_t first) { return first; }
inline Words xor3(Words a, Words b, Words c) { return a ^ b ^ c; }
inline void multiply(Words a, Words b, Words& high, Words& low) {
  const uint64_t product = uint64_t(a) * b;
  high = uint32_t(product >> 32);
  low = uint32_t(product);
}
inline void put(uint32_t* out, Words a) { *out = a; }

#endif

constexpr int kDraws =
    32;  // counters at a time: rounds depend on each other, so two chains at least

// The first output word of counters (token + i, choice, position low, position high), key = seed.
inline void philox(uint32_t token, uint32_t choice, uint64_t position, uint64_t seed,
                   uint32_t* out) {
  constexpr int kGroups = kDraws / kWordsLanes;
  Words c0[kGroups], c1[kGroups], c2[kGroups], c3[kGroups];
  for (int g = 0; g < kGroups; ++g) {
    c0[g] = lanes_from(token + uint32_t(g * kWordsLanes));
    c1[g] = words(choice);
    c2[g] = words(uint32_t(position));
    c3[g] = words(uint32_t(position >> 32));
  }
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  for (int round = 0; round < 10; ++round, k0 += kPhiloxW0, k1 += kPhiloxW1) {
    for (int g = 0; g < kGroups; ++g) {
      Words high0, low0, high1, low1;
      multiply(c0[g], words(kPhiloxM0), high0, low0);
      multiply(c2[g], words(kPhiloxM1), high1, low1);
      c0[g] = xor3(high1, c1[g], words(k0));
      c2[g] = xor3(high0, c3[g], words(k1));
      c1[g] = low1;
      c3[g] = low0;
    }
  }
  for (int g = 0; g < kGroups; ++g) put(out + g * kWordsLanes, c0[g]);
}

}  // namespace
}  // namespace tgi::cpu::TGI_ISA
