// The terms that adapters add to a product. A separate operator computes the inner values first.
// The product then adds the rest to its outputs while they are in L1, before its epilogue. Every
// value is summed in one fixed order, whatever tokens and rows are computed together, so no bit of
// a token depends on the batch or on the number of members. Included only by the step_<isa>.cpp
// files.
#pragma once

#include <type_traits>

#include "../team.h"
#include "simd_math.h"
#include "step.h"

namespace tgi::cpu::step {
namespace {

// A token's row of a product's input.
template <class S, Precision P>
class InputRow {
 public:
  InputRow() = default;
  InputRow(const Activation& in, int64_t token) {
    const int64_t slot = token % S::kTileTokens;
    const uint8_t* const tile = in.data + token / S::kTileTokens * in.tile_bytes(S::kTileTokens);
    constexpr int64_t kValueBytes = P == Precision::kInt8 ? 1 : P == Precision::kBF16 ? 2 : 4;
    values_ = tile + slot * kBlockColumns * kValueBytes;
    scale_ = tile + token_numbers(S::kTileTokens) + slot * kTokenNumbers + kTokenScale;
  }
  // Loads columns [32 * block, 32 * block + 16) and the sixteen after them.
  void load(int64_t block, typename S::F& first, typename S::F& second) const {
    const int64_t offset = block * tile_block_bytes(P, S::kTileTokens);
    const uint8_t* const from = values_ + offset;
    if constexpr (P == Precision::kInt8) {
      float number;
      std::memcpy(&number, scale_ + offset, sizeof(number));
      const auto scale = S::set1(number);
      first = S::mul(S::to_float(S::load_i8(from)), scale);
      second = S::mul(S::to_float(S::load_i8(from + 16)), scale);
    } else if constexpr (P == Precision::kBF16) {
      first = S::load_bf16(from);
      second = S::load_bf16(from + 32);
    } else {
      first = S::load(reinterpret_cast<const float*>(from));
      second = S::load(reinterpret_cast<const float*>(from) + 16);
    }
  }

