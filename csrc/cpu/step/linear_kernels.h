// Products and their epilogues, which run while the outputs are in L1: residual add, RoPE and KV
// write, gate times up, logits. Included only by the step_<isa>.cpp files.
#pragma once

#include <algorithm>
#include <array>
#include <utility>

#include "../team.h"
#include "adapter_kernel.h"
#include "amx_linear.h"
#include "decode_weights.h"
#include "decoded_linear.h"
#include "linear_tile.h"
#include "simd_math.h"
#include "step.h"

namespace tgi::cpu::step {
namespace {

constexpr int64_t kMaxUnitStrips = kMaxHeadDim / kStripRows;  // one head

// The outputs of a unit's product for some tokens: [tokens][32] per strip.
struct UnitOutputs {
  float* data;
  int64_t strip_floats;  // from one strip to the next

  const float* row(int64_t strip, int64_t token) const {
    return data + strip * strip_floats + token * kStripRows;
  }
  UnitOutputs from(int64_t token) const { return {data + token * kStripRows, strip_floats}; }
};

// Indexed by a group's number of tokens minus one.
template <class S>
using GroupFunctions = std::array<GroupFunction<S>, S::kGroupTokens>;

template <class S, class Fmt, int... Before>
constexpr GroupFunctions<S> int8_functions(std::integer_sequence<int, Before...>) {
  return {int8_strip<S, Fmt, Before + 1>...};
}

template <class S, class Fmt, int... Before>
constexpr GroupFunctions<S> float_functions(std::integer_sequence<int, Before...>) {
  return {float_strip<S, Fmt, Before + 1>...};
}

template <class S>
inline GroupFunctions<S> group_functions(Format format, Precision precision) {
  constexpr std::make_integer_sequence<int, S::kGroupTokens> kBefore;
  if (is_widened(format, precision)) return float_functions<S, F32<S>>(kBefore);
  if (is_decoded_to_bf16(format, precision)) return float_functions<S, BF16<S>>(kBefore);
  switch (format) {
#define TGI_FLOAT_FORMAT(name, ...) \
  case Format::k##name:             \
    return float_functions<S, name<S>>(kBefore);
#define TGI_CODE_FORMAT(name, ...) \
  case Format::k##name:            \
    return int8_functions<S, name<S>>(kBefore);
#define TGI_DECODED_FORMAT(...)
#include "../../formats.def"
    default:
      return {};
  }
}

// Tokens whose activations stay in L2.
template <class S>
inline int64_t cached_tokens(const LinearParams& p) {
  const bool is_wide = p.in.precision == Precision::kFloat32 || p.weight.num_columns > 1024;
  return (is_wide ? 192 : 576) / S::kTileTokens * S::kTileTokens;
}

// Of many tokens, a product's prologue sees only the first ones.
constexpr int64_t kPrologueTokens = 32;

inline float* scratch_of(const LinearParams& p, int member) {
  return p.scratch == nullptr ? nullptr : p.scratch + member * p.scratch_floats;
}

// Runs a member's units [begin, end) of `unit_strips` strips each, for all tokens. epilogue(unit,
// token, count, outputs) receives a group of tokens starting at `token`, in L1; prologue(unit,
// token, count) runs before their product. For each batch of cached_tokens() tokens, the outer loop
// is over units, so a batch reads the weights from memory once.
template <class S, class Prologue, class Epilogue>
void run_groups(const LinearParams& p, int64_t num_tokens, Range units, int64_t unit_strips,
                int member, const Prologue& prologue, const Epilogue& epilogue) {
  const int64_t scratch_size = scratch_panel_size(p.weight, p.in.precision);
  const bool is_scratch = scratch_size > 0;
  const int64_t num_blocks = p.weight.num_columns / kBlockColumns;
  const int64_t panel_size = is_scratch ? scratch_size : p.weight.panel_size();
  const int64_t block_lines = (2 * panel_size / num_blocks + 63) / 64;
  const int64_t at_once = cached_tokens<S>(p), tile_bytes = p.in.tile_bytes(S::kTileTokens);
  float* const scratch = scratch_of(p, member);
  const GroupFunctions<S> functions = group_functions<S>(p.weight.format, p.in.precision);
  constexpr int64_t kStripFloats = S::kGroupTokens * kStripRows;
  alignas(64) float out[kMaxUnitStrips * kStripFloats];

  for (int64_t first = 0; first < num_tokens; first += at_once) {
    const int64_t end = first + at_once < num_tokens ? first + at_once : num_tokens;
    const int64_t groups = num_groups<S>(end - first);
    const int64_t lines = is_scratch ? 0 : (block_lines + groups - 1) / groups;
    // The first group reads from memory; of three and more, each fetches a part of the next unit.
    const bool is_near = kPanelDistance > 0 && groups <= 2 && p.in.precision == Precision::kInt8;
    for (int64_t unit = units.begin; unit < units.end; ++unit) {
      const uint8_t* weights = p.weight.panel(2 * unit * unit_strips);
      if (is_scratch) {
        for (int64_t panel = 0; panel < 2 * unit_strips; ++panel) {
          fill_scratch<S>(p, 2 * unit * unit_strips + panel, scratch + panel * panel_size / 4);
        }
        weights = reinterpret_cast<const uint8_t*>(scratch);
      }
      int64_t fetched = 0;  // of a block's lines, by earlier groups
      for (int64_t token = first; token < end; fetched += lines) {
        const int64_t count = group_size<S>(token, end);
        const TokenGroup<S> group = {p.in.data + token / S::kTileTokens * tile_bytes,
                                     token % S::kTileTokens};
        prologue(unit, token, count);
        for (int64_t strip = 0; strip < unit_strips; ++strip) {
          const uint8_t* panel = weights + 2 * strip * panel_size;
          Ahead ahead = {panel + 2 * unit_strips * panel_size + fetched * num_blocks * 64,
                         fetched < block_lines ? lines : 0};
          if (is_near) ahead.lines = token == first ? Ahead::kNear : 0;
          functions[count - 1](panel, panel + panel_size, group, num_blocks,
                               out + strip * kStripFloats, ahead);
        }
        epilogue(unit, token, count, UnitOutputs{out, kStripFloats});
        token += count;
      }
    }
  }
}

// Passes the outputs of tokens [begin, end) to the epilogue, group by group.
template <class S, class Epilogue>
inline void finish_groups(int64_t unit, int64_t begin, int64_t end, UnitOutputs outputs,
                          const Epilogue& epilogue) {
  for (int64_t token = begin; token < end;) {
    const int64_t count = group_size<S>(token, end);
    epilogue(unit, token, count, outputs.from(token - begin));
    token += count;
  }
}

// The same as run_groups, with codes that are decoded once for all tokens.
template <class S, class Prologue, class Epilogue>
void run_decoded(const LinearParams& p, const PartFunctions<S>& functions, int64_t num_tokens,
                 Range units, int64_t unit_strips, int member, const Prologue& prologue,
                 const Epilogue& epilogue) {
  // Batches of about the same size, so that none has only a few tokens.
  const int64_t num_batches = (num_tokens + cached_tokens<S>(p) - 1) / cached_tokens<S>(p);
  const int64_t num_tiles = (num_tokens + S::kTileTokens - 1) / S::kTileTokens;
  const int64_t at_once = (num_tiles + num_batches - 1) / num_batches * S::kTileTokens;
  auto* const decoded = reinterpret_cast<uint8_t*>(scratch_of(p, member));
  float* const sums = scratch_of(p, member) + part_floats<S>(p.weight.format);
  for (int64_t first = 0; first < num_tokens; first += at_once) {
    const int64_t end = std::min(first + at_once, num_tokens);
    const int64_t strip_floats = (end - first) * kStripRows;
    for (int64_t unit = units.begin; unit < units.end; ++unit) {
      prologue(unit, first, std::min(end - first, kPrologueTokens));
      for (int64_t strip = 0; strip < unit_strips; ++strip) {
        run_decoded_strip<S>(p, functions, first, end, unit * unit_strips + strip, decoded,
                             sums + strip * strip_floats);
      }
      finish_groups<S>(unit, first, end, {sums, strip_floats}, epilogue);
    }
  }
}

// Multiplies tokens [first, end) by some units, part of the columns after part, with bf16 tiles.
// sums: [units][strips][tokens][32].
template <class S, class Prologue>
void add_bf16_units(const LinearParams& p, int64_t first, int64_t end, Range units,
                    int64_t unit_strips, int64_t part_blocks, uint8_t* decoded, float* sums,
                    const Prologue& prologue) {
  const int64_t num_blocks = p.weight.num_columns / kBlockColumns;
  const int64_t num_tiles = (end - first + kTileRows - 1) / kTileRows;
  const int64_t tile_bytes = p.in.tile_bytes(kTileRows);
  const uint8_t* const x = p.in.data + first / kTileRows * tile_bytes;
  for (int64_t block = 0; block < num_blocks; block += part_blocks) {
    const int64_t stop = block + part_blocks < num_blocks ? block + part_blocks : num_blocks;
    float* out = sums;
    for (int64_t unit = units.begin; unit < units.end; ++unit) {
      if (block == 0) prologue(unit, first, std::min(end - first, kPrologueTokens));
      for (int64_t strip = 0; strip < unit_strips; ++strip, out += num_tiles * kTileFloats) {
        const int64_t panel = 2 * (unit * unit_strips + strip);
        const TileOperands in = {{p.weight.panel(panel), p.weight.panel(panel + 1)}, x, tile_bytes};
        bf16_tiles_strip<S>(in, p.weight.format, block, stop, num_tiles, decoded, out);
      }
    }
  }
}

// The same as run_groups, with bf16 tiles.
template <class S, class Prologue, class Epilogue>
void run_bf16_tiles(const LinearParams& p, int64_t num_tokens, Range units, int64_t unit_strips,
                    int member, const Prologue& prologue, const Epilogue& epilogue) {
  const TileScope<typename S::Tiles> scope(bf16_tiles(num_tokens));
  const TilePortion portion = tile_portion(p.weight.num_columns, unit_strips);
  const int64_t num_units = portion.strips / unit_strips;
  float* const sums = scratch_of(p, member);
  auto* const decoded =
      reinterpret_cast<uint8_t*>(sums + portion.strips * kMaxTileTokens * kStripRows);
  for (int64_t first = 0; first < num_tokens; first += kMaxTileTokens) {
    const int64_t end = first + kMaxTileTokens < num_tokens ? first + kMaxTileTokens : num_tokens;
    const int64_t strip_floats = (end - first + kTileRows - 1) / kTileRows * kTileFloats;
    // Few tokens wait for the weights, which are read from memory in order.
    const bool is_few = end - first <= 2 * kTileRows;
    const int64_t part = is_few ? p.weight.num_columns / kBlockColumns : portion.blocks;
    for (int64_t begin = units.begin; begin < units.end; begin += num_units) {
      const Range now = {begin, begin + num_units < units.end ? begin + num_units : units.end};
      add_bf16_units<S>(p, first, end, now, unit_strips, part, decoded, sums, prologue);
      for (int64_t unit = now.begin; unit < now.end; ++unit) {
        float* const of_unit = sums + (unit - begin) * unit_strips * strip_floats;
        finish_groups<S>(unit, first, end, {of_unit, strip_floats}, epilogue);
      }
    }
  }
}

// The same with int8 tiles, for codes.
template <class S, class Prologue, class Epilogue>
void run_int8_tiles(const LinearParams& p, const Int8TileFunctions<S>& functions,
                    int64_t num_tokens, Range units, int64_t unit_strips, int member,
                    const Prologue& prologue, const Epilogue& epilogue) {
  const TileScope<typename S::Tiles> scope(kInt8Tiles);
  const int64_t num_blocks = p.weight.num_columns / kBlockColumns;
  const int64_t at_once = cached_tokens<S>(p), tile_bytes = p.in.tile_bytes(kTileRows);
  const int64_t decoded_bytes = num_blocks * decoded_block_bytes<S>(p.weight.format);  // per panel
  const int64_t block_lines = (p.weight.panel_size() / num_blocks + 63) / 64;
  auto* const decoded = reinterpret_cast<uint8_t*>(scratch_of(p, member));
  alignas(64) float out[kMaxUnitStrips * kTileFloats];
  for (int64_t first = 0; first < num_tokens; first += at_once) {
    const int64_t end = first + at_once < num_tokens ? first + at_once : num_tokens;
    const int64_t num_tiles = (end - first + kTileRows - 1) / kTileRows;
    for (int64_t unit = units.begin; unit < units.end; ++unit) {
      for (int64_t panel = 0; panel < 2 * unit_strips; ++panel) {
        functions.decode(p.weight.panel(2 * unit * unit_strips + panel), num_blocks,
                         decoded + panel * decoded_bytes);
      }
      for (int64_t token = first; token < end; token += kTileRows) {
        const int64_t last = token + kTileRows < end ? token + kTileRows : end;
        const TokenGroup<S> x = {p.in.data + token / kTileRows * tile_bytes, 0};
        // Each tile fetches its share of the next unit's lines.
        const int64_t tile = (token - first) / kTileRows;
        const int64_t fetched = block_lines * tile / num_tiles;
        const int64_t lines = block_lines * (tile + 1) / num_tiles - fetched;
        prologue(unit, token, last - token);
        for (int64_t panel = 0; panel < 2 * unit_strips; ++panel) {
          const uint8_t* const next = p.weight.panel(2 * (unit + 1) * unit_strips + panel);
          functions.multiply(decoded + panel * decoded_bytes, x, num_blocks,
                             out + panel / 2 * kTileFloats + panel % 2 * kPanelRows,
                             {next + fetched * num_blocks * 64, lines});
        }
        finish_groups<S>(unit, token, last, {out, kTileFloats}, epilogue);
      }
    }
  }
}

// Runs the tokens of one kind, which share one arithmetic.
template <class S, class Prologue, class Epilogue>
void run_one_kind(const LinearParams& p, int64_t num_tokens, Range units, int64_t unit_strips,
                  int member, const Prologue& prologue, const Epilogue& epilogue) {
  if constexpr (S::kHasTiles) {
    if (p.in.precision == Precision::kBF16) {
      return run_bf16_tiles<S>(p, num_tokens, units, unit_strips, member, prologue, epilogue);
    }
    if (p.in.precision == Precision::kInt8 && is_for_tiles(num_tokens)) {
      const auto functions = int8_tile_functions<S>(p.weight.format);
      if (functions.decode != nullptr) {
        return run_int8_tiles<S>(p, functions, num_tokens, units, unit_strips, member, prologue,
                                 epilogue);
      }
    }
  }
  if constexpr (S::kDecodesCodes) {
    if (kUnpackingIsSlow && p.in.precision == Precision::kInt8) {
      const auto functions = part_functions<S>(p.weight.format);
      if (num_groups<S>(num_tokens) >= functions.min_groups) {
        return run_decoded<S>(p, functions, num_tokens, units, unit_strips, member, prologue,
                              epilogue);
      }
    }
  }
  run_groups<S>(p, num_tokens, units, unit_strips, member, prologue, epilogue);
}

// The tokens of a product; the first `generated` tokens were sampled.
struct TokenCount {
  int64_t all, generated;
};

inline TokenCount tokens_of(const StepHeader& step) {
  return {step.num_tokens, step.num_generated};
}

// If prompt tokens use their own arithmetic, each unit first multiplies the sampled tokens and then
// the prompt tokens, so its weights come from memory once.
template <class S, class Prologue, class Epilogue>
void run_linear(const LinearParams& p, TokenCount tokens, Range units, int64_t unit_strips,
                int member, const Prologue& prologue, const Epilogue& epilogue) {
  if (units.begin >= units.end || tokens.all == 0) return;
  const bool is_private = p.is_private && tokens.all <= kPrivateTokens;
  const auto of_member = [&](const Activation& in) {
    LinearParams mine = p;
    mine.in = in;
    if (is_private) mine.in.data += member * in.tile_bytes(S::kTileTokens);
    return mine;
  };
  const LinearParams sampled = of_member(p.in);
  const int64_t first = p.in.is_by_kind() ? tokens.generated : tokens.all;
  const int64_t num_prompt = tokens.all - first;
  if (num_prompt == 0) {
    return run_one_kind<S>(sampled, first, units, unit_strips, member, prologue, epilogue);
  }
  LinearParams prompts = of_member(p.in.of_prompts());
  if (p.scratch != nullptr) prompts.scratch += p.prompt_scratch;
  const auto prompt_prologue = [&](int64_t unit, int64_t token, int64_t count) {
    if (token == 0 && first > 0) {
      run_one_kind<S>(sampled, first, {unit, unit + 1}, unit_strips, member, prologue, epilogue);
      if constexpr (S::kHasTiles) S::Tiles::configure(bf16_tiles(num_prompt));
    }
    prologue(unit, first + token, count);
  };
  const auto prompt_epilogue = [&](int64_t unit, int64_t token, int64_t count,
                                   const UnitOutputs& out) {
    epilogue(unit, first + token, count, out);
  };
  if constexpr (S::kHasTiles) {
    run_bf16_tiles<S>(prompts, num_prompt, units, unit_strips, member, prompt_prologue,
                      prompt_epilogue);
  } else {
    run_groups<S>(prompts, num_prompt, units, unit_strips, member, prompt_prologue,
                  prompt_epilogue);
  }
}

// A member's work memory, in floats, for units of `unit_strips` strips. A set with tiles shares it
// between them and the vector kernels.
template <class S>
int64_t scratch_floats(const PackedMatrix& weight, Precision precision, int64_t unit_strips) {
  int64_t decoded = 0;
  if constexpr (S::kDecodesCodes) {
    if (kUnpackingIsSlow && precision == Precision::kInt8) {
      decoded = decoded_scratch_floats<S>(weight.format, unit_strips);
    }
  }
  if constexpr (S::kHasTiles) {
    if (precision != Precision::kFloat32) {
      return std::max(decoded, tile_scratch_floats<S>(weight, precision, unit_strips));
    }
  }
  if (decoded > 0) return decoded;
  return 2 * unit_strips * scratch_panel_size(weight, precision) / 4;
}

template <class S, class Epilogue>
void run_linear(const LinearParams& p, TokenCount tokens, Range units, int64_t unit_strips,
                int member, const Epilogue& epilogue) {
  const auto nothing = [](int64_t, int64_t, int64_t) {};
  run_linear<S>(p, tokens, units, unit_strips, member, nothing, epilogue);
}

// Returns an epilogue that first adds the terms of the tokens' adapters to a product of this step.
template <class S, class Epilogue>
inline auto adapted(const LinearParams& p, const StepHeader& step, int64_t unit_strips,
                    const Epilogue& epilogue) {
  const bool is_adapted = step.num_adapters > 0 && p.adapter.inner != nullptr;
  return [&, unit_strips, is_adapted](int64_t unit, int64_t token, int64_t count,
                                      const UnitOutputs& out) {
    if (is_adapted) {
      expand<S>(p.adapter, step, unit, unit_strips, token, count, out.data, out.strip_floats);
    }
    epilogue(unit, token, count, out);
  };
}

template <class S>
inline typename S::F biased(const float* bias, int64_t row, const float* out) {
  return bias == nullptr ? S::load(out) : S::add(S::load(out), S::load(bias + row));
}

// How many tokens ahead of its use the residual is prefetched, when many tokens are added at once.
constexpr int64_t kResidualAhead = 32;

template <class S>
void linear_add(const LinearAddParams& p, const StepHeader& step, int member, int num_members) {
  const int64_t width = p.linear.weight.num_rows;
  const Range units = split(p.linear.weight.num_strips(), member, num_members);
  // All members have written the residual, so it is prefetched while the product is computed.
  const auto fetch = [&](int64_t unit, int64_t token, int64_t count) {
    for (int64_t t = 0; t < count; ++t) {
      const float* x = p.x + (token + t) * width + unit * kStripRows;
      S::prefetch_write(x);
      S::prefetch_write(x + 16);
    }
  };
  const auto add = [&](int64_t unit, int64_t token, int64_t count, const UnitOutputs& out) {
    for (int64_t t = 0; t < count; ++t) {
      float* x = p.x + (token + t) * width + unit * kStripRows;
      if (token + t + kResidualAhead < step.num_tokens) {
        S::prefetch_write(x + kResidualAhead * width);
        S::prefetch_write(x + kResidualAhead * width + 16);
      }
      for (int64_t half = 0; half < 32; half += 16) {
        auto sum = biased<S>(p.linear.bias, unit * kStripRows + half, out.row(0, t) + half);
        if (p.factor != 1.0f) sum = S::mul(sum, S::set1(p.factor));
        S::store(x + half, S::add(S::load(x + half), sum));
      }
    }
  };
  run_linear<S>(p.linear, tokens_of(step), units, 1, member, fetch,
                adapted<S>(p.linear, step, 1, add));
}

template <class S>
void linear_rows(const LinearRowsParams& p, const StepHeader& step, int member, int num_members) {
  const Range units = split(p.linear.weight.num_strips(), member, num_members);
  const auto store = [&](int64_t unit, int64_t token, int64_t count, const UnitOutputs& out) {
    for (int64_t t = 0; t < count; ++t) {
      const int64_t row = unit * kStripRows;
      float* to = p.out + (token + t) * p.stride + row;
      for (int64_t half = 0; half < 32; half += 16) {
        S::store(to + half, biased<S>(p.linear.bias, row + half, out.row(0, t) + half));
      }
    }
  };
  run_linear<S>(p.linear, tokens_of(step), units, 1, member, adapted<S>(p.linear, step, 1, store));
}

template <class S>
void logits(const LogitsParams& p, const StepHeader& step, int member, int num_members) {
  const Range units = split(p.linear.weight.num_strips(), member, num_members);
  const auto store = [&](int64_t unit, int64_t row, int64_t count, const UnitOutputs& out) {
    const int64_t column = unit * kStripRows, width = p.vocab_size - column;
    for (int64_t t = 0; t < count; ++t) {
      float* const logits = p.logits + (row + t) * p.vocab_size + column;
      // Whole units go straight to their place: a copy of varying size is a call.
      alignas(64) float values[kStripRows];
      float* const to = width >= kStripRows ? logits : values;
      for (int64_t half = 0; half < 32; half += 16) {
        auto value = biased<S>(p.linear.bias, column + half, out.row(0, t) + half);
        if (p.scale != 1.0f) value = S::mul(value, S::set1(p.scale));
        if (p.cap != 0) {  // cap * tanh(x / cap), where tanh(y) = 1 - 2 / (e^2y + 1)
          const auto e = exp2<S, false>(S::mul(value, S::set1(2 * kFloatLog2E / p.cap)));
          const auto part = S::div(S::set1(2.0f), S::add(e, S::set1(1.0f)));
          value = S::mul(S::set1(p.cap), S::sub(S::set1(1.0f), part));
        }
        S::store(to + half, value);
      }
      if (to == values && width > 0) std::memcpy(logits, values, width * sizeof(float));
    }
  };
  run_linear<S>(p.linear, {step.num_rows, 0}, units, 1, member, store);
}

}  // namespace
}  // namespace tgi::cpu::step
