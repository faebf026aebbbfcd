// The functions of block_reader.h, built from the readers of block_formats.h.
#include "block_reader.h"

#include "../platform.h"
#include "block_formats.h"
#include "iq_formats.h"

namespace tgi::cpu::step {

namespace {

// The functions of one format, built from its reader.
template <class Reader, Format format>
struct Rows {
  static constexpr const FormatInfo& kInfo = format_info(format);

  static void read(const uint8_t* row, int64_t b, RowBlock& out) {
    constexpr int64_t kParts = kInfo.block_columns / 32;
    Reader::read(row + b / kParts * kInfo.block_bytes, b % kParts, out);
  }

  static void decode(const RowBlock& block, float* out) {
    const Scales scales = Reader::scales(block);
    for (int half = 0; half < 2; ++half) {
      for (int i = 16 * half; i < 16 * half + 16; ++i) {
        const float weight = scales.scale[half] * Reader::value(block, i);
        out[i] = Reader::kHasOffset ? weight + scales.offset[half] : weight;
      }
    }
  }

  static void decode_row(const uint8_t* row, int64_t columns, float* out) {
    RowBlock block;
    for (int64_t b = 0; b < columns / 32; ++b) {
      read(row, b, block);
      decode(block, out + 32 * b);
    }
  }

  static void repack_row(const uint8_t* row, int64_t columns, uint8_t* codes, void* scales,
                         float* offsets) {
    constexpr RepackedInfo kTo = kInfo.repacked;
    constexpr int64_t kGroup = kTo.group_columns;
    RowBlock block;
    for (int64_t b = 0; b < columns / 32; ++b) {
      read(row, b, block);
      if (Reader::kIsCodebook && !kTo.is_float4) {
        for (int i = 0; i < 32; ++i)
          block.codes[i] = static_cast<uint8_t>(static_cast<int>(Reader::value(block, i)) + 128);
      }
      if (kTo.bits == 8) {
        std::memcpy(codes + 32 * b, block.codes, 32);
      } else {
        for (int i = 0; i < 16; ++i) {  // of a word's bytes: codes 0 2, 4 6, 1 3, 5 7
          const int first = i / 4 * 8 + i % 2 * 4 + i / 2 % 2;
          codes[16 * b + i] =
              static_cast<uint8_t>(block.codes[first] | block.codes[first + 2] << 4);
        }
      }
      if (kTo.is_float4) {  // a block is a group, and its factor the exponent
        static_cast<uint8_t*>(scales)[b] = block.factors[0];
        continue;
      }
      if (32 * b % kGroup != 0) continue;
      const Scales from = Reader::scales(block);
      for (int64_t half = 0; half < (kGroup == 16 ? 2 : 1); ++half) {
        const int64_t group = 32 * b / kGroup + half;
        static_cast<float*>(scales)[group] = from.scale[half];
        if (!kTo.has_offsets) continue;
        // Only INT4 has no offset of its own: its zero point comes from the row.
        offsets[group] = Reader::kHasOffset
                             ? from.offset[half]
                             : from.scale[half] * -static_cast<float>(block.factors[0]);
      }
    }
  }
};

struct RowFunctions {
  void (*decode)(const RowBlock& block, float* out);
  void (*decode_row)(const uint8_t* row, int64_t columns, float* out);
  void (*repack_row)(const uint8_t* row, int64_t columns, uint8_t* codes, void* scales,
                     float* offsets);
};

template <class Reader, Format format>
constexpr RowFunctions rows_of() {
  using R = Rows<Reader, format>;
  return {R::decode, R::decode_row, R::repack_row};
}

void decode_f32(const uint8_t* row, int64_t columns, float* out) {
  std::memcpy(out, row, static_cast<size_t>(columns) * 4);
}

void decode_f16(const uint8_t* row, int64_t columns, float* out) {
  for (int64_t k = 0; k < columns; ++k) out[k] = half_to_float(read16(row + 2 * k));
}

void decode_bf16(const uint8_t* row, int64_t columns, float* out) {
  for (int64_t k = 0; k < columns; ++k)
    out[k] = float_of_bits(static_cast<uint32_t>(read16(row + 2 * k)) << 16);
}

constexpr RowFunctions kFunctions[] = {
    {nullptr, decode_f32, nullptr},
    {nullptr, decode_f16, nullptr},
    {nullptr, decode_bf16, nullptr},
#define TGI_FLOAT_FORMAT(...)
#define TGI_FORMAT(name, ...) rows_of<name, Format::k##name>(),
#include "../../formats.def"
};
static_assert(sizeof(kFunctions) / sizeof(RowFunctions) == kNumFormats, "one row a format");

const RowFunctions& functions_of(Format format) { return kFunctions[static_cast<int>(format)]; }

}  // namespace

void decode_block(Format format, const RowBlock& block, float* out) {
  functions_of(format).decode(block, out);
}

void decode_row(Format format, const uint8_t* row, int64_t columns, float* out) {
  const KeepDenormals exact;  // the team's threads flush denormals
  functions_of(format).decode_row(row, columns, out);
}

void repack_row(Format format, const uint8_t* row, int64_t columns, uint8_t* codes, void* scales,
                float* offsets) {
  const KeepDenormals exact;
  functions_of(format).repack_row(row, columns, codes, scales, offsets);
}

}  // namespace tgi::cpu::step
