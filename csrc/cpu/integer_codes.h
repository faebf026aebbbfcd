// Integer codes as quantised safetensors pack them: brought into the order of rows and columns, and
// decoded. Nibbles are two to a byte. These are plain functions of a range of rows; callers
// distribute the rows. tgi_asgi/formats/codes.py describes the packings.
#pragma once

#include <cstdint>

namespace tgi::cpu {

// Writes rows [begin, end) of the transpose of words [height][width], which may be unaligned:
// out [width][height].
void transpose_words(const uint8_t* words, int64_t height, int64_t width, int64_t begin,
                     int64_t end, uint8_t* out);

// Undoes AutoAWQ's packing. words [columns][width]: each has the codes of eight rows, and may be
// unaligned. Writes the rows of words [begin, end): out [8 * width][columns / 2] nibbles, the first
// of two columns in the low half. `columns` is even.
void unpack_awq(const uint8_t* words, int64_t columns, int64_t width, int64_t begin, int64_t end,
                uint8_t* out);

// Unpacks a stream of codes of 1 to 8 bits in a row of `size` bytes, the lowest bits first:
// out [size * 8 / bits].
void unpack_stream(const uint8_t* row, int64_t size, int bits, uint8_t* out);

// Writes the nibbles at `order` of a row: out[i] = row[order[i]], for an even number of columns.
void reorder_nibbles(const uint8_t* row, const int64_t* order, int64_t columns, uint8_t* out);

// Decodes a row of codes of 4 or 8 bits, the first of two nibbles in the low half:
// out[c] = scales[groups[c]] * (code c - zeros[groups[c]]), each rounded once.
void dequantise_row(const uint8_t* codes, int bits, const float* scales, const uint8_t* zeros,
                    const int64_t* groups, int64_t columns, float* out);

// Decodes numbers [begin, end) of a stream of nibbles: out[i] = table[nibble i] * scales[i / run].
void decode_nibbles(const uint8_t* nibbles, bool is_high_first, const float* table,
                    const float* scales, int64_t run, int64_t begin, int64_t end, float* out);

}  // namespace tgi::cpu
