// Conversion of a file's rows to packed panels and back. Packing happens once at load; unpacking
// for each embedding row that is looked up.
#pragma once

#include <cstdint>
#include <cstring>

#include "packed.h"
#include "shares.h"

namespace tgi::cpu::step {

// Packs panels [begin, end) of a matrix: row r of the result is the file's row at rows[r], or zeros
// if that is null. out is the whole matrix, [num_rows / 16] panels. Rows of floats may have any
// number of columns, and the padding after the last one is zero; rows of codes have whole blocks.
void pack_panels(Format format, int64_t columns, const uint8_t* const* rows, int64_t begin,
                 int64_t end, uint8_t* out);

// The same for all panels, by the team: each member packs those that it will read, so it is the
// first to touch their pages.
void pack_matrix(Format format, int64_t columns, const uint8_t* const* rows, int64_t num_rows,
                 const Shares& shares, uint8_t* out);

// Returns the nearest fp16, ties to even. Has no branches, so that loops over it are vectorised.
inline uint16_t float_to_half(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint32_t sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7FFFFFFFu;
  const uint32_t normal = (magnitude + 0xFFFu + (bits >> 13 & 1) - 0x38000000u) >> 13;
  // Adding 1/2 rounds to 2^-24, the last bit of a denormal fp16.
  float sum;
  std::memcpy(&sum, &magnitude, 4);
  sum += 0.5f;
  uint32_t denormal;
  std::memcpy(&denormal, &sum, 4);
  denormal -= 0x3F000000u;
  const uint32_t special = magnitude > 0x7F800000u ? 0x7E00u : 0x7C00u;
  const uint32_t finite = magnitude < 0x38800000u ? denormal : normal;                // below 2^-14
  return static_cast<uint16_t>(sign | (magnitude < 0x477FF000u ? finite : special));  // 65,520
}

// Unpacks a stored row to float32, times factor: out [num_columns].
void unpack_row(const PackedMatrix& weight, int64_t row, float factor, float* out);

}  // namespace tgi::cpu::step
