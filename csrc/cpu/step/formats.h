// The properties of each weight format: csrc/formats.def as an enum and a table, for both devices
// and the bindings. block_reader.h and linear_formats.h define how a format's bytes are read.
#pragma once

#include <cstdint>
#include <string_view>

namespace tgi::cpu::step {

enum class Format : int32_t {
#define TGI_FORMAT(name, ...) k##name,
#include "../../formats.def"
};

// A header with a codebook: sixteen float32, one per row, then the codebook's sixteen values.
// Formats that differ only in these share their kernels.
constexpr int64_t kBookValues = 64;  // offset
constexpr int64_t kBookBytes = kBookValues + 16;

// A panel of 16 rows on the CPU, see packed.h: blocks of 32 columns, with a header before every
// `header_blocks` blocks. In addition to the codes, each row has fp16 numbers and bytes in its
// blocks or in its headers.
struct PanelInfo {
  int32_t code_bits;  // 0: the CPU has no panels of this format
  int32_t block_halves, block_factors;
  int32_t header_halves, header_factors;
  int32_t header_blocks;  // blocks per header, 0: no headers
  bool has_book;          // whether headers have a codebook

  constexpr int64_t block_bytes() const {
    return 64 * code_bits + 16 * (2 * block_halves + block_factors);
  }
  constexpr int64_t header_bytes() const {
    return 16 * (2 * header_halves + header_factors) + (has_book ? kBookBytes : 0);
  }
};

// Rows for CUDA: weight = scale * (code - zero) + offset, with one scale and offset per group of
// columns. Codes of 8 bits are in column order. Of 4 bits, each eight are a 32-bit word, from the
// lowest nibble on those of columns 0 2 4 6 1 3 5 7: neighbours lie 16 bits apart.
struct RepackedInfo {
  int32_t bits;           // 4 or 8; 0: floats, which are not repacked
  int32_t zero;           // 0 with offsets
  int64_t group_columns;  // columns that share a scale
  bool has_offsets;
  bool has_half_scales;  // fp16 can represent the scales and offsets
  bool is_float8;        // codes are E4M3 numbers
  bool is_float4;        // codes are E2M1 numbers, scales E8M0: a byte each, 2^(byte - 127)
};

struct FormatInfo {
  const char* name;
  int32_t ggml_type;      // -1: not a GGUF format
  int64_t block_columns;  // of a block in a file
  int64_t block_bytes;
  bool is_quantised;  // codes and scales, which a CPU's kernel multiplies by int8 activations
  bool has_kernel;    // the CPU has a kernel for it
  PanelInfo panel;
  RepackedInfo repacked;
};

namespace table {

enum RepackedKind { kHalfScales, kFloatScales, kFloat8, kFloat4 };

constexpr PanelInfo Panel(int32_t bits = 0, int32_t block_halves = 0, int32_t block_factors = 0,
                          int32_t header_halves = 0, int32_t header_factors = 0,
                          int32_t header_blocks = 0) {
  return {bits, block_halves, block_factors, header_halves, header_factors, header_blocks, false};
}

constexpr PanelInfo Booked(int32_t block_factors) { return {4, 0, block_factors, 0, 0, 8, true}; }

constexpr RepackedInfo Repacked() { return {}; }

constexpr RepackedInfo Repacked(int32_t bits, int32_t zero, int64_t group, bool has_offsets,
                                RepackedKind kind) {
  return {bits, zero, group, has_offsets, kind == kHalfScales, kind == kFloat8, kind == kFloat4};
}

inline constexpr FormatInfo kInfos[] = {
#define TGI_FLOAT_FORMAT(name, type, columns, bytes, panel, repacked) \
  {#name, type, columns, bytes, false, true, panel, repacked},
#define TGI_CODE_FORMAT(name, type, columns, bytes, panel, repacked) \
  {#name, type, columns, bytes, true, true, panel, repacked},
#define TGI_DECODED_FORMAT(name, type, columns, bytes, panel, repacked) \
  {#name, type, columns, bytes, true, false, panel, repacked},
#include "../../formats.def"
};

}  // namespace table

constexpr int kNumFormats = sizeof(table::kInfos) / sizeof(FormatInfo);

constexpr const FormatInfo& format_info(Format format) {
  return table::kInfos[static_cast<int>(format)];
}

// Finds a format by its name; returns false if there is none.
bool find_format(std::string_view name, Format* out);

// Bytes of a row of `columns` values in a file; `columns` is a multiple of the block's.
constexpr int64_t file_row_bytes(Format format, int64_t columns) {
  const FormatInfo& info = format_info(format);
  return columns / info.block_columns * info.block_bytes;
}

// Codebooks: the sixteen values that nibbles of IQ4_NL and IQ4_XS, or of MXFP4 (doubled E2M1),
// represent; or a level of IQ1 to IQ3 below the sign (of IQ1: of the shift, in eighths).
inline constexpr int8_t kIq4Values[16] = {-127, -104, -83, -65, -49, -35, -22, -10,
                                          1,    13,   25,  38,  53,  69,  89,  113};
inline constexpr int8_t kMxfp4Values[16] = {0, 1,  2,  3,  4,  6,  8,  12,
                                            0, -1, -2, -3, -4, -6, -8, -12};
inline constexpr int8_t kIq1Values[16] = {-7, 1, 9, 0, -9, -1, 7, 0, 0, 0, 0, 0, 0, 0, 0, 0};
inline constexpr int8_t kIq2Values[16] = {8, 25, 43, 0, 0, 0, 0, 0, -8, -25, -43, 0, 0, 0, 0, 0};
inline constexpr int8_t kIq3XxsValues[16] = {4,  12,  20,  28,  36,  44,  52,  62,
                                             -4, -12, -20, -28, -36, -44, -52, -62};
inline constexpr int8_t kIq3SValues[16] = {1,  3,  5,  7,  9,  11,  13,  15,
                                           -1, -3, -5, -7, -9, -11, -13, -15};

}  // namespace tgi::cpu::step
