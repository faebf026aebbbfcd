#include "pack.h"

#include <algorithm>
#include <cstring>
#include <iterator>

#include "block_formats.h"
#include "iq_formats.h"
#include "planes.h"

namespace tgi::cpu::step {

namespace {

// Writes and reads row r's numbers, stored as [number][16 rows].
inline void write_numbers(const RowBlock& from, int32_t halves, int32_t factors, int64_t r,
                          uint8_t* out) {
  for (int32_t i = 0; i < halves; ++i, out += 32) std::memcpy(out + 2 * r, &from.halves[i], 2);
  for (int32_t i = 0; i < factors; ++i, out += 16) out[r] = from.factors[i];
}

void read_numbers(const uint8_t* p, int32_t halves, int32_t factors, int64_t r, RowBlock& out) {
  for (int32_t i = 0; i < halves; ++i, p += 32) std::memcpy(&out.halves[i], p + 2 * r, 2);
  for (int32_t i = 0; i < factors; ++i, p += 16) out.factors[i] = p[r];
}

// Index of column k of row r among a panel's floats.
constexpr int64_t float_place(Format format, int64_t k, int64_t r) {
  return format == Format::kBF16 ? (k / 2 * 16 + r) * 2 + k % 2 : k * 16 + r;
}

// How columns [begin, end) of row r are packed: those of one block in the file, or floats of one
// block of the panel.
template <class Reader, Format format>
struct Codes {
  // Inlined, GCC would read codes as vectors that were just written by halves, which stalls: 14 ns
  // for 32 codes of Q4_K instead of 6.
  [[gnu::noinline]] static void pack(const uint8_t* row, int64_t begin, int64_t, int64_t r,
                                     uint8_t* panel) {
    constexpr FormatInfo kInfo = format_info(format);
    constexpr PanelInfo kPanel = kInfo.panel;
    constexpr int64_t kParts = kInfo.block_columns / kBlockColumns;
    static_assert(kPanel.header_blocks == 0 || kPanel.header_blocks == kParts,
                  "a header belongs to one block of the file");
    const uint8_t* const from = row + begin / kInfo.block_columns * kInfo.block_bytes;
    const int64_t first = begin / kBlockColumns;
#pragma GCC unroll 8
    for (int64_t part = 0; part < kParts; ++part) {
      RowBlock columns;
      Reader::read(from, part, columns);
      uint8_t* const to = panel + block_offset(format, first + part);
      write_codes<kPanel.code_bits>(columns.codes, r, to);
      write_numbers(columns, kPanel.block_halves, kPanel.block_factors, r,
                    to + 64 * kPanel.code_bits);
      if (kPanel.header_blocks != 0 && part == 0) {
        uint8_t* const header = panel + header_offset(format, first);
        write_numbers(columns, kPanel.header_halves, kPanel.header_factors, r, header);
        if constexpr (kPanel.has_book) {
          std::memcpy(header + 4 * r, columns.halves, 4);
          std::memcpy(header + kBookValues, Reader::kValues, 16);
        }
      }
    }
  }
};

template <Format format>
struct Floats {
  static void pack(const uint8_t* row, int64_t begin, int64_t end, int64_t r, uint8_t* panel) {
    constexpr int64_t kBytes = format_info(format).block_bytes;
    // Columns that lie side by side in the panel; `begin` is a multiple of it.
    constexpr int64_t kWidth = format == Format::kBF16 ? 2 : 1;
    int64_t k = begin;
    for (; k + kWidth <= end; k += kWidth)
      std::memcpy(panel + float_place(format, k, r) * kBytes, row + k * kBytes, kWidth * kBytes);
    if (k < end) std::memcpy(panel + float_place(format, k, r) * kBytes, row + k * kBytes, kBytes);
  }
};

// `pack_panels` for one format, so that the compiler knows all offsets and shifts: a model's start
// waits for this.
template <Format format, class Columns>
void pack_panels_of(int64_t columns, const uint8_t* const* rows, int64_t begin, int64_t end,
                    uint8_t* out) {
  constexpr int64_t kWidth = std::max(format_info(format).block_columns, kBlockColumns);
  const int64_t size = panel_bytes(format, columns);
  for (int64_t panel = begin; panel < end; ++panel) {
    uint8_t* const target = out + panel * size;
    std::memset(target, 0, static_cast<size_t>(size));
    // The inner loop is over rows, so that the blocks of the panel stay in L1.
    for (int64_t k = 0; k < columns; k += kWidth) {
      for (int64_t r = 0; r < kPanelRows; ++r) {
        const uint8_t* const row = rows[panel * kPanelRows + r];
        if (row != nullptr) Columns::pack(row, k, std::min(k + kWidth, columns), r, target);
      }
    }
  }
}

constexpr decltype(&pack_panels_of<Format::kF32, Floats<Format::kF32>>) kPackPanels[] = {
#define TGI_FLOAT_FORMAT(name, ...) pack_panels_of<Format::k##name, Floats<Format::k##name>>,
#define TGI_CODE_FORMAT(name, ...) pack_panels_of<Format::k##name, Codes<name, Format::k##name>>,
#define TGI_DECODED_FORMAT(...) nullptr,
#include "../../formats.def"
};
static_assert(std::size(kPackPanels) == kNumFormats, "one row a format");

void unpack_float_row(const PackedMatrix& weight, const uint8_t* panel, int64_t r, float factor,
                      float* out) {
  for (int64_t k = 0; k < weight.num_columns; ++k) {
    const int64_t at = float_place(weight.format, k, r);
    float x;
    if (weight.format == Format::kF32) {
      std::memcpy(&x, panel + at * 4, 4);
    } else if (weight.format == Format::kF16) {
      x = half_to_float(read16(panel + at * 2));
    } else {
      x = float_of_bits(static_cast<uint32_t>(read16(panel + at * 2)) << 16);
    }
    out[k] = x * factor;
  }
}

}  // namespace

void pack_panels(Format format, int64_t columns, const uint8_t* const* rows, int64_t begin,
                 int64_t end, uint8_t* out) {
  kPackPanels[static_cast<int>(format)](columns, rows, begin, end, out);
}

void pack_matrix(Format format, int64_t columns, const uint8_t* const* rows, int64_t num_rows,
                 const Shares& shares, uint8_t* out) {
  const auto pack = [&](int member, int num_members) {
    const Range strips = shares.of(num_rows / kStripRows, member, num_members);
    pack_panels(format, columns, rows, 2 * strips.begin, 2 * strips.end, out);
  };
  run_on_team(pack, Members::kAll);
}

void unpack_row(const PackedMatrix& weight, int64_t row, float factor, float* out) {
  const uint8_t* panel = weight.panel(row / kPanelRows);
  const int64_t r = row % kPanelRows;
  if (!is_quantised(weight.format)) return unpack_float_row(weight, panel, r, factor, out);
  const PanelInfo& info = format_info(weight.format).panel;
  RowBlock from = {};
  for (int64_t b = 0; b < weight.num_columns / kBlockColumns; ++b, out += kBlockColumns) {
    const uint8_t* block = panel + block_offset(weight.format, b);
    read_codes(info.code_bits, block, r, from.codes);
    read_numbers(block + 64 * info.code_bits, info.block_halves, info.block_factors, r, from);
    if (info.header_blocks != 0) {
      const uint8_t* const header = panel + header_offset(weight.format, b);
      read_numbers(header, info.header_halves, info.header_factors, r, from);
      if (info.has_book) std::memcpy(from.halves, header + 4 * r, 4);
    }
    decode_block(weight.format, from, out);
    for (int k = 0; k < kBlockColumns; ++k) out[k] *= factor;
  }
}

}  // namespace tgi::cpu::step
