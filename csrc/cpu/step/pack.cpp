#include "pack.h"

#include <cstring>

#include "pack_blocks.h"

namespace tgi::cpu::step {

namespace {

// Where a block's parts lie in a panel's block; negative where the format has none.
struct Parts {
  int bits;  // of a code
  int high;  // offset of the bits above four
  int scales;
  int mins;
  int factors;
};

Parts parts_of(Format format) {
  switch (format) {
    case Format::kQ8_0:
      return {8, -1, 512, -1, -1};
    case Format::kQ4_0:
      return {4, -1, 256, -1, -1};
    case Format::kQ4_1:
      return {4, -1, 256, 288, -1};
    case Format::kQ5_0:
      return {5, 256, 320, -1, -1};
    case Format::kQ5_1:
      return {5, 256, 320, 352, -1};
    case Format::kQ4_K:
      return {4, -1, -1, -1, 256};
    case Format::kQ5_K:
      return {5, 256, -1, -1, 320};
    case Format::kQ6_K:
      return {6, 256, -1, -1, 384};
    default:
      return {0, -1, -1, -1, -1};
  }
}

// Adds row r's codes to a zeroed block of a panel. Column 4j + i of a row is byte i of its dword in
// vector j.
void write_codes(const Parts& parts, const uint8_t* codes, int64_t r, uint8_t* block) {
  for (int k = 0; k < 32; ++k) {
    const int j = k / 4, byte = static_cast<int>(4 * r) + k % 4;
    if (parts.bits == 8) {
      block[64 * j + byte] = codes[k];
      continue;
    }
    block[64 * (j % 4) + byte] |= static_cast<uint8_t>((codes[k] & 15) << (j / 4 * 4));
    if (parts.bits == 5) block[parts.high + byte] |= static_cast<uint8_t>((codes[k] >> 4) << j);
    if (parts.bits == 6)
      block[parts.high + 64 * (j / 4) + byte] |=
          static_cast<uint8_t>((codes[k] >> 4) << (j % 4 * 2));
  }
}

void read_codes(const Parts& parts, const uint8_t* block, int64_t r, uint8_t* codes) {
  for (int k = 0; k < 32; ++k) {
    const int j = k / 4, byte = static_cast<int>(4 * r) + k % 4;
    if (parts.bits == 8) {
      codes[k] = block[64 * j + byte];
      continue;
    }
    codes[k] = (block[64 * (j % 4) + byte] >> (j / 4 * 4)) & 15;
    if (parts.bits == 5)
      codes[k] |= static_cast<uint8_t>(((block[parts.high + byte] >> j) & 1) << 4);
    if (parts.bits == 6) {
      codes[k] |=
          static_cast<uint8_t>(((block[parts.high + 64 * (j / 4) + byte] >> (j % 4 * 2)) & 3) << 4);
    }
  }
}

void pack_float_row(Format format, int64_t columns, const uint8_t* row, int64_t r, uint8_t* panel) {
  const int64_t size = format == Format::kF32 ? 4 : 2;
  for (int64_t k = 0; k < columns; ++k) {
    const int64_t at = format == Format::kBF16 ? (k / 2 * 16 + r) * 2 + k % 2 : k * 16 + r;
    std::memcpy(panel + at * size, row + k * size, size);
  }
}

// Plain nibbles and bytes lie in the file as in a dword of the panel: moved four at a time.
void pack_dwords(Format format, const uint8_t* row, int64_t b, int64_t r, uint8_t* block) {
  const int header = format == Format::kQ4_1 ? 4 : 2;
  const int vectors = format == Format::kQ8_0 ? 8 : 4;
  row += b * file_row_bytes(format, 32);
  for (int j = 0; j < vectors; ++j) {
    uint32_t dword;
    std::memcpy(&dword, row + header + 4 * j, 4);
    if (format == Format::kQ8_0) dword ^= 0x80808080u;
    std::memcpy(block + 64 * j + 4 * r, &dword, 4);
  }
  std::memcpy(block + 64 * vectors + 2 * r, row, 2);
  if (format == Format::kQ4_1) std::memcpy(block + 64 * vectors + 32 + 2 * r, row + 2, 2);
}

void pack_quantised_row(Format format, int64_t columns, const uint8_t* row, int64_t r,
                        uint8_t* panel) {
  const Parts parts = parts_of(format);
  const bool is_plain =
      format == Format::kQ8_0 || format == Format::kQ4_0 || format == Format::kQ4_1;
  for (int64_t b = 0; b < columns / kBlockColumns; ++b) {
    uint8_t* block = panel + block_offset(format, b);
    if (is_plain) {
      pack_dwords(format, row, b, r, block);
      continue;
    }
    const RowBlock from = read_block(format, row, b);
    write_codes(parts, from.codes, r, block);
    if (parts.scales >= 0) std::memcpy(block + parts.scales + 2 * r, &from.scale, 2);
    if (parts.mins >= 0) std::memcpy(block + parts.mins + 2 * r, &from.min, 2);
    if (parts.factors >= 0) {
      block[parts.factors + r] = from.factors[0];
      block[parts.factors + 16 + r] = from.factors[1];
      if (b % kSuperBlock == 0) {
        uint8_t* header = block - panel_layout(format).header_bytes;
        const uint8_t* super = row + b / kSuperBlock * file_row_bytes(format, 256);
        if (format == Format::kQ6_K) {
          std::memcpy(header + 2 * r, super + 208, 2);
        } else {
          std::memcpy(header + 2 * r, super, 2);
          std::memcpy(header + 32 + 2 * r, super + 2, 2);
        }
      }
    }
  }
}

void unpack_float_row(const PackedMatrix& weight, const uint8_t* panel, int64_t r, float factor,
                      float* out) {
  for (int64_t k = 0; k < weight.num_columns; ++k) {
    float x;
    if (weight.format == Format::kF32) {
      std::memcpy(&x, panel + (k * 16 + r) * 4, 4);
    } else if (weight.format == Format::kF16) {
      x = half_to_float(read16(panel + (k * 16 + r) * 2));
    } else {
      const uint32_t bits =
          static_cast<uint32_t>(read16(panel + ((k / 2 * 16 + r) * 2 + k % 2) * 2)) << 16;
      std::memcpy(&x, &bits, 4);
    }
    out[k] = x * factor;
  }
}

}  // namespace

void pack_panels(Format format, int64_t columns, const uint8_t* const* rows, int64_t begin,
                 int64_t end, uint8_t* out) {
  const int64_t size = panel_bytes(format, columns);
  for (int64_t panel = begin; panel < end; ++panel) {
    uint8_t* const target = out + panel * size;
    std::memset(target, 0, static_cast<size_t>(size));
    for (int64_t r = 0; r < kPanelRows; ++r) {
      const uint8_t* row = rows[panel * kPanelRows + r];
      if (row == nullptr) continue;
      if (is_quantised(format)) {
        pack_quantised_row(format, columns, row, r, target);
      } else {
        pack_float_row(format, columns, row, r, target);
      }
    }
  }
}

void unpack_row(const PackedMatrix& weight, int64_t row, float factor, float* out) {
  const uint8_t* panel = weight.panel(row / kPanelRows);
  const int64_t r = row % kPanelRows;
  if (!is_quantised(weight.format)) return unpack_float_row(weight, panel, r, factor, out);
  const Parts parts = parts_of(weight.format);
  const int zero =
      parts.bits == 8 ? 128
      : parts.mins >= 0 || weight.format == Format::kQ4_K || weight.format == Format::kQ5_K
          ? 0
          : 1 << (parts.bits - 1);
  for (int64_t b = 0; b < weight.num_columns / kBlockColumns; ++b, out += kBlockColumns) {
    const uint8_t* block = panel + block_offset(weight.format, b);
    const uint8_t* header = panel + block_offset(weight.format, b / kSuperBlock * kSuperBlock) -
                            panel_layout(weight.format).header_bytes;
    float scales[2], min = 0.0f;
    if (parts.factors < 0) {
      scales[0] = scales[1] = half_to_float(read16(block + parts.scales + 2 * r));
      if (parts.mins >= 0) min = half_to_float(read16(block + parts.mins + 2 * r));
    } else {
      const float d = half_to_float(read16(header + 2 * r));
      const uint8_t first = block[parts.factors + r], second = block[parts.factors + 16 + r];
      if (weight.format == Format::kQ6_K) {
        scales[0] = d * static_cast<int8_t>(first);
        scales[1] = d * static_cast<int8_t>(second);
      } else {
        scales[0] = scales[1] = d * first;
        min = -half_to_float(read16(header + 32 + 2 * r)) * second;
      }
    }
    uint8_t codes[32];
    read_codes(parts, block, r, codes);
    for (int k = 0; k < 32; ++k) {
      const float weight_value = static_cast<float>(codes[k] - zero) * scales[k / 16];
      out[k] = (weight_value + min) * factor;
    }
  }
}

}  // namespace tgi::cpu::step
