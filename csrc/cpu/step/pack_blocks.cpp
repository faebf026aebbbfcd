#include "pack_blocks.h"

#include <cmath>

#include "pack.h"

namespace tgi::cpu::step {

namespace {

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

}  // namespace

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

float half_to_float(uint16_t h) {
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

void quantise_row(Format format, const float* x, int64_t columns, uint8_t* out) {
  for (int64_t b = 0; b < columns / 32; ++b, x += 32) {
    float largest = 0.0f;  // by magnitude, with its sign
    for (int k = 0; k < 32; ++k) largest = std::fabs(x[k]) > std::fabs(largest) ? x[k] : largest;
    if (format == Format::kQ8_0) {
      const float scale = std::fabs(largest) / 127.0f,
                  inverse = scale == 0.0f ? 0.0f : 1.0f / scale;
      const uint16_t half = float_to_half(scale);
      std::memcpy(out, &half, 2);
      for (int k = 0; k < 32; ++k)
        out[2 + k] = static_cast<uint8_t>(static_cast<int8_t>(std::round(x[k] * inverse)));
      out += 34;
    } else {
      const float scale = largest / -8.0f, inverse = scale == 0.0f ? 0.0f : 1.0f / scale;
      const uint16_t half = float_to_half(scale);
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
