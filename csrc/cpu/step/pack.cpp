#include "pack.h"

#include <cmath>
#include <cstring>

namespace tgi::cpu::step {

namespace {

// 32 columns of one row in a form that all formats share.
struct RowBlock {
  uint8_t codes[32];    // unsigned, zero point included
  uint16_t scale, min;  // fp16 of a plain block
  uint8_t factors[2];  // of a K-quant's block: scale and min, or the scales of both halves (signed)
};

uint16_t read16(const uint8_t* p) {
  uint16_t x;
  std::memcpy(&x, p, 2);
  return x;
}

float to_float(uint16_t h) {
  const uint32_t sign = (h & 0x8000u) << 16, exponent = (h >> 10) & 31, mantissa = h & 0x3FFu;
  if (exponent == 0) {
    const float magnitude = std::ldexp(static_cast<float>(mantissa), -24);
    return sign ? -magnitude : magnitude;
  }
  const uint32_t bits = exponent == 31 ? sign | 0x7F800000u | (mantissa << 13)
                                       : sign | ((exponent + 112) << 23) | (mantissa << 13);
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

uint16_t to_half(float x) {  // to nearest, ties to even
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

void read_nibbles(const uint8_t* p, uint8_t* codes) {
  for (int i = 0; i < 16; ++i) {
    codes[i] = p[i] & 15;
    codes[16 + i] = p[i] >> 4;
  }
}

void add_fifth_bits(const uint8_t* p, uint8_t* codes) {
  uint32_t bits;
  std::memcpy(&bits, p, 4);
  for (int i = 0; i < 32; ++i) codes[i] |= ((bits >> i) & 1) << 4;
}

// Six-bit scale and min of block s of a Q4_K or Q5_K super-block.
void read_factors(const uint8_t* p, int64_t s, uint8_t* factors) {
  if (s < 4) {
    factors[0] = p[s] & 63;
    factors[1] = p[s + 4] & 63;
  } else {
    factors[0] = static_cast<uint8_t>((p[s + 4] & 15) | ((p[s - 4] >> 6) << 4));
    factors[1] = static_cast<uint8_t>((p[s + 4] >> 4) | ((p[s] >> 6) << 4));
  }
}

// Codes of block s of a Q4_K or Q5_K super-block: 64 columns share 32 bytes.
void read_super_nibbles(const uint8_t* p, int64_t s, uint8_t* codes) {
  for (int i = 0; i < 32; ++i) codes[i] = (p[s / 2 * 32 + i] >> (s % 2 * 4)) & 15;
}

void read_q6_k(const uint8_t* p, int64_t s, RowBlock& out) {
  const uint8_t* low = p + s / 4 * 64 + s % 2 * 32;
  const uint8_t* high = p + 128 + s / 4 * 32;
  for (int i = 0; i < 32; ++i) {
    const int nibble = (low[i] >> (s % 4 / 2 * 4)) & 15;
    out.codes[i] = static_cast<uint8_t>(nibble | (((high[i] >> (s % 4 * 2)) & 3) << 4));
  }
  out.factors[0] = p[192 + 2 * s];
  out.factors[1] = p[192 + 2 * s + 1];
}

RowBlock read_block(Format format, const uint8_t* row, int64_t b) {
  RowBlock out = {};
  const uint8_t* super = row + b / kSuperBlock * file_row_bytes(format, 256);
  const int64_t s = b % kSuperBlock;
  switch (format) {
    case Format::kQ8_0:
      row += b * 34;
      out.scale = read16(row);
      for (int i = 0; i < 32; ++i) out.codes[i] = row[2 + i] ^ 0x80;
      break;
    case Format::kQ4_0:
      row += b * 18;
      out.scale = read16(row);
      read_nibbles(row + 2, out.codes);
      break;
    case Format::kQ4_1:
      row += b * 20;
      out.scale = read16(row);
      out.min = read16(row + 2);
      read_nibbles(row + 4, out.codes);
      break;
    case Format::kQ5_0:
      row += b * 22;
      out.scale = read16(row);
      read_nibbles(row + 6, out.codes);
      add_fifth_bits(row + 2, out.codes);
      break;
    case Format::kQ5_1:
      row += b * 24;
      out.scale = read16(row);
      out.min = read16(row + 2);
      read_nibbles(row + 8, out.codes);
      add_fifth_bits(row + 4, out.codes);
      break;
    case Format::kQ4_K:
      read_factors(super + 4, s, out.factors);
      read_super_nibbles(super + 16, s, out.codes);
      break;
    case Format::kQ5_K:
      read_factors(super + 4, s, out.factors);
      read_super_nibbles(super + 48, s, out.codes);
      for (int i = 0; i < 32; ++i) out.codes[i] |= ((super[16 + i] >> s) & 1) << 4;
      break;
    case Format::kQ6_K:
      read_q6_k(super, s, out);
      break;
    default:
      break;
  }
  return out;
}

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
      x = to_float(read16(panel + (k * 16 + r) * 2));
    } else {
      const uint32_t bits =
          static_cast<uint32_t>(read16(panel + ((k / 2 * 16 + r) * 2 + k % 2) * 2)) << 16;
      std::memcpy(&x, &bits, 4);
    }
    out[k] = x * factor;
  }
}

}  // namespace

