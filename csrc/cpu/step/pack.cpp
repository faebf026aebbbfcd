#include "pack.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "block_reader.h"

namespace tgi::cpu::step {

namespace {

// A block's codes are stored in planes, see packed.h: 5-bit codes in one plane of 4 bits and one of
// 1, and so on.

// Position of the codes of columns 4j..4j + 3 in a plane of `bits`: vector, and lowest bit in a
// byte.
constexpr int vector_of(int32_t bits, int j) { return bits == 4 ? j % 4 : j * bits / 8; }
constexpr int shift_of(int32_t bits, int j) { return bits == 4 ? j / 4 * 4 : j * bits % 8; }
constexpr uint32_t mask_of(int32_t bits) { return ((1u << bits) - 1) * 0x01010101u; }

template <int32_t Bits>
void write_plane(const uint32_t (&quads)[8], int32_t below, int64_t r, uint8_t* plane) {
  uint32_t vectors[Bits] = {};
  for (int j = 0; j < 8; ++j)
    vectors[vector_of(Bits, j)] |= ((quads[j] >> below) & mask_of(Bits)) << shift_of(Bits, j);
  for (int32_t v = 0; v < Bits; ++v) std::memcpy(plane + 64 * v + 4 * r, &vectors[v], 4);
}

template <int32_t Bits>
void read_plane(const uint8_t* plane, int32_t below, int64_t r, uint32_t (&quads)[8]) {
  for (int j = 0; j < 8; ++j) {
    uint32_t vector;
    std::memcpy(&vector, plane + 64 * vector_of(Bits, j) + 4 * r, 4);
    quads[j] |= ((vector >> shift_of(Bits, j)) & mask_of(Bits)) << below;
  }
}

// Calls visit(width of a plane as a constant, its offset in a block, bits of a code below it).
template <class Visit>
void each_plane(int32_t code_bits, const Visit& visit) {
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

// Writes row r's codes to a block of a panel.
void write_codes(int32_t code_bits, const uint8_t* codes, int64_t r, uint8_t* block) {
  uint32_t quads[8];
  std::memcpy(quads, codes, 32);
  each_plane(code_bits, [&](auto bits, int32_t offset, int32_t below) {
    write_plane<bits>(quads, below, r, block + offset);
  });
}

void read_codes(int32_t code_bits, const uint8_t* block, int64_t r, uint8_t* codes) {
  uint32_t quads[8] = {};
  each_plane(code_bits, [&](auto bits, int32_t offset, int32_t below) {
    read_plane<bits>(block + offset, below, r, quads);
  });
  std::memcpy(codes, quads, 32);
}

// Writes and reads row r's numbers, stored as [number][16 rows].
void write_numbers(const RowBlock& from, int32_t halves, int32_t factors, int64_t r, uint8_t* out) {
  for (int32_t i = 0; i < halves; ++i, out += 32) std::memcpy(out + 2 * r, &from.halves[i], 2);
  for (int32_t i = 0; i < factors; ++i, out += 16) out[r] = from.factors[i];
}

void read_numbers(const uint8_t* p, int32_t halves, int32_t factors, int64_t r, RowBlock& out) {
  for (int32_t i = 0; i < halves; ++i, p += 32) std::memcpy(&out.halves[i], p + 2 * r, 2);
  for (int32_t i = 0; i < factors; ++i, p += 16) out.factors[i] = p[r];
}

// Packs block b of row r.
void pack_codes(Format format, const uint8_t* row, int64_t b, int64_t r, uint8_t* panel) {
  const PanelInfo& info = format_info(format).panel;
  RowBlock from;
  read_block(format, row, b, &from);
  uint8_t* block = panel + block_offset(format, b);
  write_codes(info.code_bits, from.codes, r, block);
  write_numbers(from, info.block_halves, info.block_factors, r, block + 64 * info.code_bits);
  if (info.header_blocks == 0 || b % info.header_blocks != 0) return;
  write_numbers(from, info.header_halves, info.header_factors, r, panel + header_offset(format, b));
}

// Index of column k of row r among a panel's floats.
int64_t float_place(Format format, int64_t k, int64_t r) {
  return format == Format::kBF16 ? (k / 2 * 16 + r) * 2 + k % 2 : k * 16 + r;
}

// Packs columns [begin, end) of row r.
void pack_floats(Format format, const uint8_t* row, int64_t begin, int64_t end, int64_t r,
                 uint8_t* panel) {
  if (format == Format::kF32) {
    for (int64_t k = begin; k < end; ++k)
      std::memcpy(panel + float_place(format, k, r) * 4, row + k * 4, 4);
    return;
  }
  int64_t k = begin;
  if (format == Format::kBF16) {  // both columns of a pair at once: `begin` is even
    for (; k + 1 < end; k += 2) std::memcpy(panel + float_place(format, k, r) * 2, row + k * 2, 4);
  }
  for (; k < end; ++k) std::memcpy(panel + float_place(format, k, r) * 2, row + k * 2, 2);
}

void unpack_float_row(const PackedMatrix& weight, const uint8_t* panel, int64_t r, float factor,
                      float* out) {
  for (int64_t k = 0; k < weight.num_columns; ++k) {
    const int64_t at = float_place(weight.format, k, r);
    float x;
    if (weight.format == Format::kF32) {
      std::memcpy(&x, panel + at * 4, 4);
    } else if (weight.format == Format::kF16) {
      x = half_to_float(read16(panel + at * 2));
    } else {
      x = float_of_bits(static_cast<uint32_t>(read16(panel + at * 2)) << 16);
    }
    out[k] = x * factor;
  }
}

// Largest magnitude whose scale fits in a float16, even with four bits.
constexpr float kLargestQuantised = 65504.0f * 8;

// x: 32 values.
void quantise_q8_0(const float* x, float largest, uint8_t* out) {
  const float scale = std::fabs(largest) / 127.0f, inverse = scale == 0.0f ? 0.0f : 1.0f / scale;
  const uint16_t half = float_to_half(scale);
  std::memcpy(out, &half, 2);
  for (int k = 0; k < 32; ++k)
    out[2 + k] = static_cast<uint8_t>(static_cast<int8_t>(std::round(x[k] * inverse)));
}

void quantise_q4_0(const float* x, float largest, uint8_t* out) {
  const float scale = largest / -8.0f, inverse = scale == 0.0f ? 0.0f : 1.0f / scale;
  const uint16_t half = float_to_half(scale);
  std::memcpy(out, &half, 2);
  for (int k = 0; k < 16; ++k) {
    const int low = static_cast<int>(x[k] * inverse + 8.5f),
              high = static_cast<int>(x[16 + k] * inverse + 8.5f);
    out[2 + k] = static_cast<uint8_t>((low > 15 ? 15 : low) | ((high > 15 ? 15 : high) << 4));
  }
}

}  // namespace

void pack_panels(Format format, int64_t columns, const uint8_t* const* rows, int64_t begin,
                 int64_t end, uint8_t* out) {
  const int64_t size = panel_bytes(format, columns);
  for (int64_t panel = begin; panel < end; ++panel) {
    uint8_t* const target = out + panel * size;
    std::memset(target, 0, static_cast<size_t>(size));
    // The inner loop is over rows, so that a block of the panel stays in L1.
    for (int64_t k = 0; k < columns; k += kBlockColumns) {
      for (int64_t r = 0; r < kPanelRows; ++r) {
        const uint8_t* row = rows[panel * kPanelRows + r];
        if (row == nullptr) continue;
        if (is_quantised(format)) {
          pack_codes(format, row, k / kBlockColumns, r, target);
        } else {
          pack_floats(format, row, k, std::min(k + kBlockColumns, columns), r, target);
        }
      }
    }
  }
}

void pack_matrix(Format format, int64_t columns, const uint8_t* const* rows, int64_t num_rows,
                 const Shares& shares, uint8_t* out) {
  const auto pack = [&](int member, int num_members) {
    const Range strips = shares.of(num_rows / kStripRows, member, num_members);
    pack_panels(format, columns, rows, 2 * strips.begin, 2 * strips.end, out);
  };
  run_on_team(pack, Members::kAll);
}

void unpack_row(const PackedMatrix& weight, int64_t row, float factor, float* out) {
  const uint8_t* panel = weight.panel(row / kPanelRows);
  const int64_t r = row % kPanelRows;
  if (!is_quantised(weight.format)) return unpack_float_row(weight, panel, r, factor, out);
  const PanelInfo& info = format_info(weight.format).panel;
  RowBlock from = {};
  for (int64_t b = 0; b < weight.num_columns / kBlockColumns; ++b, out += kBlockColumns) {
    const uint8_t* block = panel + block_offset(weight.format, b);
    read_codes(info.code_bits, block, r, from.codes);
    read_numbers(block + 64 * info.code_bits, info.block_halves, info.block_factors, r, from);
    if (info.header_blocks != 0) {
      read_numbers(panel + header_offset(weight.format, b), info.header_halves, info.header_factors,
                   r, from);
    }
    decode_block(weight.format, from, out);
    for (int k = 0; k < kBlockColumns; ++k) out[k] *= factor;
  }
}

uint16_t float_to_half(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const float magnitude = std::fabs(x);
  if (!(magnitude < 65520.0f))
    return static_cast<uint16_t>(sign | (magnitude == magnitude ? 0x7C00u : 0x7E00u));
  if (magnitude < 6.103515625e-05f) {
    return static_cast<uint16_t>(sign |
                                 static_cast<uint32_t>(std::nearbyintf(magnitude * 16777216.0f)));
  }
  const uint32_t rounded = (bits & 0x7FFFFFFFu) + 0xFFFu + ((bits >> 13) & 1);
  return static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
}

bool quantise_row(Format format, const float* x, int64_t columns, uint8_t* out) {
  for (int64_t at = 0; at < columns; at += 32, out += format_info(format).block_bytes) {
    float block[32] = {};
    std::memcpy(block, x + at,
                sizeof(float) * static_cast<size_t>(std::min<int64_t>(columns - at, 32)));
    float largest = 0.0f;  // largest by magnitude, with its sign
    for (const float value : block) {
      if (!(std::fabs(value) <= kLargestQuantised)) return false;
      largest = std::fabs(value) > std::fabs(largest) ? value : largest;
    }
    if (format == Format::kQ8_0) {
      quantise_q8_0(block, largest, out);
    } else {
      quantise_q4_0(block, largest, out);
    }
  }
  return true;
}

}  // namespace tgi::cpu::step