 private:
  const uint8_t* values_ = nullptr;
  const uint8_t* scale_ = nullptr;
};

// Tokens stored together in a product's input, the first of which is `begin`.
struct ShrinkInput {
  Activation in;
  int64_t begin, end;
};

// Computes `Rows` inner values, starting at `row`, for each of `Tokens` tokens.
template <class S, Precision P, int Rows, int Tokens>
inline void shrink_some(const LinearParams& p, const AdapterTerm& term, const ShrinkInput& input,
                        int64_t row, int64_t token) {
  const int64_t columns = p.in.num_columns;
  InputRow<S, P> x[Tokens];
  typename S::F sums[Rows][Tokens];
  for (int t = 0; t < Tokens; ++t) {
    x[t] = {input.in, token + t - input.begin};
    for (int r = 0; r < Rows; ++r) sums[r][t] = S::zero();
  }
  const uint16_t* const down = term.down + row * columns;
  for (int64_t block = 0; block < columns / kBlockColumns; ++block) {
    typename S::F first[Tokens], second[Tokens];
    TGI_UNROLL(8)
    for (int t = 0; t < Tokens; ++t) x[t].load(block, first[t], second[t]);
    TGI_UNROLL(8)
    for (int r = 0; r < Rows; ++r) {
      const uint16_t* const at = down + r * columns + block * kBlockColumns;
      const auto a = S::load_bf16(at), b = S::load_bf16(at + 16);
      if constexpr (Tokens == 1) S::prefetch(at + Rows * columns);
      TGI_UNROLL(8)
      for (int t = 0; t < Tokens; ++t) {
        sums[r][t] = S::fma(second[t], b, S::fma(first[t], a, sums[r][t]));
      }
    }
  }
  for (int t = 0; t < Tokens; ++t) {
    float* const to = p.adapter.inner + (token + t) * p.adapter.stride + row;
    for (int r = 0; r < Rows; ++r) to[r] = term.scales[row + r] * S::reduce_add(sums[r][t]);
  }
}

// Computes inner values [rows.begin, rows.end) of tokens.
template <class S, Precision P>
void shrink_part(const LinearParams& p, const AdapterTerm& term, const ShrinkInput& input,
                 Range rows, Range tokens) {
  int64_t row = rows.begin;
  const auto each = [&](auto num_rows) {
    constexpr int kRows = decltype(num_rows)::value;
    int64_t token = tokens.begin;
    if constexpr (kRows <= 4) {
      for (; token + 4 <= tokens.end; token += 4) {
        shrink_some<S, P, kRows, 4>(p, term, input, row, token);
      }
    }
    for (; token < tokens.end; ++token) shrink_some<S, P, kRows, 1>(p, term, input, row, token);
    row += kRows;
  };
  // With few tokens, reading the weights limits the speed; with many, reading the input and the
  // number of registers do.
  while (tokens.end - tokens.begin < 4 && row + 8 <= rows.end) {
    each(std::integral_constant<int, 8>());
  }
  while (row + 4 <= rows.end) each(std::integral_constant<int, 4>());
  while (row < rows.end) each(std::integral_constant<int, 1>());
}

template <class S, Precision P>
void shrink_in(const LinearParams& p, const ShrinkInput& input, const StepHeader& step, int member,
               int num_members) {
  const auto tokens_of_span = [&](const AdapterSpan& span) {
    const int64_t begin = span.begin > input.begin ? span.begin : input.begin;
    const int64_t end = span.end < input.end ? span.end : input.end;
    return Range{begin, end > begin ? end : begin};
  };
  // Long spans are divided by tokens; the inner values of all other spans are divided together.
  const auto is_long = [&](Range tokens) { return tokens.end - tokens.begin >= 4 * num_members; };
  int64_t num_rows = 0;
  for (int64_t i = 0; i < step.num_adapters; ++i) {
    const AdapterSpan& span = step.adapters[i];
    const Range tokens = tokens_of_span(span);
    if (tokens.begin < tokens.end && !is_long(tokens))
      num_rows += span.terms[p.adapter.product].num_inner;
  }
  const Range mine = split(num_rows, member, num_members);
  int64_t before = 0;
  for (int64_t i = 0; i < step.num_adapters; ++i) {
    const AdapterSpan& span = step.adapters[i];
    const AdapterTerm& term = span.terms[p.adapter.product];
    const Range tokens = tokens_of_span(span);
    if (tokens.begin >= tokens.end) continue;
    if (is_long(tokens)) {
      const Range part = split(tokens.end - tokens.begin, member, num_members, 4);
      const Range own = {tokens.begin + part.begin, tokens.begin + part.end};
      shrink_part<S, P>(p, term, input, {0, term.num_inner}, own);
      continue;
    }
    Range rows = {mine.begin - before, mine.end - before};
    rows.begin = rows.begin > 0 ? rows.begin : 0;
    rows.end = rows.end < term.num_inner ? rows.end : term.num_inner;
    shrink_part<S, P>(p, term, input, rows, tokens);
    before += term.num_inner;
  }
}

template <class S>
void shrink(const ShrinkParams& params, const StepHeader& step, int member, int num_members) {
  const LinearParams& p = params.linear;
  const bool is_private = p.is_private && step.num_tokens <= kPrivateTokens;
  const auto of_kind = [&](Activation in, int64_t begin, int64_t end) {
    if (is_private) in.data += member * in.tile_bytes(S::kTileTokens);
    const ShrinkInput input = {in, begin, end};
    switch (in.precision) {
      case Precision::kInt8:
        return shrink_in<S, Precision::kInt8>(p, input, step, member, num_members);
      case Precision::kBF16:
        return shrink_in<S, Precision::kBF16>(p, input, step, member, num_members);
      case Precision::kFloat32:
        return shrink_in<S, Precision::kFloat32>(p, input, step, member, num_members);
    }
  };
  const int64_t num_sampled = p.in.is_by_kind() ? step.num_generated : step.num_tokens;
  if (num_sampled > 0) of_kind(p.in, 0, num_sampled);
  if (num_sampled < step.num_tokens) of_kind(p.in.of_prompts(), num_sampled, step.num_tokens);
}

// Adds the inner values of `Tokens` tokens times sixteen rows of `up` to their outputs. Also
// prefetches the next unit's rows, `ahead` values further on: the base model's weights are read
// between two units, so the hardware prefetcher does not detect a stream here.
template <class S, int Tokens>
inline void expand_panel(const AdapterPanel& panel, const float* inner, int64_t stride,
                         int64_t ahead, float* out) {
  typename S::F even[Tokens], odd[Tokens];
  TGI_UNROLL(8)
  for (int t = 0; t < Tokens; ++t) even[t] = odd[t] = S::zero();
  const float* const values = inner + panel.first_inner;
  int64_t k = 0;
  for (; k + 2 <= panel.num_inner; k += 2) {
    const auto a = S::load_bf16(panel.up + 16 * k), b = S::load_bf16(panel.up + 16 * k + 16);
    S::prefetch(panel.up + 16 * k + ahead);
    TGI_UNROLL(8)
    for (int t = 0; t < Tokens; ++t) {
      even[t] = S::fma(S::set1(values[t * stride + k]), a, even[t]);
      odd[t] = S::fma(S::set1(values[t * stride + k + 1]), b, odd[t]);
    }
  }
  for (int t = 0; t < Tokens; ++t) {
    if (k < panel.num_inner) {
      even[t] = S::fma(S::set1(values[t * stride + k]), S::load_bf16(panel.up + 16 * k), even[t]);
    }
    float* const to = out + t * kStripRows;
    S::store(to, S::add(S::load(to), S::add(even[t], odd[t])));
  }
}

// Adds the adapter terms of tokens [token, token + count) to a unit's outputs: [tokens][32] per
// strip, strips `strip_floats` apart.
template <class S>
inline void expand(const AdapterPlace& place, const StepHeader& step, int64_t unit,
                   int64_t unit_strips, int64_t token, int64_t count, float* out,
                   int64_t strip_floats) {
  for (int64_t i = 0; i < step.num_adapters && step.adapters[i].begin < token + count; ++i) {
    const AdapterSpan& span = step.adapters[i];
    const AdapterTerm& term = span.terms[place.product];
    const int64_t begin = span.begin > token ? span.begin : token;
    const int64_t end = span.end < token + count ? span.end : token + count;
    if (begin >= end || term.num_inner == 0) continue;
    const AdapterPanel* const panels = term.panels + 2 * unit * unit_strips;
    S::prefetch(panels + 4 * unit_strips);
    for (int64_t panel = 0; panel < 2 * unit_strips; ++panel) {
      const AdapterPanel& rows = panels[panel];
      if (rows.num_inner == 0) continue;
      float* const to = out + panel / 2 * strip_floats + panel % 2 * kPanelRows;
      const int64_t ahead = 2 * unit_strips * kPanelRows * rows.num_inner;
      for (int64_t t = begin; t < end;) {
        const float* const inner = place.inner + t * place.stride;
        float* const first = to + (t - token) * kStripRows;
        if (end - t >= 4) {
          expand_panel<S, 4>(rows, inner, place.stride, ahead, first);
          t += 4;
        } else {
          expand_panel<S, 1>(rows, inner, place.stride, ahead, first);
          t += 1;
        }
      }
    }
  }
}

}  // namespace
}  // namespace tgi::cpu::step