int64_t file_row_bytes(Format format, int64_t columns) {
  switch (format) {
    case Format::kF32:
      return columns * 4;
    case Format::kF16:
      return columns * 2;
    case Format::kBF16:
      return columns * 2;
    case Format::kQ8_0:
      return columns / 32 * 34;
    case Format::kQ4_0:
      return columns / 32 * 18;
    case Format::kQ4_1:
      return columns / 32 * 20;
    case Format::kQ5_0:
      return columns / 32 * 22;
    case Format::kQ5_1:
      return columns / 32 * 24;
    case Format::kQ4_K:
      return columns / 256 * 144;
    case Format::kQ5_K:
      return columns / 256 * 176;
    case Format::kQ6_K:
      return columns / 256 * 210;
  }
  return 0;
}

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
      scales[0] = scales[1] = to_float(read16(block + parts.scales + 2 * r));
      if (parts.mins >= 0) min = to_float(read16(block + parts.mins + 2 * r));
    } else {
      const float d = to_float(read16(header + 2 * r));
      const uint8_t first = block[parts.factors + r], second = block[parts.factors + 16 + r];
      if (weight.format == Format::kQ6_K) {
        scales[0] = d * static_cast<int8_t>(first);
        scales[1] = d * static_cast<int8_t>(second);
      } else {
        scales[0] = scales[1] = d * first;
        min = -to_float(read16(header + 32 + 2 * r)) * second;
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

void quantise_row(Format format, const float* x, int64_t columns, uint8_t* out) {
  for (int64_t b = 0; b < columns / 32; ++b, x += 32) {
    float largest = 0.0f;  // by magnitude, with its sign
    for (int k = 0; k < 32; ++k) largest = std::fabs(x[k]) > std::fabs(largest) ? x[k] : largest;
    if (format == Format::kQ8_0) {
      const float scale = std::fabs(largest) / 127.0f,
                  inverse = scale == 0.0f ? 0.0f : 1.0f / scale;
      const uint16_t half = to_half(scale);
      std::memcpy(out, &half, 2);
      for (int k = 0; k < 32; ++k)
        out[2 + k] = static_cast<uint8_t>(static_cast<int8_t>(std::round(x[k] * inverse)));
      out += 34;
    } else {
      const float scale = largest / -8.0f, inverse = scale == 0.0f ? 0.0f : 1.0f / scale;
      const uint16_t half = to_half(scale);
      std::memcpy(out, &half, 2);
      for (int k = 0; k < 16; ++k) {
        const int low = static_cast<int>(x[k] * inverse + 8.5f),
                  high = static_cast<int>(x[16 + k] * inverse + 8.5f);
        out[2 + k] = static_cast<uint8_t>((low > 15 ? 15 : low) | ((high > 15 ? 15 : high) << 4));
      }
      out += 18;
    }
  }
}

}  // namespace tgi::cpu::step
