// Codes that are decoded once for many tokens: one byte per code, with each row's scales and mins
// as vectors. Sums of products are exact integers, so nothing changes but the time: where unpacking
// takes the ports that multiply (Intel), bytes are multiplied 1.2 to 1.4 times as fast
// (bench/README.md). Templates over the simd type S, included only by the step_<isa>.cpp files.
#pragma once

#include "linear_formats.h"

namespace tgi::cpu::step {
namespace {

// All that is left of a format once its codes are bytes.
struct DecodedKind {
  bool has_zero;  // codes are 128 too large
  bool has_min;
  int num_halves;
  bool has_integer_scales;
};

template <class Fmt>
constexpr DecodedKind kKindOf = {Fmt::kZeroShift >= 0 || Fmt::kHasZeros, Fmt::kHasMin,
                                 Fmt::kNumHalves, Fmt::kHasIntegerScales};

// A reader of decoded blocks, like those of linear_formats.h. A block is eight vectors of codes,
// then one vector per number: the halves' common scale if theirs are integers, a scale per half, a
// min per half.
template <class S, DecodedKind kind>
struct Decoded : ByteCodes<S> {
  static constexpr int kZeroShift = kind.has_zero ? 0 : -1;
  static constexpr bool kHasZeros = false;
  static constexpr bool kHasMin = kind.has_min;
  static constexpr int kNumHalves = kind.num_halves;
  static constexpr bool kHasIntegerScales = kind.has_integer_scales;
  static constexpr int kFirstScale = kHasIntegerScales ? 1 : 0;  // among the numbers
  static constexpr int kFirstMin = kFirstScale + kNumHalves;
  static constexpr int kNumbers = kFirstMin + (kHasMin ? kNumHalves : 0);
  static constexpr int64_t kBlockBytes = ByteCodes<S>::kCodeBytes + 64 * kNumbers;

  struct Block {
    const uint8_t* codes;
  };
  static inline Block block(const uint8_t* panel, int64_t b) { return {panel + b * kBlockBytes}; }
  static TGI_INLINE typename S::I quad(Block block, int j) {
    return ByteCodes<S>::quad(block.codes, j);
  }
  static inline const float* number(Block block, int i) {
    return reinterpret_cast<const float*>(block.codes + ByteCodes<S>::kCodeBytes + 64 * i);
  }
  static inline typename S::F half(Block block, int i) { return S::load(number(block, i)); }
  static inline typename S::F scale(Block block, int half) {
    return S::load(number(block, kFirstScale + half));
  }
  static inline typename S::I integer_scale(Block block, int half) {
    return S::iload(number(block, kFirstScale + half));
  }
  static inline typename S::F min(Block block, int half) {
    return S::load(number(block, kFirstMin + half));
  }
  static inline typename S::F negative_min(Block block, int half) { return min(block, half); }
  static inline typename S::I zeros(Block) { return S::izero(); }
};

template <class S, class Fmt>
using DecodedOf = Decoded<S, kKindOf<Fmt>>;

// What makes the zero point of a block's codes 128, for each byte. The sums stay below 256.
template <class S, class Fmt>
inline typename S::I to_zero_of_128(const typename Fmt::Block& block) {
  if constexpr (!Fmt::kHasZeros) return S::iset1((128 - (128 >> Fmt::kZeroShift)) * 0x01010101);
  auto bytes = S::isub(S::iset1(128), Fmt::zeros(block));
  bytes = S::ior(bytes, S::ishl(bytes, 8));
  return S::ior(bytes, S::ishl(bytes, 16));
}

// Decodes block b of a panel.
template <class S, class Fmt>
inline void decode_block(const uint8_t* panel, int64_t b, uint8_t* out) {
  static_assert(!Fmt::kIsSigned, "codes are multiplied as unsigned bytes");
  using D = DecodedOf<S, Fmt>;
  const auto block = Fmt::block(panel, b);
  TGI_UNROLL(8)
  for (int j = 0; j < 8; ++j) {
    auto codes = Fmt::quad(block, j);
    if constexpr (Fmt::kZeroShift > 0 || Fmt::kHasZeros) {
      codes = S::iadd(codes, to_zero_of_128<S, Fmt>(block));
    }
    S::istore(out + 64 * j, codes);
  }
  auto* const numbers = reinterpret_cast<float*>(out + D::kCodeBytes);
  if constexpr (D::kHasIntegerScales) S::store(numbers, Fmt::half(block, 0));
  TGI_UNROLL(2)
  for (int half = 0; half < D::kNumHalves; ++half) {
    float* const scale = numbers + 16 * (D::kFirstScale + half);
    float* const min = numbers + 16 * (D::kFirstMin + half);
    if constexpr (D::kHasIntegerScales) {
      S::istore(scale, Fmt::integer_scale(block, half));
    } else {
      S::store(scale, Fmt::scale(block, half));
    }
    if constexpr (D::kHasMin && D::kNumHalves == 1) S::store(min, Fmt::min(block, half));
    if constexpr (D::kHasMin && D::kNumHalves == 2) S::store(min, Fmt::negative_min(block, half));
  }
}

template <class S, class Fmt>
void decode_codes(const uint8_t* panel, int64_t num_blocks, uint8_t* out) {
  for (int64_t b = 0; b < num_blocks; ++b) {
    decode_block<S, Fmt>(panel, b, out + b * DecodedOf<S, Fmt>::kBlockBytes);
  }
}

// Bytes of a decoded block; 0 for formats without codes.
template <class S>
inline int64_t decoded_block_bytes(Format format) {
  switch (format) {
#define TGI_FLOAT_FORMAT(...)
#define TGI_CODE_FORMAT(name, ...) \
  case Format::k##name:            \
    return DecodedOf<S, name<S>>::kBlockBytes;
#define TGI_DECODED_FORMAT(...)
#include "../../formats.def"
    default:
      return 0;
  }
}

}  // namespace
}  // namespace tgi::cpu::step
