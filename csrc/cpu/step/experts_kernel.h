// The MLPs of routed experts: gathers each expert's tokens, multiplies them, and sums the results,
// as rows or in the residual. Processes the experts in passes, so that the buffers are no larger
// than those of a step:
//
//   gather    rows of the activation; each expert's rows start at a tile boundary
//   inner     the units of all experts' gates and ups, or ups alone, of the pass, divided by work
//   down      each member owns some columns of the sums, for every expert
//
// The member that owns a column adds a token's experts in ascending order, so the bits do not
// depend on the batch, and no member waits between two experts. Included only by the step_<isa>.cpp
// files.
#pragma once

#include <algorithm>

#include "../team.h"
#include "mlp_kernels.h"

namespace tgi::cpu::step {
namespace {

// Cost of reading a unit's weights, in tokens multiplied.
constexpr int64_t kReadingTokens = 4;

template <class S>
constexpr int64_t tiles_of(int64_t rows) {
  return (rows + S::kTileTokens - 1) / S::kTileTokens;
}

// Number of tiles before an expert's tiles, in buffers of one part and of two parts.
struct TilesBefore {
  int64_t all = 0, sampled = 0, prompts = 0;

  template <class S>
  void add(const ExpertTokens& its) {
    all += tiles_of<S>(its.num_tokens);
    sampled += tiles_of<S>(its.num_sampled);
    prompts += tiles_of<S>(its.num_tokens - its.num_sampled);
  }
  template <class S>
  Activation of(Activation buffer) const {
    if (!buffer.is_by_kind()) {
      buffer.data += all * buffer.tile_bytes(S::kTileTokens);
      return buffer;
    }
    buffer.data += sampled * buffer.tile_bytes(S::kTileTokens);
    buffer.prompt_data += prompts * buffer.of_prompts().tile_bytes(S::kTileTokens);
    return buffer;
  }
};

// Experts [begin, end) of those that have tokens.
struct ExpertPass {
  const ExpertTokens* begin;
  const ExpertTokens* end;

