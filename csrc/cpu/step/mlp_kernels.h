// The first half of an MLP, gated or not: products whose results are activated and written as the
// next product's input. Included only by the step_<isa>.cpp files.
#pragma once

#include "activations.h"
#include "linear_kernels.h"

namespace tgi::cpu::step {
namespace {

// Returns activation(gate) * up.
template <class S>
inline typename S::F gated(const GateUpParams& p, typename S::F gate, typename S::F up) {
  if (p.clamped.limit != 0) return clamped_gate<S>(p.clamped, gate, up);
  return S::mul(activate<S>(p.function, gate), up);
}

// The same for `Count` tokens of a group, starting at `slot` of their tile. out: their outputs.
template <class S, int Count>
inline void finish_gate_up(const GateUpParams& p, int64_t unit, const UnitOutputs& out,
                           Precision precision, uint8_t* block, int64_t slot) {
  typename S::F values[2][Count];
  BlockSlot to[Count];
  const auto fill = [&](const auto& function) {
    TGI_UNROLL(16)
    for (int t = 0; t < Count; ++t) {
      to[t] = {block, slot + t};
      TGI_UNROLL(2)
      for (int i = 0; i < 2; ++i) {
        const int64_t row = (2 * unit + i) * kStripRows;
        const float* strip = out.row(i, t);
        const auto gate = biased<S>(p.linear.bias, row, strip);
        const auto up = biased<S>(p.linear.bias, row + 16, strip + 16);
        values[i][t] = function(gate, up);
      }
    }
  };
  using F = typename S::F;
  if (p.function.kind == MlpActivation::kSilu && p.clamped.limit == 0) {
    // Most models: no switch in the loop. `[&]` as in moments_of.
    fill([&](F gate, F up) { return S::mul(silu<S>(gate), up); });
  } else {
    fill([&](F gate, F up) { return gated<S>(p, gate, up); });
  }
  write_blocks<S, Count>(precision, values[0], values[1], to);
}

// The same, written as plain rows.
template <class S>
inline void gate_up_rows(const GateUpParams& p, int64_t unit, int64_t token, int64_t count,
                         const UnitOutputs& out) {
  for (int64_t t = 0; t < count; ++t) {
    for (int64_t i = 0; i < 2; ++i) {
      const int64_t row = (2 * unit + i) * kStripRows;
      const float* strip = out.row(i, t);
      const auto gate = biased<S>(p.linear.bias, row, strip);
      const auto up = biased<S>(p.linear.bias, row + 16, strip + 16);
      S::store(p.rows + (token + t) * p.stride + unit * kStripRows + 16 * i, gated<S>(p, gate, up));
    }
  }
}

// Calls visit(to, begin, count) for `count` tokens, as many at a time as share one tile of one
// part. That is all of them, unless the input's tiles begin at another token than the output's.
template <class S, class Visit>
inline void each_run(const Activation& out, const StepHeader& step, int64_t token, int64_t count,
                     const Visit& visit) {
  for (int64_t begin = 0, run; begin < count; begin += run) {
    const ActivationRow to = row_of(out, step, token + begin);
    const int64_t tile_left = S::kTileTokens - to.row % S::kTileTokens;
    run = count - begin < tile_left ? count - begin : tile_left;
    const int64_t sampled_left = step.num_generated - (token + begin);
    if (out.is_by_kind() && sampled_left > 0 && sampled_left < run) run = sampled_left;
    visit(to, begin, run);
  }
}

// A unit is two strips: 32 outputs, one block of the next product's input.
template <class S>
void gate_up_units(const GateUpParams& p, const StepHeader& step, Range units, int member) {
  const auto finish = [&](int64_t unit, int64_t token, int64_t count, const UnitOutputs& out) {
    if (p.rows != nullptr) return gate_up_rows<S>(p, unit, token, count, out);
    each_run<S>(p.out, step, token, count,
                [&](const ActivationRow& to, int64_t begin, int64_t run) {
                  const BlockSlot at = slot_of<S>(to.part, to.row, unit);
                  for_each_batch<S>(run, [&](auto n, int64_t first) {
                    finish_gate_up<S, n>(p, unit, out.from(begin + first), to.part.precision,
                                         at.block, at.slot + first);
                  });
                });
  };
  run_linear<S>(p.linear, tokens_of(step), units, 2, member, adapted<S>(p.linear, step, 2, finish));
}

template <class S>
void gate_up(const GateUpParams& p, const StepHeader& step, int member, int num_members) {
  const Range units = split(p.linear.weight.num_strips() / 2, member, num_members);
  gate_up_units<S>(p, step, units, member);
}

// Finishes `Count` tokens of a unit, which is a strip: 32 outputs, one block of the next product's
// input.
template <class S, int Count>
inline void finish_up(const UpParams& p, int64_t unit, const UnitOutputs& out, Precision precision,
                      uint8_t* block, int64_t slot) {
  const int64_t row = unit * kStripRows;
  typename S::F values[2][Count];
  BlockSlot to[Count];
  TGI_UNROLL(16)
  for (int t = 0; t < Count; ++t) {
    to[t] = {block, slot + t};
    const float* strip = out.row(0, t);
    for (int i = 0; i < 2; ++i) {
      const auto value = biased<S>(p.linear.bias, row + 16 * i, strip + 16 * i);
      values[i][t] = activate<S>(p.function, value);
    }
  }
  write_blocks<S, Count>(precision, values[0], values[1], to);
}

template <class S>
inline void up_units(const UpParams& p, const StepHeader& step, Range units, int member) {
  const auto finish = [&](int64_t unit, int64_t token, int64_t count, const UnitOutputs& out) {
    each_run<S>(p.out, step, token, count,
                [&](const ActivationRow& to, int64_t begin, int64_t run) {
                  const BlockSlot at = slot_of<S>(to.part, to.row, unit);
                  for_each_batch<S>(run, [&](auto n, int64_t first) {
                    finish_up<S, n>(p, unit, out.from(begin + first), to.part.precision, at.block,
                                    at.slot + first);
                  });
                });
  };
  run_linear<S>(p.linear, tokens_of(step), units, 1, member, adapted<S>(p.linear, step, 1, finish));
}

template <class S>
void up(const UpParams& p, const StepHeader& step, int member, int num_members) {
  const Range units = split(p.linear.weight.num_strips(), member, num_members);
  up_units<S>(p, step, units, member);
}

// Rows are divided so that two members never write to the same cache line.
template <class S>
void act_mul(const ActMulParams& p, const StepHeader& step, int member, int num_members) {
  const int64_t width = p.out.num_columns;
  const Range rows = split(step.num_tokens, member, num_members, S::kSharedTokens);
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const float *gate = p.gate + row * width, *up = p.up + row * p.up_stride;
    const ActivationRow out = row_of(p.out, step, row);
    for (int64_t k = 0; k < width; k += kBlockColumns) {
      typename S::F values[2][1];
      for (int64_t i = 0; i < 2; ++i) {
        values[i][0] =
            S::mul(activate<S>(p.function, S::load(gate + k + 16 * i)), S::load(up + k + 16 * i));
      }
      const BlockSlot to[1] = {slot_of<S>(out.part, out.row, k / kBlockColumns)};
      write_blocks<S, 1>(out.part.precision, values[0], values[1], to);
    }
  }
}

// Rows may have any width.
template <class S>
void activate_rows(const ActivateParams& p, const StepHeader& step, int member, int num_members) {
  const int64_t whole = p.width / 16 * 16;
  const auto left = static_cast<int>(p.width - whole);
  const Range rows = split(step.num_tokens, member, num_members);
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const float* const x = p.x + row * p.stride;
    float* const out = p.out + row * p.width;
    for (int64_t k = 0; k < whole; k += 16) {
      S::store(out + k, activate<S>(p.function, S::load(x + k)));
    }
    if (left == 0) continue;
    const auto last = S::load_head(x + whole, left, S::zero());
    S::store_head(out + whole, left, activate<S>(p.function, last));
  }
}

}  // namespace
}  // namespace tgi::cpu::step
