// Norms of rows, and packing of rows as the input of a product. Included only by the step_<isa>.cpp
// files.
#pragma once

#include <cmath>

#include "../team.h"
#include "simd_math.h"
#include "step.h"

namespace tgi::cpu::step {
namespace {

// Returns the sum of squares of a row whose width is a multiple of 32.
template <class S>
inline float squares_of(const float* row, int64_t width) {
  auto even = S::zero(), odd = S::zero();
  for (int64_t k = 0; k < width; k += 32) {
    const auto a = S::load(row + k), b = S::load(row + k + 16);
    even = S::fma(a, a, even);
    odd = S::fma(b, b, odd);
  }
  return S::reduce_add(S::add(even, odd));
}

// Loads columns [k, k + 32) of a row that ends at `width`, with `fill` in the columns past its
// end.
template <class S>
inline void load_end(const float* row, int64_t k, int64_t width, typename S::F fill,
                     typename S::F& a, typename S::F& b) {
  const auto left = static_cast<int>(width - k);
  a = S::load_head(row + k, left < 16 ? left : 16, fill);
  b = left > 16 ? S::load_head(row + k + 16, left - 16, fill) : fill;
}

// The parameters of LayerNorm: a value becomes (x - mean) * factor.
struct Moments {
  float mean;
  float factor;
};

// Computes the mean first, then the squared distances from it: a difference of squares would lose
// the variance of rows that are far from zero. The row may have any width.
template <class S>
inline Moments moments_of(const float* row, int64_t width, float eps) {
  const int64_t whole = width / kBlockColumns * kBlockColumns;
  const auto sum_of = [&](auto term, typename S::F fill) {
    auto even = S::zero(), odd = S::zero();
    typename S::F a, b;
    for (int64_t k = 0; k < whole; k += kBlockColumns) {
      even = S::add(even, term(S::load(row + k)));
      odd = S::add(odd, term(S::load(row + k + 16)));
    }
    if (whole < width) {
      load_end<S>(row, whole, width, fill, a, b);
      even = S::add(even, term(a));
      odd = S::add(odd, term(b));
    }
    return S::reduce_add(S::add(even, odd)) / static_cast<float>(width);
  };
  // `[&]`, because `[]` also makes a function that returns a vector, and GCC warns of its ABI.
  const float mean = sum_of([&](typename S::F x) { return x; }, S::zero());
  const auto each_mean = S::set1(mean);
  const auto square = [&](typename S::F x) {
    const auto apart = S::sub(x, each_mean);
    return S::mul(apart, apart);
  };
  const float variance = sum_of(square, each_mean);
  return {mean, 1.0f / std::sqrt(variance + eps)};
}

template <class S>
inline typename S::F layer_norm(typename S::F x, const Moments& moments, typename S::F weight,
                                typename S::F bias) {
  const auto apart = S::sub(x, S::set1(moments.mean));
  return S::fma(S::mul(apart, S::set1(moments.factor)), weight, bias);
}

// Writes the layer norm of a row to its slot of the next product's input.
template <class S>
inline void layer_norm_row(const NormParams& p, const float* x, int64_t row,
                           const Activation& out) {
  const Moments moments = moments_of<S>(x, p.width, p.eps);
  for (int64_t k = 0; k < p.out.num_columns; k += kBlockColumns) {
    typename S::F values[2][1];
    for (int64_t i = 0; i < 2; ++i) {
      const int64_t at = k + 16 * i;
      values[i][0] =
          layer_norm<S>(S::load(x + at), moments, S::load(p.weight + at), S::load(p.bias + at));
    }
    const BlockSlot to[1] = {slot_of<S>(out, row, k / kBlockColumns)};
    write_blocks<S, 1>(out.precision, values[0], values[1], to);
  }
}

// Writes `Count` blocks of a normalised row, starting at column k.
template <class S, int Count>
inline void write_norm(const NormParams& p, const float* x, typename S::F factor, int64_t k,
                       int64_t row, const Activation& out) {
  typename S::F a[Count], b[Count];
  BlockSlot to[Count];
  TGI_UNROLL(16)
  for (int i = 0; i < Count; ++i) {
    const int64_t at = k + i * kBlockColumns;
    a[i] = S::mul(S::mul(S::load(x + at), factor), S::load(p.weight + at));
    b[i] = S::mul(S::mul(S::load(x + at + 16), factor), S::load(p.weight + at + 16));
    to[i] = slot_of<S>(out, row, at / kBlockColumns);
  }
  write_blocks<S, Count>(out.precision, a, b, to);
}

// Writes the RMS norm of a row to its slot of the next product's input.
template <class S>
inline void norm_row(const NormParams& p, const float* x, int64_t row, const Activation& out) {
  const int64_t width = p.out.num_columns;
  const float mean = squares_of<S>(x, width) / static_cast<float>(p.width);
  const auto factor = S::set1(1.0f / std::sqrt(mean + p.eps));
  constexpr int64_t kColumnsAtOnce = S::kBlocksAtOnce * kBlockColumns;
  int64_t k = 0;
  for (; k + kColumnsAtOnce <= width; k += kColumnsAtOnce) {
    write_norm<S, S::kBlocksAtOnce>(p, x, factor, k, row, out);
  }
  for (; k < width; k += kBlockColumns) write_norm<S, 1>(p, x, factor, k, row, out);
}

// Writes `Count` blocks of a row unchanged, starting at column k.
template <class S, int Count>
inline void write_packed(const float* from, int64_t k, int64_t row, const Activation& out) {
  typename S::F a[Count], b[Count];
  BlockSlot to[Count];
  TGI_UNROLL(16)
  for (int i = 0; i < Count; ++i) {
    const int64_t at = k + i * kBlockColumns;
    a[i] = S::load(from + at);
    b[i] = S::load(from + at + 16);
    to[i] = slot_of<S>(out, row, at / kBlockColumns);
  }
  write_blocks<S, Count>(out.precision, a, b, to);
}

// How many rows ahead of its use a row is prefetched: other members have written most of it.
constexpr int64_t kRowsAhead = 2;

template <class S>
inline void fetch_row(const float* row, int64_t width) {
  for (int64_t k = 0; k < width; k += 16) S::prefetch(row + k);
}

// Rows are divided so that two members never write to the same cache line.
template <class S>
void norm(const NormParams& p, const StepHeader& step, int member, int num_members) {
  const int64_t num_rows = p.for_logits ? step.num_rows : step.num_tokens;
  Range rows = split(num_rows, member, num_members, S::kSharedTokens);
  const bool is_private = p.is_private && num_rows <= kPrivateTokens;
  if (is_private) rows = {0, num_rows};
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const int64_t token = p.for_logits ? step.rows[row] : row;
    ActivationRow to = row_of(p.out, step, row);
    if (is_private) to.part.data += member * to.part.tile_bytes(S::kTileTokens);
    const float* const x = p.x + token * p.out.num_columns;
    if (!p.for_logits && row + kRowsAhead < rows.end) {
      fetch_row<S>(x + kRowsAhead * p.out.num_columns, p.out.num_columns);
    }
    if (p.bias != nullptr) {
      layer_norm_row<S>(p, x, to.row, to.part);
    } else {
      norm_row<S>(p, x, to.row, to.part);
    }
  }
}

// Packs rows as the input of a product.
template <class S>
void pack(const PackParams& p, const StepHeader& step, int member, int num_members) {
  const int64_t whole = p.width / kBlockColumns * kBlockColumns;
  const Range rows = split(step.num_tokens, member, num_members, S::kSharedTokens);
  constexpr int64_t kColumnsAtOnce = S::kBlocksAtOnce * kBlockColumns;
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const float* const from = p.rows + row * p.stride;
    const ActivationRow out = row_of(p.out, step, row);
    int64_t k = 0;
    for (; k + kColumnsAtOnce <= whole; k += kColumnsAtOnce) {
      write_packed<S, S::kBlocksAtOnce>(from, k, out.row, out.part);
    }
    for (; k < whole; k += kBlockColumns) write_packed<S, 1>(from, k, out.row, out.part);
    if (k == p.out.num_columns) continue;
    typename S::F a[1], b[1];
    load_end<S>(from, k, p.width, S::zero(), a[0], b[0]);
    const BlockSlot to[1] = {slot_of<S>(out.part, out.row, k / kBlockColumns)};
    write_blocks<S, 1>(out.part.precision, a, b, to);
  }
}

