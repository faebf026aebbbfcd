// exp2 and the quantising writers, over the simd type S. Included only by the step_<isa>.cpp files.
#pragma once

#include <cstring>
#include <type_traits>

#include "packed.h"
#include "step.h"

namespace tgi::cpu::step {
namespace {

// Returns 2^x, for x below 128, with a relative error of 4e-6 (Coarse: enough below bf16) or 1e-7;
// 0 below 2^-126, NaN for NaN. Uses minimax polynomials.
template <class S, bool Coarse>
inline typename S::F exp2_below_128(typename S::F x) {
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

// The same for any x; results above 2^127.999 are cut to that.
template <class S, bool Coarse>
inline typename S::F exp2(typename S::F x) {
  return exp2_below_128<S, Coarse>(S::min(S::set1(127.999f), x));  // this order keeps NaN
}

constexpr float kFloatLog2E = static_cast<float>(kLog2E);

// Writes 16 values of a, then of b, as bf16.
template <class S>
inline void store_both_bf16(void* p, typename S::F a, typename S::F b) {
  if constexpr (S::kStoresBF16Pairs) {
    S::store_bf16(p, a, b);
  } else {
    S::store_bf16(p, a);
    S::store_bf16(static_cast<uint8_t*>(p) + 32, b);
  }
}

// Where a block of 32 values of one token is written: a tile's block, and the token's slot in it.
struct BlockSlot {
  uint8_t* block;
  int64_t slot;
};

template <class S>
inline BlockSlot slot_of(const Activation& to, int64_t token, int64_t block) {
  return {to.block(token, block, S::kTileTokens), token % S::kTileTokens};
}

// Calls visit(n, first) for n of `count` items at a time: as many as are quantised together, then
// four if a whole tile leaves four, then one.
template <class S, class Visit>
inline void for_each_batch(int64_t count, const Visit& visit) {
  int64_t i = 0;
  for (; i + S::kBlocksAtOnce <= count; i += S::kBlocksAtOnce) {
    visit(std::integral_constant<int, S::kBlocksAtOnce>(), i);
  }
  if constexpr (S::kTileTokens % S::kBlocksAtOnce == 4) {
    for (; i + 4 <= count; i += 4) visit(std::integral_constant<int, 4>(), i);
  }
  for (; i < count; ++i) visit(std::integral_constant<int, 1>(), i);
}

template <class S>
struct Blocks {
  typename S::I blocks[S::kBlocksAtOnce];
};

// Fills missing vectors with copies of the first.
template <class S, int Count>
inline Blocks<S> padded_with_first(const typename S::I (&a)[Count]) {
  Blocks<S> all;
  TGI_UNROLL(16)
  for (int i = 0; i < S::kBlocksAtOnce; ++i) all.blocks[i] = a[i < Count ? i : 0];
  return all;
}

// Blocks are quantised together because their reductions then share instructions and their
// divisions are one. Returns the sum, or the maximum, of the lanes of each of `Count` vectors (one
// or several), in lane i for vector i.
template <class S, int Count>
inline typename S::I sums_of(const typename S::I (&a)[Count]) {
  if constexpr (Count > 1) return S::reduce_iadd_each(padded_with_first<S>(a).blocks);
  return S::iset1(S::reduce_iadd(a[0]));
}

template <class S, int Count>
inline typename S::I largest_of(const typename S::I (&a)[Count]) {
  if constexpr (Count > 1) return S::reduce_imax_each(padded_with_first<S>(a).blocks);
  return S::iset1(S::reduce_imax(a[0]));
}

// The scale is max|x| / 127. If all magnitudes are below 1e-30, all codes are zero. NaN or infinity
// result in a scale that is not finite, so they reach the logits and are detected there.
template <class S, int Count>
inline void write_int8_blocks(const typename S::F (&a)[Count], const typename S::F (&b)[Count],
                              const BlockSlot (&to)[Count]) {
  constexpr int32_t kTiny = 0x0DA24260;  // the bits of 1e-30
  typename S::I magnitudes[Count], sums[Count];
  TGI_UNROLL(16)
  for (int i = 0; i < Count; ++i) magnitudes[i] = S::imax(S::abs_bits(a[i]), S::abs_bits(b[i]));
  const auto bits = largest_of<S, Count>(magnitudes);
  const auto is_kept = S::isar(S::isub(S::iset1(kTiny - 1), bits), 31);
  const auto kept = [&](typename S::F x) { return S::as_float(S::iand(S::abs_bits(x), is_kept)); };
  const auto largest = S::as_float(bits);
  const auto scale = kept(S::mul(largest, S::set1(1.0f / 127.0f)));
  alignas(64) float inverses[16], scales[16], scaled_sums[16];
  S::store(inverses, kept(S::div(S::set1(127.0f), largest)));
  TGI_UNROLL(16)
  for (int i = 0; i < Count; ++i) {
    const auto inverse = S::set1(inverses[i]);
    const auto low = S::round(S::mul(a[i], inverse)), high = S::round(S::mul(b[i], inverse));
    auto* values = reinterpret_cast<int8_t*>(to[i].block + 32 * to[i].slot);
    S::store_i8(values, low);
    S::store_i8(values + 16, high);
    // Both sums in one reduction: |sum of sixteen| <= 2,032, so they do not overlap.
    sums[i] = S::iadd(low, S::ishl(high, 16));
  }
  const auto both = sums_of<S, Count>(sums);
  const auto first = S::isar(S::ishl(both, 16), 16);
  const auto sum = S::iadd(first, S::isub(S::isar(both, 16), S::isar(first, 31)));
  alignas(64) int32_t zeros[16], first_zeros[16];
  S::store(scales, scale);
  S::store(scaled_sums, S::mul(scale, S::to_float(sum)));
  S::istore(zeros, S::isub(S::izero(), S::ishl(sum, 7)));
  S::istore(first_zeros, S::isub(S::izero(), S::ishl(first, 7)));
  TGI_UNROLL(16)
  for (int i = 0; i < Count; ++i) {
    uint8_t* const out = to[i].block + token_numbers(S::kTileTokens) + kTokenNumbers * to[i].slot;
    std::memcpy(out + kTokenScale, scales + i, 4);
    std::memcpy(out + kTokenSum, scaled_sums + i, 4);
    std::memcpy(out + kTokenZero, zeros + i, 4);
    std::memcpy(out + kTokenZeroFirst, first_zeros + i, 4);
  }
}

// Writes `Count` blocks, at most S::kBlocksAtOnce, of the next product's input; a and b: the first
// and the last sixteen values of each.
template <class S, int Count>
inline void write_blocks(Precision precision, const typename S::F (&a)[Count],
                         const typename S::F (&b)[Count], const BlockSlot (&to)[Count]) {
  static_assert(Count <= S::kBlocksAtOnce);
  if (precision == Precision::kInt8) return write_int8_blocks<S, Count>(a, b, to);
  TGI_UNROLL(16)
  for (int i = 0; i < Count; ++i) {
    if (precision == Precision::kBF16) {
      uint8_t* const values = to[i].block + 64 * to[i].slot;
      store_both_bf16<S>(values, a[i], b[i]);
    } else {
      auto* const values = reinterpret_cast<float*>(to[i].block + 128 * to[i].slot);
      S::store(values, a[i]);
      S::store(values + 16, b[i]);
    }
  }
}

}  // namespace
}  // namespace tgi::cpu::step
