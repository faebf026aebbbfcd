// A reader for each format's blocks, named as in formats.def. read() decodes the 32 columns `part`
// of a file's block; scales() and value() interpret the numbers. Layouts: ggml-common.h; arithmetic
// and its order: ggml-quants.c. Included only by block_reader.cpp.
#pragma once

#include <array>
#include <limits>

#include "block_reader.h"

namespace tgi::cpu::step {

namespace {

// weight = scale * value + offset, for each half of 16 columns.
struct Scales {
  float scale[2];
  float offset[2];
};

void read_nibbles(const uint8_t* p, uint8_t* codes) {
  for (int i = 0; i < 16; ++i) codes[i] = p[i] & 15;
  for (int i = 0; i < 16; ++i) codes[16 + i] = p[i] >> 4;
}

// Reads 32 codes: bits [shift, shift + width) of each of 32 bytes at p.
void read_bits(const uint8_t* p, int64_t shift, int width, uint8_t* codes) {
  const uint8_t mask = static_cast<uint8_t>((1 << width) - 1);
  for (int i = 0; i < 32; ++i) codes[i] = static_cast<uint8_t>(p[i] >> shift) & mask;
}

// Adds `width` bits to each code, above its `place` low bits.
void add_bits(const uint8_t* p, int64_t shift, int width, int place, uint8_t* codes) {
  uint8_t high[32];
  read_bits(p, shift, width, high);
  for (int i = 0; i < 32; ++i) codes[i] |= static_cast<uint8_t>(high[i] << place);
}

void add_fifth_bits(const uint8_t* p, uint8_t* codes) {
  uint32_t bits;
  std::memcpy(&bits, p, 4);
  for (int i = 0; i < 32; ++i) codes[i] |= static_cast<uint8_t>((bits >> i & 1) << 4);
}

void read_halves(const uint8_t* p, int count, RowBlock& out) {
  std::memcpy(out.halves, p, 2 * static_cast<size_t>(count));
}

// Codes are numbers minus a zero point.
template <int Zero>
struct Numbers {
  static constexpr bool kIsCodebook = false;
  static float value(const RowBlock& block, int i) {
    return static_cast<float>(block.codes[i] - Zero);
  }
};

constexpr std::array<float, 16> as_floats(const int8_t (&values)[16]) {
  std::array<float, 16> out = {};
  for (size_t i = 0; i < 16; ++i) out[i] = values[i];
  return out;
}

template <const int8_t (&Values)[16]>
struct Codebook {
  static constexpr bool kIsCodebook = true;
  static constexpr std::array<float, 16> kFloats = as_floats(Values);
  static float value(const RowBlock& block, int i) { return kFloats[block.codes[i]]; }
};

struct HalfScale {
  static constexpr bool kHasOffset = false;
  static Scales scales(const RowBlock& block) {
    const float scale = half_to_float(block.halves[0]);
    return {{scale, scale}, {}};
  }
};

struct HalfScaleAndMin {
  static constexpr bool kHasOffset = true;
  static Scales scales(const RowBlock& block) {
    const float scale = half_to_float(block.halves[0]), min = half_to_float(block.halves[1]);
    return {{scale, scale}, {min, min}};
  }
};

// K-quants: an integer scale and min per block.
struct SuperScaleAndMin {
  static constexpr bool kHasOffset = true;
  static Scales scales(const RowBlock& block) {
    const float scale = half_to_float(block.halves[0]) * block.factors[0];
    const float min = half_to_float(block.halves[1]) * block.factors[1];
    return {{scale, scale}, {-min, -min}};
  }
};

// The same with a signed scale for each half.
struct SuperHalfScales {
  static constexpr bool kHasOffset = false;
  static Scales scales(const RowBlock& block) {
    const float d = half_to_float(block.halves[0]);
    return {{d * static_cast<int8_t>(block.factors[0]), d * static_cast<int8_t>(block.factors[1])},
            {}};
  }
};

struct Q4_0 : Numbers<8>, HalfScale {
  static void read(const uint8_t* p, int64_t, RowBlock& out) {
    read_halves(p, 1, out);
    read_nibbles(p + 2, out.codes);
  }
};

struct Q4_1 : Numbers<0>, HalfScaleAndMin {
  static void read(const uint8_t* p, int64_t, RowBlock& out) {
    read_halves(p, 2, out);
    read_nibbles(p + 4, out.codes);
  }
};

struct Q5_0 : Numbers<16>, HalfScale {
  static void read(const uint8_t* p, int64_t, RowBlock& out) {
    read_halves(p, 1, out);
    read_nibbles(p + 6, out.codes);
    add_fifth_bits(p + 2, out.codes);
  }
};

struct Q5_1 : Numbers<0>, HalfScaleAndMin {
  static void read(const uint8_t* p, int64_t, RowBlock& out) {
    read_halves(p, 2, out);
    read_nibbles(p + 8, out.codes);
    add_fifth_bits(p + 4, out.codes);
  }
};

struct Q8_0 : Numbers<128>, HalfScale {
  static void read(const uint8_t* p, int64_t, RowBlock& out) {
    read_halves(p, 1, out);
    for (int i = 0; i < 32; ++i) out.codes[i] = p[2 + i] ^ 0x80;
  }
};

// The second fp16 number, scale * sum of the codes, is only for ggml's own kernels.
struct Q8_1 : Numbers<128>, HalfScale {
  static void read(const uint8_t* p, int64_t, RowBlock& out) {
    read_halves(p, 1, out);
    for (int i = 0; i < 32; ++i) out.codes[i] = p[4 + i] ^ 0x80;
  }
};

// 4 bits of scale and 4 bits of min per half.
struct Q2_K : Numbers<0> {
  static constexpr bool kHasOffset = true;
  static void read(const uint8_t* p, int64_t part, RowBlock& out) {
    read_halves(p + 80, 2, out);
    std::memcpy(out.factors, p + 2 * part, 2);
    read_bits(p + 16 + part / 4 * 32, part % 4 * 2, 2, out.codes);
  }
  static Scales scales(const RowBlock& block) {
    const float d = half_to_float(block.halves[0]), dmin = half_to_float(block.halves[1]);
    const uint8_t* f = block.factors;
    return {{d * (f[0] & 15), d * (f[1] & 15)}, {-(dmin * (f[0] >> 4)), -(dmin * (f[1] >> 4))}};
  }
};

// Scales have 6 bits: the low four bits of the sixteen scales are in 8 bytes, the high two in 4.
struct Q3_K : Numbers<4>, SuperHalfScales {
  static void read(const uint8_t* p, int64_t part, RowBlock& out) {
    read_halves(p + 108, 1, out);
    for (int64_t half = 0; half < 2; ++half) {
      const int64_t i = 2 * part + half;
      const int low = p[96 + i % 8] >> (i / 8 * 4) & 15, high = p[104 + i % 4] >> (i / 4 * 2) & 3;
      out.factors[half] = static_cast<uint8_t>((low | high << 4) - 32);
    }
    read_bits(p + 32 + part / 4 * 32, part % 4 * 2, 2, out.codes);
    add_bits(p, part, 1, 2, out.codes);
  }
};

// Reads the 6-bit scale and min of block `part` of a Q4_K or Q5_K super-block.
void read_super(const uint8_t* p, int64_t part, RowBlock& out) {
  read_halves(p, 2, out);
  p += 4;
  if (part < 4) {
    out.factors[0] = p[part] & 63;
    out.factors[1] = p[part + 4] & 63;
  } else {
    out.factors[0] = static_cast<uint8_t>((p[part + 4] & 15) | p[part - 4] >> 6 << 4);
    out.factors[1] = static_cast<uint8_t>(p[part + 4] >> 4 | p[part] >> 6 << 4);
  }
}

struct Q4_K : Numbers<0>, SuperScaleAndMin {
  static void read(const uint8_t* p, int64_t part, RowBlock& out) {
    read_super(p, part, out);
    read_bits(p + 16 + part / 2 * 32, part % 2 * 4, 4, out.codes);
  }
};

struct Q5_K : Numbers<0>, SuperScaleAndMin {
  static void read(const uint8_t* p, int64_t part, RowBlock& out) {
    read_super(p, part, out);
    read_bits(p + 48 + part / 2 * 32, part % 2 * 4, 4, out.codes);
    add_bits(p + 16, part, 1, 4, out.codes);
  }
};

struct Q6_K : Numbers<32>, SuperHalfScales {
  static void read(const uint8_t* p, int64_t part, RowBlock& out) {
    read_halves(p + 208, 1, out);
    std::memcpy(out.factors, p + 192 + 2 * part, 2);
    read_bits(p + part / 4 * 64 + part % 2 * 32, part % 4 / 2 * 4, 4, out.codes);
    add_bits(p + 128 + part / 4 * 32, part % 4 * 2, 2, 4, out.codes);
  }
};

struct IQ4_NL : Codebook<kIq4Values>, HalfScale {
  static void read(const uint8_t* p, int64_t, RowBlock& out) {
    read_halves(p, 1, out);
    read_nibbles(p + 2, out.codes);
  }
};

// A 6-bit scale per block: four bits in a nibble, two in a word shared by all eight blocks.
struct IQ4_XS : Codebook<kIq4Values> {
  static constexpr bool kHasOffset = false;
  static void read(const uint8_t* p, int64_t part, RowBlock& out) {
    read_halves(p, 1, out);
    const int low = p[4 + part / 2] >> (part % 2 * 4) & 15, high = read16(p + 2) >> 2 * part & 3;
    out.factors[0] = static_cast<uint8_t>((low | high << 4) - 32);
    read_nibbles(p + 8 + 16 * part, out.codes);
  }
  static Scales scales(const RowBlock& block) {
    const float scale = half_to_float(block.halves[0]) * static_cast<int8_t>(block.factors[0]);
    return {{scale, scale}, {}};
  }
};

// A power of two per block, in OCP's E8M0. The values are doubled, so the scale is halved; for
// exponents below 2 it is denormal.
struct MXFP4 : Codebook<kMxfp4Values> {
  static constexpr bool kHasOffset = false;
  static void read(const uint8_t* p, int64_t, RowBlock& out) {
    out.factors[0] = p[0];
    read_nibbles(p + 1, out.codes);
  }
  static Scales scales(const RowBlock& block) {
    const uint32_t e = block.factors[0];
    const float scale = float_of_bits(e < 2 ? 0x00200000u << e : (e - 1) << 23);
    return {{scale, scale}, {}};
  }
};

struct Int4 : HalfScale {
  static constexpr bool kIsCodebook = false;
  static void read(const uint8_t* p, int64_t part, RowBlock& out) {
    read_halves(p, 1, out);
    out.factors[0] = p[2];
    p += 4 + 16 * part;
    for (int i = 0; i < 16; ++i) {
      out.codes[2 * i] = p[i] & 15;
      out.codes[2 * i + 1] = p[i] >> 4;
    }
  }
  static float value(const RowBlock& block, int i) {
    return static_cast<float>(block.codes[i] - block.factors[0]);
  }
};
using INT4_32 = Int4;
using INT4_64 = Int4;
using INT4_128 = Int4;

// One sign bit, four exponent bits, three mantissa bits; no infinities; NaN if all bits but the
// sign are set.
constexpr std::array<float, 256> e4m3_values() {
  std::array<float, 256> values = {};
  for (int code = 0; code < 256; ++code) {
    const int exponent = code >> 3 & 15, mantissa = code & 7;
    float x = static_cast<float>(exponent == 0 ? mantissa : 8 + mantissa) / 512;
    for (int i = 1; i < exponent; ++i) x *= 2;
    if ((code & 127) == 127) x = std::numeric_limits<float>::quiet_NaN();
    values[static_cast<size_t>(code)] = code < 128 ? x : -x;
  }
  return values;
}

constexpr std::array<float, 256> kE4m3Values = e4m3_values();

struct Float8 {
  static constexpr bool kIsCodebook = false;
  static constexpr bool kHasOffset = false;
  static void read(const uint8_t* p, int64_t part, RowBlock& out) {
    read_halves(p, 2, out);
    std::memcpy(out.codes, p + 4 + 32 * part, 32);
  }
  static Scales scales(const RowBlock& block) {
    float scale;
    std::memcpy(&scale, block.halves, 4);
    return {{scale, scale}, {}};
  }
  static float value(const RowBlock& block, int i) { return kE4m3Values[block.codes[i]]; }
};
using F8_32 = Float8;
using F8_64 = Float8;
using F8_128 = Float8;

}  // namespace
}  // namespace tgi::cpu::step