template <class S>
inline void layer_norm_rows(const NormRowsParams& p, const float* x, float* out) {
  const Moments moments = moments_of<S>(x, p.width, p.eps);
  for (int64_t k = 0; k < p.width; k += 16) {
    const auto left = static_cast<int>(p.width - k < 16 ? p.width - k : 16);
    const auto at = [&](const float* from) { return S::load_head(from + k, left, S::zero()); };
    S::store_head(out + k, left, layer_norm<S>(at(x), moments, at(p.weight), at(p.bias)));
  }
}

// Writes the norm of rows, or of groups of their columns, of any width as rows.
template <class S>
void norm_rows(const NormRowsParams& p, const StepHeader& step, int member, int num_members) {
  const int64_t whole = p.width / kBlockColumns * kBlockColumns;
  const Range rows = split(step.num_tokens * p.num_groups, member, num_members);
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const int64_t token = row / p.num_groups, first = row % p.num_groups * p.width;
    const float* const x = p.x + token * p.stride + first;
    float* const out = p.out + token * p.out_stride + first;
    if (p.bias != nullptr) {
      layer_norm_rows<S>(p, x, out);
      continue;
    }
    float squares = squares_of<S>(x, whole);
    if (whole < p.width) {
      typename S::F a, b;
      load_end<S>(x, whole, p.width, S::zero(), a, b);
      squares += S::reduce_add(S::fma(a, a, S::mul(b, b)));
    }
    const auto factor = S::set1(1.0f / std::sqrt(squares / static_cast<float>(p.width) + p.eps));
    int64_t k = 0;
    for (; k + 16 <= p.width; k += 16) {
      S::store(out + k, S::mul(S::mul(S::load(x + k), factor), S::load(p.weight + k)));
    }
    if (k == p.width) continue;
    const auto left = static_cast<int>(p.width - k);
    const auto value = S::load_head(x + k, left, S::zero());
    const auto weight = S::load_head(p.weight + k, left, S::zero());
    S::store_head(out + k, left, S::mul(S::mul(value, factor), weight));
  }
}

