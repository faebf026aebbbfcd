// Weights in the form that a product reads, where they do not lie in it: as float32 for activations
// of float32, codes as bf16 for those of bf16. Included by the step_<isa>.cpp files only.
#pragma once

#include <cstring>

#include "linear_tile.h"
#include "step.h"

namespace tgi::cpu::step {
namespace {

// Whether a product with float32 activations reads its weights widened to float32.
inline bool is_widened(Format format, Precision precision) {
  return precision == Precision::kFloat32 && format != Format::kF32 && format != Format::kF16;
}

// Whether a product with bf16 activations reads its weights decoded to bf16.
inline bool is_decoded_to_bf16(Format format, Precision precision) {
  return precision == Precision::kBF16 && format != Format::kBF16;
}

// Blocks [begin, end) of a panel: what dequantising the file gives in float32, to the nearest even.
template <class S, class Fmt>
void decode_bf16_blocks(const uint8_t* panel, int64_t begin, int64_t end, uint8_t* out) {
  each_four_columns<S, Fmt>(panel, begin, end, [&](const typename S::F(&weights)[4]) {
    S::istore(out, S::pair_bf16(weights[0], weights[1]));
    S::istore(out + 64, S::pair_bf16(weights[2], weights[3]));
    out += 128;
  });
}

using DecodeBF16 = void (*)(const uint8_t* panel, int64_t begin, int64_t end, uint8_t* out);

// Null for formats without codes.
template <class S>
inline DecodeBF16 decode_bf16_function(Format format) {
  switch (format) {
#define TGI_FLOAT_FORMAT(...)
#define TGI_CODE_FORMAT(name, ...) \
  case Format::k##name:            \
    return decode_bf16_blocks<S, name<S>>;
#define TGI_DECODED_FORMAT(...)
#include "../../formats.def"
    default:
      return nullptr;
  }
}

// A panel as float32.
template <class S>
void dequantise(const PackedMatrix& weight, int64_t panel, float* out) {
  const uint8_t* data = weight.panel(panel);
  const int64_t blocks = weight.num_columns / kBlockColumns;
  switch (weight.format) {
    case Format::kF32:
      std::memcpy(out, data, weight.panel_size());
      return;
    case Format::kF16:
      return widen_half_panel<S>(data, blocks, out);
    case Format::kBF16:
      return widen_bf16_panel<S>(data, blocks, out);
#define TGI_FLOAT_FORMAT(...)
#define TGI_CODE_FORMAT(name, ...) \
  case Format::k##name:            \
    return dequantise_panel<S, name<S>>(data, blocks, out);
#define TGI_DECODED_FORMAT(...)
#include "../../formats.def"
    default:
      return;
  }
}

// Bytes of a panel in the form that a product reads, where that is not the panel as it lies; else
// 0.
inline int64_t scratch_panel_size(const PackedMatrix& weight, Precision precision) {
  if (is_widened(weight.format, precision)) return weight.num_columns * 64;
  return is_decoded_to_bf16(weight.format, precision) ? weight.num_columns * 32 : 0;
}

// Brings a panel into that form.
template <class S>
inline void fill_scratch(const LinearParams& p, int64_t panel, float* out) {
  if (p.in.precision == Precision::kFloat32) return dequantise<S>(p.weight, panel, out);
  const int64_t num_blocks = p.weight.num_columns / kBlockColumns;
  decode_bf16_function<S>(p.weight.format)(p.weight.panel(panel), 0, num_blocks,
                                           reinterpret_cast<uint8_t*>(out));
}

}  // namespace
}  // namespace tgi::cpu::step
