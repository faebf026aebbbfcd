// Rows of weights as files have them: 32 columns at a time in a form that all formats share, whole
// rows as float32, and rows repacked for CUDA. Plain functions of one row: callers share rows out.
#pragma once

#include <cstdint>
#include <cstring>

#include "formats.h"

namespace tgi::cpu::step {

// 32 columns of one row. Nothing is rounded: packed panels keep these numbers as they are.
struct RowBlock {
  uint8_t codes[32];   // unsigned, zero point included, or indices of a codebook
  uint16_t halves[2];  // fp16 scale and min, of the block or of all that share them (F8: a float32)
  uint8_t factors[2];  // small scales and mins, as the format's reader understands them
};

// Columns [32 * block, 32 * block + 32) of a row of a quantised format.
void read_block(Format format, const uint8_t* row, int64_t block, RowBlock* out);

// What they mean: out [32], equal to the bit to ggml's dequantize_row_*.
void decode_block(Format format, const RowBlock& block, float* out);

// A row of any format as float32, equal to the bit to ggml's dequantize_row_*. `columns` must be a
// multiple of the block's.
void decode_row(Format format, const uint8_t* row, int64_t columns, float* out);

// A row of a quantised format for CUDA, see RepackedInfo: codes [columns * bits / 8], scales and
// offsets [columns / group_columns]. `offsets` may be null where the format has none. Codes of
// codebooks are their values + 128.
void repack_row(Format format, const uint8_t* row, int64_t columns, uint8_t* codes, float* scales,
                float* offsets);

inline uint16_t read16(const uint8_t* p) {
  uint16_t x;
  std::memcpy(&x, p, 2);
  return x;
}

inline float float_of_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

// Without branches, so that loops over it become vectors.
inline float half_to_float(uint16_t h) {
  const uint32_t magnitude = h & 0x7FFFu, exponent = magnitude >> 10;
  const float denormal = static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f;
  uint32_t bits;
  std::memcpy(&bits, &denormal, 4);
  const uint32_t normal = (magnitude << 13) + ((exponent == 31 ? 224u : 112u) << 23);
  return float_of_bits((exponent == 0 ? bits : normal) | (h & 0x8000u) << 16);
}

}  // namespace tgi::cpu::step
