// Blocks of 32 columns as files have them: llama.cpp's formats (ggml-common.h).
#pragma once

#include <cstdint>
#include <cstring>

#include "packed.h"

namespace tgi::cpu::step {

// 32 columns of one row in a form that all formats share.
struct RowBlock {
  uint8_t codes[32];    // unsigned, zero point included
  uint16_t scale, min;  // fp16 of a plain block
  uint8_t factors[2];  // of a K-quant's block: scale and min, or the scales of both halves (signed)
};

// Block b of a file's row.
RowBlock read_block(Format format, const uint8_t* row, int64_t b);

inline uint16_t read16(const uint8_t* p) {
  uint16_t x;
  std::memcpy(&x, p, 2);
  return x;
}

float half_to_float(uint16_t h);

}  // namespace tgi::cpu::step
