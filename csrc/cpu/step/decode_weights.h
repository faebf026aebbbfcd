// Weights converted to the form that a product reads, if they are not stored in it: to float32 for
// float32 activations, from codes to bf16 for bf16 activations. Included only by the step_<isa>.cpp
// files.
#pragma once

#include <cstring>

#include "linear_tile.h"
#include "step.h"

namespace tgi::cpu::step {
namespace {

// Returns whether a product with float32 activations reads its weights widened to float32.
inline bool is_widened(Format format, Precision precision) {
  return precision == Precision::kFloat32 && format != Format::kF32 && format != Format::kF16;
}

// Returns whether a product with bf16 activations reads its weights decoded to bf16.
inline bool is_decoded_to_bf16(Format format, Precision precision) {
  return precision == Precision::kBF16 && format != Format::kBF16;
}

// Decodes blocks [begin, end) of a panel to bf16: the float32 values of the dequantised file,
// rounded to nearest even.
template <class S, class Fmt>
void decode_bf16_blocks(const uint8_t* panel, int64_t begin, int64_t end, uint8_t* out) {
  each_four_columns<S, Fmt>(panel, begin, end, [&](const typename S::F(&weights)[4]) {
    S::istore(out, S::pair_bf16(weights[0], weights[1]));
    S::istore(out + 64, S::pair_bf16(weights[2], weights[3]));
    out += 128;
  });
}

using DecodeBF16 = void (*)(const uint8_t* panel, int64_t begin, int64_t end, uint8_t* out);

// Returns null for formats without codes.
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

// Converts a panel to float32.
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

// Bytes of a panel in the form that a product reads, or 0 if the product reads the panel as stored.
inline int64_t scratch_panel_size(const PackedMatrix& weight, Precision precision) {
  if (is_widened(weight.format, precision)) return weight.num_columns * 64;
  return is_decoded_to_bf16(weight.format, precision) ? weight.num_columns * 32 : 0;
}

// Converts a panel to that form.
template <class S>
inline void fill_scratch(const LinearParams& p, int64_t panel, float* out) {
  if (p.in.precision == Precision::kFloat32) return dequantise<S>(p.weight, panel, out);
  const int64_t num_blocks = p.weight.num_columns / kBlockColumns;
  decode_bf16_function<S>(p.weight.format)(p.weight.panel(panel), 0, num_blocks,
                                           reinterpret_cast<uint8_t*>(out));
}

}  // namespace
}  // namespace tgi::cpu::step
