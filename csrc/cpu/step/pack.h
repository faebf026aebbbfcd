// From a file's rows to packed panels and back. Done once at load, and for each row of the
// embedding.
#pragma once

#include <cstdint>

#include "packed.h"
#include "shares.h"

namespace tgi::cpu::step {

// Packs panels [begin, end) of a matrix: row r of the result is the file's row at rows[r], zeros
// where that is null. out is the whole matrix, [num_rows / 16] panels. Rows of floats have any
// number of columns, those behind the last one are zero; of codes they have whole blocks.
void pack_panels(Format format, int64_t columns, const uint8_t* const* rows, int64_t begin,
                 int64_t end, uint8_t* out);

// The same of all panels, by the team: each member packs those that it will read, so that it is the
// first to touch their pages.
void pack_matrix(Format format, int64_t columns, const uint8_t* const* rows, int64_t num_rows,
                 const Shares& shares, uint8_t* out);

// Quantises a row of float32 to the file's format, kQ8_0 or kQ4_0, rounding as llama.cpp's
// reference does. The last block is filled up with zeros. False: a value is not finite, or too
// large.
bool quantise_row(Format format, const float* x, int64_t columns, uint8_t* out);

// The nearest fp16, ties to even.
uint16_t float_to_half(float x);

// A stored row as float32, times factor: out [num_columns].
void unpack_row(const PackedMatrix& weight, int64_t row, float factor, float* out);

}  // namespace tgi::cpu::step
