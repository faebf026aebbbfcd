// The codes of a panel's block: 32 of each row, in planes of 8, 4, 2 or 1 bits (see packed.h).
// 5-bit codes have one plane of 4 bits and one of 1, and so on.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace tgi::cpu::step {

// Calls visit(width of a plane as a constant, its offset in a block, bits of a code below it).
template <class Visit>
constexpr void each_plane(int32_t code_bits, const Visit& visit) {
  int32_t below = 0;
  const auto visit_one = [&](auto bits) {
    if ((code_bits & bits) == 0) return;
    visit(bits, 64 * below, below);
    below += bits;
  };
  visit_one(std::integral_constant<int32_t, 8>());
  visit_one(std::integral_constant<int32_t, 4>());
  visit_one(std::integral_constant<int32_t, 2>());
  visit_one(std::integral_constant<int32_t, 1>());
}

// Writes row r's dwords of vectors v and v + 1, which lie one after the other in `both`.
inline void write_vectors(uint64_t both, int v, int64_t r, uint8_t* plane) {
  const uint32_t first = static_cast<uint32_t>(both), second = static_cast<uint32_t>(both >> 32);
  std::memcpy(plane + 64 * v + 4 * r, &first, 4);
  std::memcpy(plane + 64 * (v + 1) + 4 * r, &second, 4);
}

// Writes a plane of row r. eights: its bits of the codes of columns 8i..8i + 7, a byte each.
template <int32_t Bits>
void write_plane(const uint64_t (&eights)[4], int64_t r, uint8_t* plane) {
  if constexpr (Bits == 8) {
    for (int i = 0; i < 4; ++i) write_vectors(eights[i], 2 * i, r, plane);
  } else if constexpr (Bits == 4) {
    write_vectors(eights[0] | eights[2] << 4, 0, r, plane);
    write_vectors(eights[1] | eights[3] << 4, 2, r, plane);
  } else if constexpr (Bits == 2) {
    const uint64_t one = eights[0] | eights[1] << 4, two = eights[2] | eights[3] << 4;
    // Each eight holds two groups of four columns; their bits are next to each other.
    const uint64_t low = (one & 0xFFFFFFFFu) | two << 32, high = one >> 32 | (two >> 32) << 32;
    write_vectors(low | high << 2, 0, r, plane);
  } else {
    const uint64_t all = eights[0] | eights[1] << 2 | eights[2] << 4 | eights[3] << 6;
    const uint32_t vector = static_cast<uint32_t>(all) | static_cast<uint32_t>(all >> 32) << 1;
    std::memcpy(plane + 4 * r, &vector, 4);
  }
}

// Writes row r's 32 codes to a block of a panel.
template <int32_t CodeBits>
void write_codes(const uint8_t* codes, int64_t r, uint8_t* block) {
  uint64_t all[4];
  std::memcpy(all, codes, 32);
  each_plane(CodeBits, [&](auto bits, int32_t offset, int32_t below) {
    constexpr uint64_t kMask = ((1u << bits) - 1) * 0x0101010101010101u;
    const uint64_t eights[] = {all[0] >> below & kMask, all[1] >> below & kMask,
                               all[2] >> below & kMask, all[3] >> below & kMask};
    write_plane<bits>(eights, r, block + offset);
  });
}

// Position of the codes of columns 4j..4j + 3 in a plane of `bits`: vector, and lowest bit in a
// byte.
constexpr int vector_of(int32_t bits, int j) { return bits == 4 ? j % 4 : j * bits / 8; }
constexpr int shift_of(int32_t bits, int j) { return bits == 4 ? j / 4 * 4 : j * bits % 8; }

template <int32_t Bits>
void read_plane(const uint8_t* plane, int32_t below, int64_t r, uint32_t (&quads)[8]) {
  constexpr uint32_t kMask = ((1u << Bits) - 1) * 0x01010101u;
  for (int j = 0; j < 8; ++j) {
    uint32_t vector;
    std::memcpy(&vector, plane + 64 * vector_of(Bits, j) + 4 * r, 4);
    quads[j] |= ((vector >> shift_of(Bits, j)) & kMask) << below;
  }
}

// Reads row r's 32 codes.
inline void read_codes(int32_t code_bits, const uint8_t* block, int64_t r, uint8_t* codes) {
  uint32_t quads[8] = {};
  each_plane(code_bits, [&](auto bits, int32_t offset, int32_t below) {
    read_plane<bits>(block + offset, below, r, quads);
  });
  std::memcpy(codes, quads, 32);
}

}  // namespace tgi::cpu::step
