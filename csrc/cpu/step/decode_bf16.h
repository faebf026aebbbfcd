// Codes as bf16: panels of a quantised weight in the layout of a bf16 one, for products with
// activations of bf16. Included by the step_<isa>.cpp files only.
#pragma once

#include "linear_tile.h"

namespace tgi::cpu::step {
namespace {

// Whether a product with bf16 activations reads its weights decoded to bf16.
inline bool is_decoded_to_bf16(Format format, Precision precision) {
  return precision == Precision::kBF16 && format != Format::kBF16;
}

// Blocks [begin, end) of a panel: what dequantising the file gives in float32, to the nearest even.
template <class S, class Fmt>
void decode_bf16_blocks(const uint8_t* panel, int64_t begin, int64_t end, uint8_t* out) {
  constexpr int kZero = Fmt::kZeroShift >= 0 ? 128 >> (Fmt::kZeroShift & 7) : 0;
  for (int64_t b = begin; b < end; ++b) {
    const auto block = Fmt::block(panel, b);
    const auto zero = Fmt::kHasZeros ? Fmt::zeros(block) : S::iset1(kZero);
    TGI_UNROLL(8)
    for (int j = 0; j < 8; ++j) {
      const int half = Fmt::kNumHalves == 2 ? j / 4 : 0;
      const auto scale = Fmt::scale(block, half), min = Fmt::min(block, half);
      const auto codes = Fmt::quad(block.codes, j);
      typename S::F weights[4];
      TGI_UNROLL(4)
      for (int i = 0; i < 4; ++i) {
        weights[i] = S::mul(code_value<S, Fmt>(codes, i, zero), scale);
        if constexpr (Fmt::kHasMin) weights[i] = S::add(weights[i], min);
      }
      S::istore(out, S::pair_bf16(weights[0], weights[1]));
      S::istore(out + 64, S::pair_bf16(weights[2], weights[3]));
      out += 128;
    }
  }
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

}  // namespace
}  // namespace tgi::cpu::step
