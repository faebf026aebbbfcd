// Philox4x32-10, sixteen counters at a time. Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3,
// section 3.3 and table 2. Loops over lanes: the compiler vectorises them for the file's instruction set.
#pragma once

#include <cstdint>

#include "simd.h"

namespace tgi::cpu::TGI_ISA {
namespace {

// The first output word of counters (token + lane, choice, position low, position high), key = seed.
inline void philox16(uint32_t token, uint32_t choice, uint64_t position, uint64_t seed, uint32_t* out) {
  uint32_t c0[16], c1[16], c2[16], c3[16];
  for (int i = 0; i < 16; ++i) {
    c0[i] = token + uint32_t(i);
    c1[i] = choice;
    c2[i] = uint32_t(position);
    c3[i] = uint32_t(position >> 32);
  }
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    for (int i = 0; i < 16; ++i) {
      const uint64_t a = uint64_t(c0[i]) * 0xD2511F53u, b = uint64_t(c2[i]) * 0xCD9E8D57u;
      c0[i] = uint32_t(b >> 32) ^ c1[i] ^ k0;
      c2[i] = uint32_t(a >> 32) ^ c3[i] ^ k1;
      c1[i] = uint32_t(b);
      c3[i] = uint32_t(a);
    }
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  for (int i = 0; i < 16; ++i) out[i] = c0[i];
}

}  // namespace
}  // namespace tgi::cpu::TGI_ISA