  // Calls visit(expert's tokens, tiles before them).
  template <class S, class Visit>
  void each(const Visit& visit) const {
    TilesBefore tiles;
    for (const ExpertTokens* its = begin; its != end; ++its) {
      visit(*its, tiles);
      tiles.add<S>(*its);
    }
  }
};

// Returns as many experts from `begin` on as fit in the buffers, but at least one.
template <class S>
inline ExpertPass next_pass(const ExpertsParams& p, const ExpertTokens* begin) {
  const ExpertTokens* const last = p.routing.experts + *p.routing.num_used;
  TilesBefore tiles;
  const ExpertTokens* end = begin;
  for (; end != last; ++end) {
    tiles.add<S>(*end);
    if (end != begin && tiles.all > p.num_tiles) break;
  }
  return {begin, end};
}

// Copies a row of blocks unchanged from one place in the tiles to another.
template <class S>
inline void copy_row(const ActivationRow& from, const ActivationRow& to) {
  const Precision precision = from.part.precision;
  const int64_t block_bytes = tile_block_bytes(precision, S::kTileTokens);
  const int64_t width = precision == Precision::kInt8   ? kBlockColumns
                        : precision == Precision::kBF16 ? 2 * kBlockColumns
                                                        : 4 * kBlockColumns;
  const int64_t from_slot = from.row % S::kTileTokens, to_slot = to.row % S::kTileTokens;
  const uint8_t* source = from.part.block(from.row, 0, S::kTileTokens);
  uint8_t* target = to.part.block(to.row, 0, S::kTileTokens);
  constexpr int64_t kNumbers = token_numbers(S::kTileTokens);
  for (int64_t block = 0; block < from.part.num_columns / kBlockColumns; ++block) {
    std::memcpy(target + to_slot * width, source + from_slot * width, static_cast<size_t>(width));
    if (precision == Precision::kInt8) {
      std::memcpy(target + kNumbers + to_slot * kTokenNumbers,
                  source + kNumbers + from_slot * kTokenNumbers, kTokenNumbers);
    }
    source += block_bytes;
    target += block_bytes;
  }
}

// Returns a member's own copy of the input, if it has one, else the shared input.
template <class S>
inline Activation input_of(const ExpertsParams& p, const StepHeader& step, int member) {
  Activation in = p.in;
  if (!p.is_private || step.num_tokens > kPrivateTokens) return in;
  in.data += member * in.tile_bytes(S::kTileTokens);
  if (in.is_by_kind()) in.prompt_data += member * in.of_prompts().tile_bytes(S::kTileTokens);
  return in;
}

// Copies rows of the input to the tiles of the pass. Members own whole tiles, so no two write to
// the same cache line.
template <class S>
inline void gather(const ExpertsParams& p, const StepHeader& step, const ExpertPass& pass,
                   int member, int num_members) {
  const Activation in = input_of<S>(p, step, member);
  TilesBefore total;
  for (const ExpertTokens* its = pass.begin; its != pass.end; ++its) total.add<S>(*its);
  const Range mine =
      split(in.is_by_kind() ? total.sampled + total.prompts : total.all, member, num_members);
  int64_t before = 0;  // tiles, over all parts
  // Copies the member's rows among rows [0, size) of a part of an expert; `tokens` are their
  // indices in the step.
  const auto copy_part = [&](const Activation& to, const int32_t* tokens, int64_t size) {
    const int64_t tiles = tiles_of<S>(size);
    const int64_t begin = std::max(mine.begin - before, int64_t{0});
    const int64_t end = std::min(mine.end - before, tiles);
    before += tiles;
    for (int64_t row = begin * S::kTileTokens; row < std::min(end * S::kTileTokens, size); ++row) {
      copy_row<S>(row_of(in, step, tokens[row]), {to, row});
    }
  };
  pass.each<S>([&](const ExpertTokens& its, const TilesBefore& tiles) {
    const int32_t* const tokens = p.routing.tokens + its.first;
    const Activation to = tiles.of<S>(p.gathered);
    if (!in.is_by_kind()) return copy_part(to, tokens, its.num_tokens);
    Activation sampled = to;
    sampled.prompt_data = nullptr;
    copy_part(sampled, tokens, its.num_sampled);
    copy_part(to.of_prompts(), tokens + its.num_sampled, its.num_tokens - its.num_sampled);
  });
}

// Returns one expert's product.
inline LinearParams product_of(const ExpertProduct& product, int32_t expert, const Activation& in) {
  LinearParams linear = product.linear;
  linear.weight = product.matrices.weights[expert];
  linear.bias = product.matrices.biases == nullptr ? nullptr : product.matrices.biases[expert];
  linear.in = in;
  return linear;
}

// For an expert whose gate and up have different formats: for each 32 outputs, computes the gates
// first and keeps them until the ups are computed.
template <class S>
inline void gate_then_up(const ExpertsParams& p, int32_t expert, const StepHeader& header,
                         const Activation& in, const GateUpParams& to, Range units, int member) {
  float* const gates = p.gates + member * p.gate_floats;  // [tokens][32]
  const LinearParams gate = product_of(p.gate_up[0], expert, in);
  const LinearParams up = product_of(p.gate_up[1], expert, in);
  const auto keep = [&](int64_t unit, int64_t token, int64_t count, const UnitOutputs& out) {
    for (int64_t t = 0; t < count; ++t) {
      for (int64_t half = 0; half < kStripRows; half += 16) {
        S::store(gates + (token + t) * kStripRows + half,
                 biased<S>(gate.bias, unit * kStripRows + half, out.row(0, t) + half));
      }
    }
  };
  const auto finish = [&](int64_t unit, int64_t token, int64_t count, const UnitOutputs& out) {
    for (int64_t t = 0; t < count; ++t) {
      typename S::F values[2][1];
      for (int64_t i = 0; i < 2; ++i) {
        const auto value = S::load(gates + (token + t) * kStripRows + 16 * i);
        const auto other = biased<S>(up.bias, unit * kStripRows + 16 * i, out.row(0, t) + 16 * i);
        values[i][0] = gated<S>(to, value, other);
      }
      const ActivationRow row = row_of(to.out, header, token + t);
      const BlockSlot place[1] = {slot_of<S>(row.part, row.row, unit)};
      write_blocks<S, 1>(row.part.precision, values[0], values[1], place);
    }
  };
  for (int64_t unit = units.begin; unit < units.end; ++unit) {
    run_linear<S>(gate, tokens_of(header), {unit, unit + 1}, 1, member, keep);
    run_linear<S>(up, tokens_of(header), {unit, unit + 1}, 1, member, finish);
  }
}

inline StepHeader header_of(const ExpertTokens& its) {
  StepHeader header = {};
  header.num_tokens = its.num_tokens;
  header.num_generated = its.num_sampled;
  return header;
}

// Computes the member's part of all (expert, unit) pairs, divided by work.
template <class S>
inline void inner_pass(const ExpertsParams& p, const StepHeader& step, const ExpertPass& pass,
                       int member, int num_members) {
  const int64_t num_units = p.inner.num_columns / kBlockColumns;
  const auto cost_of = [](const ExpertTokens& its) { return kReadingTokens + its.num_tokens; };
  int64_t total = 0;
  for (const ExpertTokens* its = pass.begin; its != pass.end; ++its) {
    total += num_units * cost_of(*its);
  }
  const int64_t begin = total * member / num_members, end = total * (member + 1) / num_members;
  const bool is_one = step.num_tokens == 1;  // each expert's only row is the input row
  int64_t before = 0;
  pass.each<S>([&](const ExpertTokens& its, const TilesBefore& tiles) {
    // A unit belongs to the member in whose part it begins.
    const int64_t cost = cost_of(its), first = before;
    const auto unit_at = [&](int64_t border) {
      const int64_t unit = (border - first + cost - 1) / cost;
      return border <= first ? 0 : std::min(unit, num_units);
    };
    before += num_units * cost;
    const Range units = {unit_at(begin), unit_at(end)};
    if (units.begin >= units.end) return;
    const StepHeader header = header_of(its);
    const Activation in = is_one ? input_of<S>(p, step, member) : tiles.of<S>(p.gathered);
    if (!p.is_gated) {
      const UpParams up = {
          .linear = product_of(p.gate_up[0], its.expert, in),
          .function = p.function,
          .out = tiles.of<S>(p.inner),
      };
      return up_units<S>(up, header, units, member);
    }
    GateUpParams params = {};
    params.function = p.function;
    params.clamped = p.clamped;
    params.out = tiles.of<S>(p.inner);
    if (p.num_parts == 2) {
      return gate_then_up<S>(p, its.expert, header, in, params, units, member);
    }
    params.linear = product_of(p.gate_up[0], its.expert, in);
    gate_up_units<S>(params, header, units, member);
  });
}

// Returns the strips of the sums' columns that a member owns.
inline Range own_strips(const ExpertsParams& p, int member, int num_members) {
  return split(p.down.matrices.weights[0].num_rows / kStripRows, member, num_members);
}

// Zeroes the member's columns of all tokens: those that no expert takes have a sum, too.
template <class S>
inline void clear_sums(const ExpertsParams& p, const StepHeader& step, int member,
                       int num_members) {
  const int64_t width = p.down.matrices.weights[0].num_rows;
  const Range strips = own_strips(p, member, num_members);
  for (int64_t token = 0; token < step.num_tokens; ++token) {
    float* const row = p.out + token * width;
    for (int64_t k = strips.begin * kStripRows; k < strips.end * kStripRows; k += 16) {
      S::store(row + k, S::zero());
    }
  }
}

// Adds the experts of the pass to the member's columns of the sums.
template <class S>
inline void down_pass(const ExpertsParams& p, const ExpertPass& pass, int member, int num_members) {
  const int64_t width = p.down.matrices.weights[0].num_rows;
  const Range units = own_strips(p, member, num_members);
  pass.each<S>([&](const ExpertTokens& its, const TilesBefore& tiles) {
    const LinearParams linear = product_of(p.down, its.expert, tiles.of<S>(p.inner));
    const int32_t* const tokens = p.routing.tokens + its.first;
    const float* const weights = p.routing.token_weights + its.first;
    const auto fetch = [&](int64_t unit, int64_t row, int64_t count) {
      for (int64_t t = 0; t < count; ++t) {
        const float* out = p.out + tokens[row + t] * width + unit * kStripRows;
        S::prefetch_write(out);
        S::prefetch_write(out + 16);
      }
    };
    const auto add = [&](int64_t unit, int64_t row, int64_t count, const UnitOutputs& product) {
      for (int64_t t = 0; t < count; ++t) {
        float* out = p.out + tokens[row + t] * width + unit * kStripRows;
        const auto weight = S::set1(p.factor * weights[row + t]);
        for (int64_t half = 0; half < kStripRows; half += 16) {
          const auto value =
              biased<S>(linear.bias, unit * kStripRows + half, product.row(0, t) + half);
          S::store(out + half, S::fma(weight, value, S::load(out + half)));
        }
      }
    };
    run_linear<S>(linear, tokens_of(header_of(its)), units, 1, member, fetch, add);
  });
}

template <class S>
void experts(const ExpertsParams& p, const StepHeader& step, int member, int num_members) {
  if (!p.adds) clear_sums<S>(p, step, member, num_members);
  const ExpertTokens* const last = p.routing.experts + *p.routing.num_used;
  for (const ExpertTokens* begin = p.routing.experts; begin != last;) {
    const ExpertPass pass = next_pass<S>(p, begin);
    if (step.num_tokens > 1) {
      gather<S>(p, step, pass, member, num_members);
      team_barrier();
    } else if (begin != p.routing.experts) {
      team_barrier();  // the previous pass has read what this pass overwrites
    }
    inner_pass<S>(p, step, pass, member, num_members);
    team_barrier();
    down_pass<S>(p, pass, member, num_members);
    begin = pass.end;
  }
}

template <class S>
void gated_add(const GatedAddParams& p, const StepHeader& step, int member, int num_members) {
  const Range tokens = split(step.num_tokens, member, num_members);
  for (int64_t token = tokens.begin; token < tokens.end; ++token) {
    const auto gate = S::set1(p.gate[token * p.gate_stride]);
    const auto weight = S::mul(sigmoid<S>(gate), S::set1(p.factor));
    const float* const rows = p.rows + token * p.num_columns;
    float* const x = p.x + token * p.num_columns;
    for (int64_t k = 0; k < p.num_columns; k += 16) {
      S::store(x + k, S::fma(weight, S::load(rows + k), S::load(x + k)));
    }
  }
}

}  // namespace
}  // namespace tgi::cpu::step
