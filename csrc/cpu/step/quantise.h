// Quantisation of weights while they are loaded.
#pragma once

#include <cstdint>

#include "formats.h"

namespace tgi::cpu::step {

// Quantises a row of float32 to the file's format, kQ8_0 or kQ4_0, rounding like llama.cpp's
// reference implementation. The last block is padded with zeros. Returns false if a value is too
// large or not finite.
bool quantise_row(Format format, const float* x, int64_t columns, uint8_t* out);

}  // namespace tgi::cpu::step
