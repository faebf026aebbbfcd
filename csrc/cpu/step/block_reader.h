// Rows of weights as files store them: 32 columns at a time in a form shared by all formats, whole
// rows as float32, and rows repacked for CUDA. These are plain functions of one row; callers
// distribute the rows.
#pragma once

#include <cstdint>
#include <cstring>

#include "formats.h"

namespace tgi::cpu::step {

// 32 columns of one row. Nothing is rounded: packed panels keep these numbers unchanged.
struct RowBlock {
  uint8_t codes[32];   // unsigned, including the zero point, or codebook indices
  uint16_t halves[2];  // fp16 scale and min, possibly shared by several blocks (F8 and IQ1 to IQ3:
                       // a float32)
  uint8_t factors[2];  // small scales and mins, interpreted by the format's reader
};

// Decodes a block: out [32], equal to the bit to ggml's dequantize_row_*.
void decode_block(Format format, const RowBlock& block, float* out);

// Decodes a row of any format to float32, equal to the bit to ggml's dequantize_row_*. `columns`
// must be a multiple of the block's.
void decode_row(Format format, const uint8_t* row, int64_t columns, float* out);

// Repacks a row of a quantised format for CUDA, see RepackedInfo: codes [columns * bits / 8],
// scales [columns / group_columns] float, or bytes if they are E8M0, and as many offsets. `offsets`
// may be null if the format has none. Codebook codes become their values + 128, except E2M1 codes.
void repack_row(Format format, const uint8_t* row, int64_t columns, uint8_t* codes, void* scales,
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

// Has no branches, so that loops over it are vectorised.
inline float half_to_float(uint16_t h) {
  const uint32_t magnitude = h & 0x7FFFu, exponent = magnitude >> 10;
  const float denormal = static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f;
  uint32_t bits;
  std::memcpy(&bits, &denormal, 4);
  const uint32_t normal = (magnitude << 13) + ((exponent == 31 ? 224u : 112u) << 23);
  return float_of_bits((exponent == 0 ? bits : normal) | (h & 0x8000u) << 16);
}

}  // namespace tgi::cpu::step
