// exp2, the activation functions and the quantising writers, over the simd type S. Included by the
// step_<isa>.cpp files only.
#pragma once

#include <cstring>

#include "packed.h"

namespace tgi::cpu::step {
namespace {

// 2^x, relative error 4e-6 (coarse: enough below bf16) or 1e-7; 0 below 2^-126, NaN for NaN.
// Minimax polynomials.
template <class S, bool Coarse>
inline typename S::F exp2(typename S::F x) {
  x = S::min(S::set1(127.999f), x);  // this order keeps NaN
  const auto n = S::floor(x);
  const auto f = S::sub(x, n);
  typename S::F p;
  if constexpr (Coarse) {
    p = S::set1(1.3534167869e-02f);
    p = S::fma(p, f, S::set1(5.2011462774e-02f));
    p = S::fma(p, f, S::set1(2.4144275391e-01f));
    p = S::fma(p, f, S::set1(6.9300383560e-01f));
    p = S::fma(p, f, S::set1(1.0000025933e+00f));
  } else {
    p = S::set1(2.1702255415e-04f);
    p = S::fma(p, f, S::set1(1.2439688075e-03f));
    p = S::fma(p, f, S::set1(9.6788409381e-03f));
    p = S::fma(p, f, S::set1(5.5483342034e-02f));
    p = S::fma(p, f, S::set1(2.4022983626e-01f));
    p = S::fma(p, f, S::set1(6.9314698384e-01f));
    p = S::fma(p, f, S::set1(1.0000000019e+00f));
  }
  return S::scale_pow2(p, n, x);
}

constexpr float kLog2E = 1.44269504088896340736f;

// x / (1 + e^-x).
template <class S>
inline typename S::F silu(typename S::F x) {
  const auto e = exp2<S, false>(S::mul(x, S::set1(-kLog2E)));
  return S::div(x, S::add(S::set1(1.0f), e));
}

// GELU by tanh, which is x * sigmoid(2 * 0.79788 * (x + 0.044715 x^3)).
template <class S>
inline typename S::F gelu_tanh(typename S::F x) {
  const auto cubic = S::fma(S::mul(S::mul(x, x), S::set1(0.044715f)), x, x);
  const auto e = exp2<S, false>(S::mul(cubic, S::set1(-kLog2E * 1.5957691216057308f)));
  return S::div(x, S::add(S::set1(1.0f), e));
}

// Writes 32 values of one token (a: the first sixteen) into its slot of a tile's block.
// Int8: scale max|x| / 127. Below 1e-30 all are zero. NaN or infinity give a scale that is not
// finite, so they reach the logits and are seen there.
template <class S>
inline void write_int8_block(typename S::F a, typename S::F b, uint8_t* block, int64_t slot) {
  const int32_t bits = S::reduce_imax(S::imax(S::abs_bits(a), S::abs_bits(b)));
  float largest;
  std::memcpy(&largest, &bits, 4);
  const bool is_tiny = largest < 1e-30f;
  const float scale = is_tiny ? 0.0f : largest * (1.0f / 127.0f);
  const float inverse = is_tiny ? 0.0f : 127.0f / largest;
  const auto low = S::round(S::mul(a, S::set1(inverse)));
  const auto high = S::round(S::mul(b, S::set1(inverse)));
  auto* values = reinterpret_cast<int8_t*>(block + 32 * slot);
  S::store_i8(values, low);
  S::store_i8(values + 16, high);
  // Both sums in one reduction: |sum of sixteen| <= 2,032, so they do not meet. Unsigned, as NaN
  // gives any integer.
  const auto both = static_cast<uint32_t>(S::reduce_iadd(S::iadd(low, S::ishl(high, 16))));
  const int32_t first = static_cast<int16_t>(both);
  const int32_t second = static_cast<int16_t>((both - static_cast<uint32_t>(first)) >> 16);
  const int32_t sum = first + second;
  const float scaled_sum = scale * static_cast<float>(sum);
  const int32_t zero = -128 * sum, zero_first = -128 * first;
  std::memcpy(block + kTileScale + 4 * slot, &scale, 4);
  std::memcpy(block + kTileSum + 4 * slot, &scaled_sum, 4);
  std::memcpy(block + kTileZero + 4 * slot, &zero, 4);
  std::memcpy(block + kTileZeroFirst + 4 * slot, &zero_first, 4);
}

template <class S>
inline void write_block(Precision precision, typename S::F a, typename S::F b, uint8_t* block,
                        int64_t slot) {
  if (precision == Precision::kInt8) {
    write_int8_block<S>(a, b, block, slot);
  } else if (precision == Precision::kBF16) {
    S::store_bf16(block + 64 * slot, a);
    S::store_bf16(block + 64 * slot + 32, b);
  } else {
    auto* values = reinterpret_cast<float*>(block + 128 * slot);
    S::store(values, a);
    S::store(values + 16, b);
  }
}

}  // namespace
}  // namespace tgi::cpu::step
