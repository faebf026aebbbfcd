// A separate product per head, which latent attention (MLA) applies to queries and results.
// Included only by the step_<isa>.cpp files.
#pragma once

#include "linear_kernels.h"

namespace tgi::cpu::step {
namespace {

// Moves to a head's columns. Between its tiles are the columns of other heads.
inline void move_to(Activation& in, int64_t first_column, int64_t tile_tokens) {
  const int64_t block = first_column / kBlockColumns;
  if (in.is_by_kind()) in.prompt_data += block * tile_block_bytes(Precision::kBF16, tile_tokens);
  in.data += block * tile_block_bytes(in.precision, tile_tokens);
}

// Each member owns a run of strips of the rows of all heads, one head after the other.
template <class S>
void heads_linear(const HeadsLinearParams& p, const StepHeader& step, int member, int num_members) {
  const PackedMatrix& weight = p.linear.weight;
  const int64_t head_strips = weight.num_strips() / p.num_heads;
  const Range mine = split(weight.num_strips(), member, num_members);
  const auto store = [&](int64_t unit, int64_t token, int64_t count, const UnitOutputs& out) {
    for (int64_t t = 0; t < count; ++t) {
      float* const to = p.out + (token + t) * p.stride + unit * kStripRows;
      const float* const from = out.row(0, t);
      S::store(to, S::load(from));
      S::store(to + 16, S::load(from + 16));
    }
  };
  for (int64_t unit = mine.begin; unit < mine.end;) {
    const int64_t head = unit / head_strips, end = (head + 1) * head_strips;
    const Range units = {unit, end < mine.end ? end : mine.end};
    LinearParams linear = p.linear;
    move_to(linear.in, head * weight.num_columns, S::kTileTokens);
    run_linear<S>(linear, tokens_of(step), units, 1, member, store);
    unit = units.end;
  }
}

}  // namespace
}  // namespace tgi::cpu::step