template <class S>
void norm_add(const NormAddParams& p, const StepHeader& step, int member, int num_members) {
  const auto scale = S::set1(p.scale);
  const Range rows = split(step.num_tokens, member, num_members);
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const float* const from = p.rows + row * p.num_columns;
    float* const x = p.x + row * p.num_columns;
    if (p.bias != nullptr) {
      const Moments moments = moments_of<S>(from, p.width, p.eps);
      for (int64_t k = 0; k < p.num_columns; k += 16) {
        const auto normed =
            layer_norm<S>(S::load(from + k), moments, S::load(p.weight + k), S::load(p.bias + k));
        const auto sum = S::add(S::load(x + k), S::mul(normed, S::set1(p.factor)));
        S::store(x + k, S::mul(sum, scale));
      }
      continue;
    }
    const float mean = squares_of<S>(from, p.num_columns) / static_cast<float>(p.width);
    const auto factor = S::set1(p.factor / std::sqrt(mean + p.eps));
    for (int64_t k = 0; k < p.num_columns; k += 16) {
      const auto normed = S::mul(S::mul(S::load(from + k), factor), S::load(p.weight + k));
      S::store(x + k, S::mul(S::add(S::load(x + k), normed), scale));
    }
  }
}

}  // namespace
}  // namespace tgi::cpu::step
