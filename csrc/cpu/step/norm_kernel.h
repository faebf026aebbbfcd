// Norms of rows, and rows as the input of a product. Included by the step_<isa>.cpp files only.
#pragma once

#include <cmath>

#include "../team.h"
#include "simd_math.h"
#include "step.h"

namespace tgi::cpu::step {
namespace {

// The sum of squares of a row, of a multiple of 32 columns.
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

// `Count` blocks of a normalised row, from column k on.
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

// RMS norm of a row into its slot of the next product's input.
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

// The same as they are.
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

// Rows are shared out so that two members never write to one cache line.
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
    norm_row<S>(p, p.x + token * p.out.num_columns, to.row, to.part);
  }
}

// Columns [k, k + 32) of a row that ends at `width`, zeros behind it.
template <class S>
inline void load_end(const float* row, int64_t k, int64_t width, typename S::F& a,
                     typename S::F& b) {
  const auto left = static_cast<int>(width - k);
  a = S::load_head(row + k, left < 16 ? left : 16, S::zero());
  b = left > 16 ? S::load_head(row + k + 16, left - 16, S::zero()) : S::zero();
}

// Rows as the input of a product.
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
    load_end<S>(from, k, p.width, a[0], b[0]);
    const BlockSlot to[1] = {slot_of<S>(out.part, out.row, k / kBlockColumns)};
    write_blocks<S, 1>(out.part.precision, a, b, to);
  }
}

// RMS norm of rows of any width, as rows.
template <class S>
void norm_rows(const NormRowsParams& p, const StepHeader& step, int member, int num_members) {
  const int64_t whole = p.width / kBlockColumns * kBlockColumns;
  const Range rows = split(step.num_tokens, member, num_members);
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const float* const x = p.x + row * p.stride;
    float* const out = p.out + row * p.width;
    float squares = squares_of<S>(x, whole);
    if (whole < p.width) {
      typename S::F a, b;
      load_end<S>(x, whole, p.width, a, b);
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
  const Range rows = split(step.num_tokens, member, num_members);
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const float* const from = p.rows + row * p.num_columns;
    float* const x = p.x + row * p.num_columns;
    const float mean = squares_of<S>(from, p.num_columns) / static_cast<float>(p.width);
    const auto factor = S::set1(p.factor / std::sqrt(mean + p.eps));
    for (int64_t k = 0; k < p.num_columns; k += 16) {
      const auto normed = S::mul(S::mul(S::load(from + k), factor), S::load(p.weight + k));
      S::store(x + k, S::add(S::load(x + k), normed));
    }
  }
}

}  // namespace
}  // namespace tgi::cpu::step
