// Weights and activations as the fast kernels read them: layouts and sizes, no arithmetic.
//
// Weights are stored in panels of 16 rows; two panels form a strip. A panel is a sequence of blocks
// of 32 columns. A block is a sequence of 64-byte vectors whose dword r belongs to row r, so one
// vector times one broadcast dword of the activation covers four columns of sixteen rows. Quantised
// blocks keep the file's codes and scales; nothing is rounded again.
//
// Activations are stored in tiles of as many tokens as the kernel set chooses, block by block, so
// that a kernel needs one base register.
#pragma once

#include <cstdint>

#include "formats.h"

namespace tgi::cpu::step {

constexpr int64_t kPanelRows = 16;
constexpr int64_t kStripRows = 32;
constexpr int64_t kBlockColumns = 32;

// Columns of a panel. The last block of floats is padded with zeros; blocks of codes are always
// whole.
constexpr int64_t padded_columns(int64_t columns) {
  return (columns + kBlockColumns - 1) / kBlockColumns * kBlockColumns;
}

// Offset of a block in its panel. Floats: [32 columns][16 rows]; bf16: [16 pairs of columns][16
// rows][2]. Codes are stored in planes of 8, 4, 2 or 1 bits; 5-bit codes use a 4-bit plane followed
// by a plane of the high bit. A plane of n bits has n vectors. Byte i of dword r of a vector
// belongs to these columns of row r:
//
//   8 bits   vector j: column 4j + i
//   4 bits   vector j: low half column 4j + i, high half column 16 + 4j + i
//   2 bits   vector v: bits 2n, 2n + 1 column 16v + 4n + i
//   1 bit    bit j: column 4j + i
//
// The block's fp16 numbers and bytes follow the codes, as [number][16 rows]; a header has the same
// layout.
constexpr int64_t block_offset(Format format, int64_t block) {
  const PanelInfo& panel = format_info(format).panel;
  const int64_t headers = panel.header_blocks ? block / panel.header_blocks + 1 : 0;
  return block * panel.block_bytes() + headers * panel.header_bytes();
}

// Offset of the header for a block; only for formats with headers.
constexpr int64_t header_offset(Format format, int64_t block) {
  const PanelInfo& panel = format_info(format).panel;
  const int64_t index = block / panel.header_blocks;
  return index * (panel.header_blocks * panel.block_bytes() + panel.header_bytes());
}

constexpr int64_t panel_bytes(Format format, int64_t columns) {
  const PanelInfo& panel = format_info(format).panel;
  const int64_t blocks = padded_columns(columns) / kBlockColumns;
  const int64_t headers = panel.header_blocks ? blocks / panel.header_blocks : 0;
  return blocks * panel.block_bytes() + headers * panel.header_bytes();
}

constexpr bool is_quantised(Format format) { return format_info(format).is_quantised; }

// A weight matrix in panels. Rows are padded with zeros to a whole strip.
struct PackedMatrix {
  const uint8_t* data;
  Format format;
  int64_t num_rows;     // as stored, a multiple of 32
  int64_t num_columns;  // padded to a multiple of 32 and of the file's block

  int64_t panel_size() const { return panel_bytes(format, num_columns); }
  int64_t num_strips() const { return num_rows / kStripRows; }
  const uint8_t* panel(int64_t index) const { return data + index * panel_size(); }
};

enum class Precision : int32_t { kInt8, kBF16, kFloat32 };

// A block of an int8 tile: values[tokens][32], then four adjacent numbers per token: d, s = d *
// sum, and two start values for the integer accumulators of formats with a zero point: -128 times
// the sum over the block and over its first half. A token thus touches two cache lines, and an
// aligned group of four tokens shares its lines with no others.
constexpr int64_t kTokenNumbers = 16;  // bytes
constexpr int64_t kTokenScale = 0;
constexpr int64_t kTokenSum = 4;
constexpr int64_t kTokenZero = 8;
constexpr int64_t kTokenZeroFirst = 12;

// Offset of these numbers in the block.
constexpr int64_t token_numbers(int64_t tile_tokens) { return tile_tokens * kBlockColumns; }

constexpr int64_t tile_block_bytes(Precision precision, int64_t tile_tokens) {
  return precision == Precision::kInt8
             ? (token_numbers(tile_tokens) + tile_tokens * kTokenNumbers + 63) / 64 * 64
         : precision == Precision::kBF16 ? tile_tokens * kBlockColumns * 2
                                         : tile_tokens * kBlockColumns * 4;
}

// Rows of `num_columns` values each, written by norm, attention or gate_up and read by the next
// product, in tiles of the kernel set's size. If prompt tokens use their own arithmetic, their rows
// are stored separately, in bf16 tiles.
struct Activation {
  uint8_t* data;  // consecutive tiles, 64-byte aligned
  Precision precision;
  int64_t num_columns;
  uint8_t* prompt_data;  // the same for prompt tokens, or null: they are stored with the others

  bool is_by_kind() const { return prompt_data != nullptr; }
  Activation of_prompts() const { return {prompt_data, Precision::kBF16, num_columns, nullptr}; }
  int64_t tile_bytes(int64_t tile_tokens) const {
    return num_columns / kBlockColumns * tile_block_bytes(precision, tile_tokens);
  }
  // A block in the tile that holds a token.
  uint8_t* block(int64_t token, int64_t block, int64_t tile_tokens) const {
    return data + token / tile_tokens * tile_bytes(tile_tokens) +
           block * tile_block_bytes(precision, tile_tokens);
  }
};

}  // namespace tgi::cpu::step
