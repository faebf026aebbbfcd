// Readers of ggml's IQ1, IQ2 and IQ3 types, like those of block_formats.h. A file's code stands for
// four or eight weights (iq_grids.h). Read, each weight is an index into its format's codebook: its
// level, and above that its sign. IQ1 counts in eighths of its scale, so that each weight's shift
// by an eighth is part of its value.
#pragma once

#include "block_formats.h"
#include "iq_grids.h"

namespace tgi::cpu::step {

namespace {

// Eight levels of two bits as bytes.
constexpr uint64_t spread_pairs(uint64_t levels) {
  levels = (levels | levels << 24) & 0x000000FF000000FFu;
  levels = (levels | levels << 12) & 0x000F000F000F000Fu;
  return (levels | levels << 6) & 0x0303030303030303u;
}

// Twice four levels of three bits as bytes.
constexpr uint64_t spread_triples(uint64_t first, uint64_t second) {
  uint64_t levels = first | second << 32;
  levels = (levels | levels << 10) & 0x003F003F003F003Fu;
  return (levels | levels << 5) & 0x0707070707070707u;
}

// Seven bits of signs with an eighth, which makes the number of ones even.
inline uint8_t with_parity(uint32_t signs) {
  signs &= 127;
  return static_cast<uint8_t>(signs | static_cast<uint32_t>(__builtin_parity(signs)) << 7);
}

inline uint32_t read32(const uint8_t* p) {
  uint32_t x;
  std::memcpy(&x, p, 4);
  return x;
}

// Scales are small odd numbers times the float32 that a header has for each row.
inline uint8_t odd(uint32_t n) { return static_cast<uint8_t>(2 * n + 1); }

inline void write_unit(float unit, RowBlock& out) { std::memcpy(out.halves, &unit, 4); }

inline float read_unit(const RowBlock& block) {
  float unit;
  std::memcpy(&unit, block.halves, 4);
  return unit;
}

// One scale for 32 columns.
struct UnitScale {
  static constexpr bool kHasOffset = false;
  static Scales scales(const RowBlock& block) {
    const float scale = read_unit(block) * block.factors[0];
    return {{scale, scale}, {}};
  }
};

// One for each half.
struct UnitHalfScales {
  static constexpr bool kHasOffset = false;
  static Scales scales(const RowBlock& block) {
    const float unit = read_unit(block);
    return {{unit * block.factors[0], unit * block.factors[1]}, {}};
  }
};

// A scale's four bits above four times seven bits of signs.
struct IQ2_XXS : Codebook<kIq2Values>, UnitScale {
  static void read(const uint8_t* p, int64_t part, RowBlock& out) {
    write_unit(half_to_float(read16(p)) / 8, out);
    p += 2 + 8 * part;
    const uint32_t signs = read32(p + 4);
    out.factors[0] = odd(signs >> 28);
    for (int i = 0; i < 4; ++i)
      write64(spread_pairs(kIq2XxsGrid[p[i]]) | place_bits(with_parity(signs >> 7 * i), 3),
              out.codes + 8 * i);
  }
};

// Codes of nine bits below seven bits of signs.
struct IQ2_XS : Codebook<kIq2Values>, UnitHalfScales {
  static void read(const uint8_t* p, int64_t part, RowBlock& out) {
    write_unit(half_to_float(read16(p)) / 8, out);
    out.factors[0] = odd(p[66 + part] & 15);
    out.factors[1] = odd(p[66 + part] >> 4);
    for (int i = 0; i < 4; ++i) {
      const uint32_t code = read16(p + 2 + 8 * part + 2 * i);
      write64(spread_pairs(kIq2XsGrid[code & 511]) | place_bits(with_parity(code >> 9), 3),
              out.codes + 8 * i);
    }
  }
};

// Eight bits of four codes, their signs, and elsewhere two more bits of each code.
struct IQ2_S : Codebook<kIq2Values>, UnitHalfScales {
  static void read(const uint8_t* p, int64_t part, RowBlock& out) {
    write_unit(half_to_float(read16(p)) / 8, out);
    out.factors[0] = odd(p[74 + part] & 15);
    out.factors[1] = odd(p[74 + part] >> 4);
    for (int i = 0; i < 4; ++i) {
      const int code = p[2 + 4 * part + i] | (p[66 + part] >> 2 * i & 3) << 8;
      write64(spread_pairs(kIq2SGrid[code]) | place_bits(p[34 + 4 * part + i], 3),
              out.codes + 8 * i);
    }
  }
};

struct IQ3_XXS : Codebook<kIq3XxsValues>, UnitScale {
  static void read(const uint8_t* p, int64_t part, RowBlock& out) {
    write_unit(half_to_float(read16(p)) / 4, out);
    const uint32_t signs = read32(p + 66 + 4 * part);
    out.factors[0] = odd(signs >> 28);
    p += 2 + 8 * part;
    for (int i = 0; i < 4; ++i) {
      const uint64_t levels = spread_triples(kIq3XxsGrid[p[2 * i]], kIq3XxsGrid[p[2 * i + 1]]);
      write64(levels | place_bits(with_parity(signs >> 7 * i), 3), out.codes + 8 * i);
    }
  }
};

struct IQ3_S : Codebook<kIq3SValues>, UnitScale {
  static void read(const uint8_t* p, int64_t part, RowBlock& out) {
    write_unit(half_to_float(read16(p)), out);
    out.factors[0] = odd(p[106 + part / 2] >> part % 2 * 4 & 15);
    for (int i = 0; i < 4; ++i) {
      const auto entry = [&](int64_t k) {
        return kIq3SGrid[p[2 + 8 * part + k] | (p[66 + part] >> k & 1) << 8];
      };
      write64(spread_triples(entry(2 * i), entry(2 * i + 1)) | place_bits(p[74 + 4 * part + i], 3),
              out.codes + 8 * i);
    }
  }
};

// All 32 columns are shifted in the same direction.
struct IQ1_S : Codebook<kIq1Values>, UnitScale {
  static void read(const uint8_t* p, int64_t part, RowBlock& out) {
    write_unit(half_to_float(read16(p)) / 8, out);
    const int high = read16(p + 34 + 2 * part);
    out.factors[0] = odd(static_cast<uint32_t>(high >> 12 & 7));
    const uint64_t shift = static_cast<uint64_t>(high >> 15) << 2;
    for (int i = 0; i < 4; ++i) {
      const int code = p[2 + 4 * part + i] | (high >> 3 * i & 7) << 8;
      write64(spread_pairs(kIq1Grid[code]) | shift * kEachByte, out.codes + 8 * i);
    }
  }
};

// Eight columns are. The scale is spread over the high bits of four words of scales.
struct IQ1_M : Codebook<kIq1Values>, UnitHalfScales {
  static void read(const uint8_t* p, int64_t part, RowBlock& out) {
    const auto word = [&](int64_t i) { return static_cast<uint32_t>(read16(p + 48 + 2 * i)); };
    const uint32_t scale =
        word(0) >> 12 | word(1) >> 12 << 4 | word(2) >> 12 << 8 | word(3) >> 12 << 12;
    write_unit(half_to_float(static_cast<uint16_t>(scale)) / 8, out);
    for (int64_t half = 0; half < 2; ++half)
      out.factors[half] = odd(word(part / 2) >> (part % 2 * 6 + 3 * half) & 7);
    for (int i = 0; i < 4; ++i) {
      const int high = p[32 + 2 * part + i / 2] >> i % 2 * 4;
      const int code = p[4 * part + i] | (high & 7) << 8;
      const uint64_t shift = high >> 1 & 4;
      write64(spread_pairs(kIq1Grid[code]) | shift * kEachByte, out.codes + 8 * i);
    }
  }
};

}  // namespace
}  // namespace tgi::cpu::step
