#include "integer_codes.h"

#include <algorithm>
#include <cstring>

#include "platform.h"

namespace tgi::cpu {

namespace {

constexpr int64_t kLineWords = 16;  // 32-bit words in a cache line

// The row, among eight, of each nibble of a word, the lowest first; also known to formats/codes.py.
constexpr int64_t kAwqRows[8] = {0, 2, 4, 6, 1, 3, 5, 7};

uint32_t read_word(const uint8_t* words, int64_t at) {
  uint32_t word;
  std::memcpy(&word, words + 4 * at, 4);
  return word;
}

uint8_t nibble_at(const uint8_t* nibbles, int64_t i) { return nibbles[i / 2] >> i % 2 * 4 & 15; }

}  // namespace

void transpose_words(const uint8_t* words, int64_t height, int64_t width, int64_t begin,
                     int64_t end, uint8_t* out) {
  // A tile of whole lines on both sides, which goes through a buffer: the lines of its rows are
  // often a multiple of 4 KiB apart, and would displace each other from L1.
  uint32_t tile[kLineWords][kLineWords];
  for (int64_t column = begin; column < end; column += kLineWords) {
    const int64_t columns = std::min(kLineWords, end - column);
    for (int64_t row = 0; row < height; row += kLineWords) {
      const int64_t rows = std::min(kLineWords, height - row);
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t c = 0; c < columns; ++c)
          tile[c][r] = read_word(words, (row + r) * width + column + c);
      }
      for (int64_t c = 0; c < columns; ++c)
        std::memcpy(out + 4 * ((column + c) * height + row), tile[c],
                    4 * static_cast<size_t>(rows));
    }
  }
}

void unpack_awq(const uint8_t* words, int64_t columns, int64_t width, int64_t begin, int64_t end,
                uint8_t* out) {
  constexpr int64_t kLineColumns = 128;  // a line of a row's nibbles
  constexpr uint32_t kLow = 0x0F0F0F0Fu;
  for (int64_t first = begin; first < end; first += kLineWords) {
    const int64_t last = std::min(first + kLineWords, end);
    for (int64_t start = 0; start < columns; start += kLineColumns) {
      const int64_t stop = std::min(start + kLineColumns, columns);
      for (int64_t w = first; w < last; ++w) {
        for (int64_t c = start; c < stop; c += 2) {
          const uint32_t one = read_word(words, c * width + w),
                         two = read_word(words, (c + 1) * width + w);
          // Byte i of `even` holds nibble 2i of both columns, that of `odd` nibble 2i + 1.
          const uint32_t even = (one & kLow) | (two & kLow) << 4;
          const uint32_t odd = (one >> 4 & kLow) | (two & ~kLow);
          for (int i = 0; i < 8; ++i) {
            const uint32_t pair = (i % 2 == 0 ? even : odd) >> i / 2 * 8;
            out[((8 * w + kAwqRows[i]) * columns + c) / 2] = static_cast<uint8_t>(pair);
          }
        }
      }
    }
  }
}

void unpack_stream(const uint8_t* row, int64_t size, int bits, uint8_t* out) {
  const int mask = (1 << bits) - 1;
  for (int64_t i = 0; i < size * 8 / bits; ++i) {
    const int64_t bit = i * bits, byte = bit / 8;
    const int next = byte + 1 < size ? row[byte + 1] : 0;
    out[i] = static_cast<uint8_t>((row[byte] | next << 8) >> bit % 8 & mask);
  }
}

void reorder_nibbles(const uint8_t* row, const int64_t* order, int64_t columns, uint8_t* out) {
  for (int64_t i = 0; i < columns; i += 2) {
    const int low = nibble_at(row, order[i]), high = nibble_at(row, order[i + 1]);
    out[i / 2] = static_cast<uint8_t>(low | high << 4);
  }
}

void dequantise_row(const uint8_t* codes, int bits, const float* scales, const uint8_t* zeros,
                    const int64_t* groups, int64_t columns, float* out) {
  const KeepDenormals exact;  // the team's threads flush denormals
  for (int64_t c = 0; c < columns; ++c) {
    const int code = bits == 4 ? nibble_at(codes, c) : codes[c];
    const int64_t group = groups[c];
    out[c] = static_cast<float>(code - zeros[group]) * scales[group];
  }
}

void decode_nibbles(const uint8_t* nibbles, bool is_high_first, const float* table,
                    const float* scales, int64_t run, int64_t begin, int64_t end, float* out) {
  const KeepDenormals exact;
  const int64_t flip = is_high_first ? 1 : 0;
  for (int64_t i = begin; i < end;) {
    const float scale = scales[i / run];
    for (const int64_t stop = std::min((i / run + 1) * run, end); i < stop; ++i)
      out[i] = table[nibble_at(nibbles, i ^ flip)] * scale;
  }
}

}  // namespace tgi::cpu
