// Weights and activations as the fast kernels read them: layouts and sizes, no arithmetic.
//
// Weights lie in panels of 16 rows; two panels are a strip, the unit of work. A panel is a sequence
// of blocks of 32 columns, a block a sequence of 64-byte vectors whose dword r belongs to row r, so
// that one vector times one broadcast dword of the activation is four columns of sixteen rows.
// Quantised blocks keep the file's own codes and scales; nothing is rounded again.
//
// Activations lie in tiles of six tokens, block by block, so that a kernel has one base register.
#pragma once

#include <cstdint>

namespace tgi::cpu::step {

constexpr int64_t kPanelRows = 16;
constexpr int64_t kStripRows = 32;
constexpr int64_t kBlockColumns = 32;
constexpr int64_t kSuperBlock = 8;  // blocks that share a K-quant's fp16 scales
constexpr int64_t kTileTokens = 6;

enum class Format : int32_t {
  kF32,
  kF16,
  kBF16,
  kQ8_0,
  kQ4_0,
  kQ4_1,
  kQ5_0,
  kQ5_1,
  kQ4_K,
  kQ5_K,
  kQ6_K
};
constexpr int kNumFormats = 11;

// Bytes of a panel's block, and of the header before each eight blocks (K-quants only).
struct PanelLayout {
  int64_t block_bytes;
  int64_t header_bytes;
};

constexpr PanelLayout panel_layout(Format format) {
  switch (format) {
    case Format::kF32:
      return {2048, 0};  // [32 columns][16 rows]
    case Format::kF16:
      return {1024, 0};  // [32][16]
    case Format::kBF16:
      return {1024, 0};  // [16 pairs of columns][16 rows][2]
    case Format::kQ8_0:
      return {512 + 32, 0};  // 8 vectors of q + 128, 16 fp16 scales
    case Format::kQ4_0:
      return {256 + 32, 0};  // 4 vectors of nibbles (low: columns 4j.., high: 16+4j..), scales
    case Format::kQ4_1:
      return {256 + 64, 0};  // the same, scales, mins
    case Format::kQ5_0:
      return {256 + 64 + 32, 0};  // nibbles, fifth bits (bit j of byte i: column 4j+i), scales
    case Format::kQ5_1:
      return {256 + 64 + 64, 0};  // the same, mins
    case Format::kQ4_K:
      return {256 + 32, 64};  // nibbles, 16 u8 scales, 16 u8 mins; header: 16 fp16 d, dmin
    case Format::kQ5_K:
      return {256 + 64 + 32, 64};  // nibbles, fifth bits, u8 scales and mins; the same header
    case Format::kQ6_K:
      return {256 + 128 + 32, 32};  // nibbles, 2 vectors of high bits, 2 x 16 i8 scales; 16 fp16 d
  }
  return {0, 0};
}

constexpr int64_t block_offset(Format format, int64_t block) {
  const PanelLayout layout = panel_layout(format);
  const int64_t headers = layout.header_bytes ? block / kSuperBlock + 1 : 0;
  return block * layout.block_bytes + headers * layout.header_bytes;
}

constexpr int64_t panel_bytes(Format format, int64_t columns) {
  const PanelLayout layout = panel_layout(format);
  const int64_t blocks = columns / kBlockColumns;
  return blocks * layout.block_bytes + blocks / kSuperBlock * layout.header_bytes;
}

constexpr bool is_quantised(Format format) {
  return static_cast<int>(format) >= static_cast<int>(Format::kQ8_0);
}

// A weight matrix in panels; rows are padded with zeros to a whole strip.
struct PackedMatrix {
  const uint8_t* data;
  Format format;
  int64_t num_rows;     // as stored, a multiple of 32
  int64_t num_columns;  // a multiple of 32; of 256 for K-quants

  int64_t panel_size() const { return panel_bytes(format, num_columns); }
  int64_t num_strips() const { return num_rows / kStripRows; }
  const uint8_t* panel(int64_t index) const { return data + index * panel_size(); }
};

enum class Precision : int32_t { kInt8, kBF16, kFloat32 };

// A block of an int8 tile: values[6][32], then of each token d, s = d * sum, and two start values
// of the integer accumulators of formats with a zero point: -128 times the sum over the block and
// over its first half.
constexpr int64_t kTileScale = 192;
constexpr int64_t kTileSum = 216;
constexpr int64_t kTileZero = 240;
constexpr int64_t kTileZeroFirst = 264;

constexpr int64_t tile_block_bytes(Precision precision) {
  return precision == Precision::kInt8   ? 320
         : precision == Precision::kBF16 ? 6 * 32 * 2
                                         : 6 * 32 * 4;
}

// Rows of `num_columns` values each, written by norm, attention or gate_up, read by the next
// product.
struct Activation {
  uint8_t* data;  // tile after tile, 64-byte aligned
  Precision precision;
  int64_t num_columns;

  int64_t tile_bytes() const { return num_columns / kBlockColumns * tile_block_bytes(precision); }
  uint8_t* tile(int64_t index) const { return data + index * tile_bytes(); }
  uint8_t* block(int64_t token, int64_t block) const {
    return tile(token / kTileTokens) + block * tile_block_bytes(precision);
  }
};

}  // namespace tgi::cpu::step
