// A reader for each format's blocks, named as in formats.def. read() decodes the 32 columns `part`
// of a file's block; scales() and value() interpret the numbers. Layouts: ggml-common.h; arithmetic
// and its order: ggml-quants.c. Included by block_reader.cpp and pack.cpp.
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

// Eight bytes at a time; the lowest byte comes first on all processors that this runs on.
inline uint64_t read64(const uint8_t* p) {
  uint64_t x;
  std::memcpy(&x, p, 8);
  return x;
}

inline void write64(uint64_t x, uint8_t* p) { std::memcpy(p, &x, 8); }

constexpr uint64_t kEachByte = 0x0101010101010101u;

// Returns the lowest `width` bits of each byte.
constexpr uint64_t low_bits(uint64_t bytes, int width) {
  return bytes & ((1u << width) - 1) * kEachByte;
}

inline void read_nibbles(const uint8_t* p, uint8_t* codes) {
  for (int i = 0; i < 16; i += 8) {
    write64(low_bits(read64(p + i), 4), codes + i);
    write64(low_bits(read64(p + i) >> 4, 4), codes + 16 + i);
  }
}

// Reads 32 nibbles, the first of two columns in the low half of a byte.
inline void read_nibble_pairs(const uint8_t* p, uint8_t* codes) {
  for (int i = 0; i < 4; ++i) {
    uint32_t bytes;
    std::memcpy(&bytes, p + 4 * i, 4);
    uint64_t spread = (bytes | uint64_t{bytes} << 16) & 0x0000FFFF0000FFFFu;
    spread = (spread | spread << 8) & 0x00FF00FF00FF00FFu;
    write64(low_bits(spread | spread << 4, 4), codes + 8 * i);
  }
}

// Reads 32 codes: bits [shift, shift + width) of each of 32 bytes at p.
inline void read_bits(const uint8_t* p, int64_t shift, int width, uint8_t* codes) {
  for (int i = 0; i < 32; i += 8) write64(low_bits(read64(p + i) >> shift, width), codes + i);
}

// Adds as many bits to each code, above its `place` low bits.
inline void add_bits(const uint8_t* p, int64_t shift, int width, int place, uint8_t* codes) {
  for (int i = 0; i < 32; i += 8) {
    const uint64_t added = low_bits(read64(p + i) >> shift, width) << place;
    write64(read64(codes + i) | added, codes + i);
  }
}

// Eight bytes whose bit `place` is one of eight bits, the lowest in the first byte.
inline uint64_t place_bits(uint8_t bits, int place) {
  const uint64_t alone = bits * kEachByte & 0x8040201008040201u;  // bit i in byte i
  return low_bits((alone + 0x7F * kEachByte) >> 7, 1) << place;
}

// Adds a fifth bit to each code: 32 bits at p.
inline void add_fifth_bits(const uint8_t* p, uint8_t* codes) {
  for (int i = 0; i < 32; i += 8) write64(read64(codes + i) | place_bits(p[i / 8], 4), codes + i);
}

// Reads 32 signed bytes as codes with a zero point of 128.
inline void read_signed(const uint8_t* p, uint8_t* codes) {
  for (int i = 0; i < 32; ++i) codes[i] = p[i] ^ 0x80;
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
  static constexpr const int8_t (&kValues)[16] = Values;
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
    read_signed(p + 2, out.codes);
  }
};

// The second fp16 number, scale * sum of the codes, is only for ggml's own kernels.
struct Q8_1 : Numbers<128>, HalfScale {
  static void read(const uint8_t* p, int64_t, RowBlock& out) {
    read_halves(p, 1, out);
    read_signed(p + 4, out.codes);
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

struct FP4_16 : Codebook<kMxfp4Values> {
  static constexpr bool kHasOffset = false;
  static void read(const uint8_t* p, int64_t, RowBlock& out) {
    read_halves(p, 2, out);
    read_nibble_pairs(p + 4, out.codes);
  }
  static Scales scales(const RowBlock& block) {
    return {{half_to_float(block.halves[0]), half_to_float(block.halves[1])}, {}};
  }
};

struct Int4 : HalfScale {
  static constexpr bool kIsCodebook = false;
  static void read(const uint8_t* p, int64_t part, RowBlock& out) {
    read_halves(p, 1, out);
    out.factors[0] = p[2];
    read_nibble_pairs(p + 4 + 16 * part, out.codes);
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
