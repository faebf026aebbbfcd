// The inner products: 32 rows times a group of tokens over all columns, with accumulators in
// registers.
//
// Whatever the number of tokens, an output is the same sequence of roundings: integer sums within a
// block are exact; across blocks there is one float accumulator, with blocks ascending and explicit
// fma. A token's result therefore does not depend on its batch. Included only by the step_<isa>.cpp
// files.
#pragma once

#include <algorithm>

#include "decoded_codes.h"
#include "linear_formats.h"
#include "stream.h"

namespace tgi::cpu::step {
namespace {

// Up to this many tokens are limited by memory. More are limited by arithmetic, which reads from
// L1.
constexpr int kMemoryBoundTokens = 4;

// Prefetches the cache lines that are read next, `lines` of them with each block.
struct Ahead {
  static constexpr int64_t kNear = -1;  // instead of `lines`: as PanelsNear does

  const uint8_t* next;
  int64_t lines;

  template <class S, int Tokens>
  inline void fetch(const uint8_t*) {
    for (int64_t i = 0; i < lines; ++i, next += 64) {
      if constexpr (Tokens <= kMemoryBoundTokens) {
        fetch_stream<S>(next);
      } else {
        S::prefetch(next);
      }
    }
  }
};

// Prefetches the cache lines of two panels that are read side by side, and then of the two behind
// them, into L1: each line kPanelDistance before it is read. With a size of 0, those of one panel
// and of what follows it.
struct PanelsNear {
  const uint8_t* next;
  const uint8_t* end;  // of the first panel
  int64_t size;

  PanelsNear(const uint8_t* panel, int64_t size)
      : next(panel + kPanelDistance), end(panel + size), size(size) {}

  template <class S, int>
  inline void fetch(const uint8_t* block) {
    for (const uint8_t* const until = block + kPanelDistance; next < until; next += 64) {
      const uint8_t* const line = next < end ? next : next + size;
      S::prefetch(line);
      if (size > 0) S::prefetch(line + size);
    }
  }
};

// Prefetches the cache lines of the current panel and of what follows it into L2, at a fixed
// distance: each line once, evenly spread over the blocks.
struct StreamPrefetch {
  const uint8_t* next;

  explicit StreamPrefetch(const uint8_t* panel) : next(panel + kStreamDistance) {}

  template <class S, int>
  inline void fetch(const uint8_t* block) {
    const uint8_t* const end = block + kStreamDistance;
    for (; next < end; next += 64) S::prefetch_l2(next);
  }
};

// Prefetches nothing: what is read is in L1.
struct NothingAhead {
  template <class, int>
  inline void fetch(const uint8_t*) {}
};

// Lines of two panels that are prefetched into L2, some between two products of other panels.
struct PanelsAhead {
  const uint8_t* panels[2];
  int64_t lines;

  template <class S>
  inline void fetch() {
    for (int64_t i = 0; i < lines; ++i) {
      for (const uint8_t*& panel : panels) {
        S::prefetch_l2(panel);
        panel += 64;
      }
    }
  }
};

// Tokens of a tile, starting with token `first`.
template <class S>
struct TokenGroup {
  const uint8_t* tile;
  int64_t first;
};

// Returns the size of the group that begins at `token`, among the tokens before `end`. A tile's
// last group may be short.
template <class S>
inline int64_t group_size(int64_t token, int64_t end) {
  const int64_t tile_left = S::kTileTokens - token % S::kTileTokens;
  const int64_t left = end - token < tile_left ? end - token : tile_left;
  return left < S::kGroupTokens ? left : S::kGroupTokens;
}

template <class S>
inline int64_t num_groups(int64_t num_tokens) {
  const auto groups_of = [](int64_t tokens) {
    return (tokens + S::kGroupTokens - 1) / S::kGroupTokens;
  };
  return num_tokens / S::kTileTokens * groups_of(S::kTileTokens) +
         groups_of(num_tokens % S::kTileTokens);
}

// A block of a group's int8 values. Values and numbers have addresses of their own, since an index
// would make two operations of each product with a broadcast operand, unless the group is a whole
// tile: then they are a constant apart.
template <class S>
struct TokenBlock {
  static constexpr bool kIsTile = S::kTileTokens == S::kGroupTokens;
  const uint8_t* first_values;
  const uint8_t* first_numbers;

  explicit TokenBlock(const TokenGroup<S>& group)
      : first_values(group.tile + (kIsTile ? 0 : kBlockColumns * group.first)),
        first_numbers(group.tile + token_numbers(S::kTileTokens) +
                      (kIsTile ? 0 : kTokenNumbers * group.first)) {}
  const uint8_t* values(int t) const { return first_values + kBlockColumns * t; }
  // Address of one of token t's numbers.
  const uint8_t* number(int64_t place, int t) const {
    const uint8_t* const first =
        kIsTile ? first_values + token_numbers(S::kTileTokens) : first_numbers;
    return first + kTokenNumbers * t + place;
  }
  float scale(int t) const { return *reinterpret_cast<const float*>(number(kTokenScale, t)); }
  float sum(int t) const { return *reinterpret_cast<const float*>(number(kTokenSum, t)); }
  // Moves on to the next block.
  void advance() {
    constexpr int64_t kBytes = tile_block_bytes(Precision::kInt8, S::kTileTokens);
    first_values += kBytes;
    first_numbers += kBytes;
  }
};

// Start value of sums for a zero point of 128: -128 times the sum of token t's values over quads
// [First, Last).
template <class S, int First, int Last>
inline typename S::I sum_start(const TokenBlock<S>& x, int t) {
  const auto first = S::ibroadcast(x.number(kTokenZeroFirst, t));
  if constexpr (First == 0 && Last == 4) return first;
  const auto whole = S::ibroadcast(x.number(kTokenZero, t));
  if constexpr (First == 0) return whole;
  return S::isub(whole, first);
}

// Computes one block's integer sums of Panels x Tokens outputs over quads [First, Last), starting
// at the zero point's start values.
template <class S, class Fmt, int Panels, int Tokens, int First, int Last>
inline void block_sums(const typename Fmt::Block (&w)[Panels], const TokenBlock<S>& x,
                       typename S::I (&sums)[Panels][Tokens]) {
  constexpr int kLimit = quads_in_short<S, Fmt>();
  constexpr int kQuads = kLimit == 0 ? 1 : std::min(kLimit, Last - First);  // per 16-bit sum
  typename S::I zeros[Panels];
  TGI_UNROLL(2)
  for (int p = 0; p < Panels; ++p) zeros[p] = Fmt::zeros(w[p]);
  const auto begin = [&] {
    TGI_UNROLL(16)
    for (int t = 0; t < Tokens; ++t) {
      auto start = S::izero();
      if constexpr (Fmt::kZeroShift >= 0 || Fmt::kHasZeros) {
        constexpr int kShift = Fmt::kHasZeros ? 7 : Fmt::kZeroShift;
        start = sum_start<S, First, Last>(x, t);
        if constexpr (kShift > 0) start = S::isar(start, kShift);
      }
      TGI_UNROLL(2)
      for (int p = 0; p < Panels; ++p) {
        sums[p][t] = Fmt::kHasZeros ? S::imul_short(start, zeros[p]) : start;
      }
    }
  };
  if constexpr (kLimit == 0) begin();
  typename S::I shorts[Panels][Tokens];
  TGI_UNROLL(8)
  for (int j = First; j < Last; ++j) {
    typename S::I codes[Panels];
    TGI_UNROLL(2)
    for (int p = 0; p < Panels; ++p) codes[p] = Fmt::quad(w[p], j);
    TGI_UNROLL(16)
    for (int t = 0; t < Tokens; ++t) {
      const auto values = S::ibroadcast(x.values(t) + 4 * j);
      TGI_UNROLL(2)
      for (int p = 0; p < Panels; ++p) {
        if constexpr (kLimit == 0) {
          sums[p][t] = Fmt::dot(sums[p][t], codes[p], values);
        } else {
          const auto both = Fmt::short_sums(codes[p], values);
          shorts[p][t] = j % kQuads == 0 ? both : S::add_short(shorts[p][t], both);
        }
      }
    }
    if constexpr (kLimit > 0) {
      // The 16-bit accumulators fill the registers, so the 32-bit ones begin when these end.
      if (j == First + kQuads - 1) begin();
      if (j % kQuads != kQuads - 1) continue;
      TGI_UNROLL(16)
      for (int t = 0; t < Tokens; ++t) {
        TGI_UNROLL(2)
        for (int p = 0; p < Panels; ++p) sums[p][t] = S::add_shorts(sums[p][t], shorts[p][t]);
      }
    }
  }
}

template <class S, class Fmt, int Panels, int Tokens, int First, int Last>
inline void add_block(const typename Fmt::Block (&w)[Panels], const TokenBlock<S>& x,
                      typename S::F (&out)[Panels][Tokens]) {
  typename S::I sums[Panels][Tokens];
  block_sums<S, Fmt, Panels, Tokens, First, Last>(w, x, sums);
  TGI_UNROLL(2)
  for (int p = 0; p < Panels; ++p) {
    const auto scale = Fmt::scale(w[p], First / 4);
    TGI_UNROLL(16)
    for (int t = 0; t < Tokens; ++t) {
      out[p][t] = S::fma(S::mul(S::to_float(sums[p][t]), S::set1(x.scale(t))), scale, out[p][t]);
    }
  }
}

// Adds up both halves as integers: their scales are small, and the sums are below 2^24.
template <class S, class Fmt, int Panels, int Tokens>
inline void add_halves(const typename Fmt::Block (&w)[Panels], const TokenBlock<S>& x,
                       typename S::F (&out)[Panels][Tokens]) {
  typename S::I first[Panels][Tokens], second[Panels][Tokens];
  block_sums<S, Fmt, Panels, Tokens, 0, 4>(w, x, first);
  TGI_UNROLL(2)
  for (int p = 0; p < Panels; ++p) {
    const auto scale = Fmt::integer_scale(w[p], 0);
    TGI_UNROLL(16)
    for (int t = 0; t < Tokens; ++t) first[p][t] = S::imul_short(first[p][t], scale);
  }
  block_sums<S, Fmt, Panels, Tokens, 4, 8>(w, x, second);
  TGI_UNROLL(2)
  for (int p = 0; p < Panels; ++p) {
    const auto d = Fmt::half(w[p], 0);
    const auto scale = Fmt::integer_scale(w[p], 1);
    TGI_UNROLL(16)
    for (int t = 0; t < Tokens; ++t) {
      const auto sum = S::iadd(first[p][t], S::imul_short(second[p][t], scale));
      out[p][t] = S::fma(S::mul(S::to_float(sum), S::set1(x.scale(t))), d, out[p][t]);
    }
  }
}

// Adds the block's mins times the scaled sums of the values.
template <class S, class Fmt, int Panels, int Tokens>
inline void add_mins(const typename Fmt::Block (&w)[Panels], const TokenBlock<S>& x,
                     typename S::F (&out)[Panels][Tokens]) {
  TGI_UNROLL(2)
  for (int p = 0; p < Panels; ++p) {
    const auto min = Fmt::min(w[p], 0);
    TGI_UNROLL(16)
    for (int t = 0; t < Tokens; ++t) out[p][t] = S::fma(min, S::set1(x.sum(t)), out[p][t]);
  }
}

// The same for a half, with both factors negative: its sum is derived from the zero point's start
// values.
template <class S, class Fmt, int Panels, int Tokens, int First, int Last>
inline void add_half_mins(const typename Fmt::Block (&w)[Panels], const TokenBlock<S>& x,
                          typename S::F (&out)[Panels][Tokens]) {
  typename S::F mins[Panels];
  TGI_UNROLL(2)
  for (int p = 0; p < Panels; ++p) mins[p] = Fmt::negative_min(w[p], First / 4);
  TGI_UNROLL(16)
  for (int t = 0; t < Tokens; ++t) {
    const auto start = S::to_float(sum_start<S, First, Last>(x, t));
    const auto sum = S::mul(start, S::set1(x.scale(t) * (1.0f / 128.0f)));
    TGI_UNROLL(2)
    for (int p = 0; p < Panels; ++p) out[p][t] = S::fma(mins[p], sum, out[p][t]);
  }
}

// out: [Tokens][32], panel p at columns 16p; added to unless is_first. group: tokens of an int8
// tile.
template <class S, class Fmt, int Panels, int Tokens, class Fetched>
inline void int8_tile(const uint8_t* const (&w)[Panels], const TokenGroup<S>& group,
                      int64_t num_blocks, float* out, Fetched ahead, bool is_first = true) {
  TokenBlock<S> x(group);
  typename S::F total[Panels][Tokens];
  TGI_UNROLL(2)
  for (int p = 0; p < Panels; ++p) {
    TGI_UNROLL(16)
    for (int t = 0; t < Tokens; ++t) {
      total[p][t] = is_first ? S::zero() : S::load(out + 32 * t + 16 * p);
    }
  }
  for (int64_t b = 0; b < num_blocks; ++b, x.advance()) {
    typename Fmt::Block block[Panels];
    TGI_UNROLL(2)
    for (int p = 0; p < Panels; ++p) block[p] = Fmt::block(w[p], b);
    ahead.template fetch<S, Tokens>(block[0].codes);
    if constexpr (Fmt::kNumHalves == 1) {
      add_block<S, Fmt, Panels, Tokens, 0, 8>(block, x, total);
      if constexpr (Fmt::kHasMin) add_mins<S, Fmt, Panels, Tokens>(block, x, total);
    } else {
      if constexpr (Fmt::kHasIntegerScales) {
        add_halves<S, Fmt, Panels, Tokens>(block, x, total);
      } else {
        add_block<S, Fmt, Panels, Tokens, 0, 4>(block, x, total);
        add_block<S, Fmt, Panels, Tokens, 4, 8>(block, x, total);
      }
      if constexpr (Fmt::kHasMin) {
        add_half_mins<S, Fmt, Panels, Tokens, 0, 4>(block, x, total);
        add_half_mins<S, Fmt, Panels, Tokens, 4, 8>(block, x, total);
      }
    }
  }
  TGI_UNROLL(2)
  for (int p = 0; p < Panels; ++p) {
    TGI_UNROLL(16)
    for (int t = 0; t < Tokens; ++t) S::store(out + 32 * t + 16 * p, total[p][t]);
  }
}

// The same for floats. group: tokens of a tile in the format's precision.
template <class S, class Fmt, int Panels, int Tokens>
inline void float_tile(const uint8_t* const (&w)[Panels], const TokenGroup<S>& group,
                       int64_t num_blocks, float* out, Ahead ahead) {
  constexpr int64_t kBlockBytes = tile_block_bytes(Fmt::kPrecision, S::kTileTokens);
  constexpr int kTokenBytes = 4 * Fmt::kSteps;  // per token in a tile's block
  const bool is_tile = S::kTileTokens == S::kGroupTokens;
  const uint8_t* x = group.tile + (is_tile ? 0 : group.first * kTokenBytes);
  typename S::F total[Panels][Tokens];
  TGI_UNROLL(2)
  for (int p = 0; p < Panels; ++p) {
    TGI_UNROLL(16)
    for (int t = 0; t < Tokens; ++t) total[p][t] = S::zero();
  }
  for (int64_t b = 0; b < num_blocks; ++b, x += kBlockBytes) {
    const int64_t offset = b * Fmt::kSteps * Fmt::kStepBytes;
    ahead.fetch<S, Tokens>(w[0] + offset);
    TGI_UNROLL(4)
    for (int k = 0; k < Fmt::kSteps; ++k) {
      typename Fmt::Vector weights[Panels];
      TGI_UNROLL(2)
      for (int p = 0; p < Panels; ++p) weights[p] = Fmt::load(w[p] + offset + Fmt::kStepBytes * k);
      TGI_UNROLL(16)
      for (int t = 0; t < Tokens; ++t) {
        const uint8_t* value = x + t * kTokenBytes + 4 * k;
        TGI_UNROLL(2)
        for (int p = 0; p < Panels; ++p)
          total[p][t] = Fmt::multiply_add(total[p][t], weights[p], value);
      }
    }
  }
  TGI_UNROLL(2)
  for (int p = 0; p < Panels; ++p) {
    TGI_UNROLL(16)
    for (int t = 0; t < Tokens; ++t) S::store(out + 32 * t + 16 * p, total[p][t]);
  }
}

// Strip kernels: 32 rows from two panels, out [tokens][32].
template <class S>
using GroupFunction = void (*)(const uint8_t* panel0, const uint8_t* panel1, TokenGroup<S> x,
                               int64_t num_blocks, float* out, Ahead ahead);

// Runs a strip panel by panel; each panel prefetches its part of what is ahead.
template <class Tile>
inline void each_panel(const uint8_t* panel0, const uint8_t* panel1, int64_t num_blocks, float* out,
                       Ahead ahead, const Tile& tile) {
  const int64_t first = (ahead.lines + 1) / 2;
  tile(panel0, out, Ahead{ahead.next, first});
  tile(panel1, out + kPanelRows, Ahead{ahead.next + first * num_blocks * 64, ahead.lines - first});
}

template <class S, class Fmt, int Tokens>
void int8_strip(const uint8_t* panel0, const uint8_t* panel1, TokenGroup<S> x, int64_t num_blocks,
                float* out, Ahead ahead) {
  const bool is_near = ahead.lines == Ahead::kNear;
  if constexpr (Tokens > S::paired_tokens(Precision::kInt8)) {
    const auto tile = [&](const uint8_t* panel, float* to, auto its) {
      int8_tile<S, Fmt, 1, Tokens>({panel}, x, num_blocks, to, its);
    };
    if (is_near) {
      tile(panel0, out, PanelsNear(panel0, 0));
      tile(panel1, out + kPanelRows, PanelsNear(panel1, 0));
    } else {
      each_panel(panel0, panel1, num_blocks, out, ahead, tile);
    }
  } else if (is_near) {
    int8_tile<S, Fmt, 2, Tokens>({panel0, panel1}, x, num_blocks, out,
                                 PanelsNear(panel0, panel1 - panel0));
  } else if (Tokens == 1 && !kStreamsIntoL1) {
    // One panel after the other, because two streams into L2 at once are slower. (Into L1, two are
    // 4 to 8 % faster than this.)
    int8_tile<S, Fmt, 1, 1>({panel0}, x, num_blocks, out, StreamPrefetch(panel0));
    int8_tile<S, Fmt, 1, 1>({panel1}, x, num_blocks, out + 16, StreamPrefetch(panel1));
  } else {
    int8_tile<S, Fmt, 2, Tokens>({panel0, panel1}, x, num_blocks, out, ahead);
  }
}

template <class S, class Fmt, int Tokens>
void float_strip(const uint8_t* panel0, const uint8_t* panel1, TokenGroup<S> x, int64_t num_blocks,
                 float* out, Ahead ahead) {
  if constexpr (Tokens > S::paired_tokens(Fmt::kPrecision)) {
    each_panel(panel0, panel1, num_blocks, out, ahead,
               [&](const uint8_t* panel, float* to, Ahead its) {
                 float_tile<S, Fmt, 1, Tokens>({panel}, x, num_blocks, to, its);
               });
  } else {
    float_tile<S, Fmt, 2, Tokens>({panel0, panel1}, x, num_blocks, out, ahead);
  }
}

// Returns byte i of each dword as the number that the product uses.
template <class S, class Fmt>
inline typename S::F code_value(typename S::I codes, int i, typename S::I zero) {
  if constexpr (Fmt::kIsSigned) return S::to_float(S::isar(S::ishl(codes, 24 - 8 * i), 24));
  return S::to_float(S::isub(S::iand(S::ishr(codes, 8 * i), S::iset1(0xFF)), zero));
}

// Calls visit(weights) for blocks [begin, end) of a panel, four columns at a time, each as sixteen
// float32. Rounds like dequantising the file does: scale * (code - zero), plus the min. With a min,
// the product is exact (scales of at most 17 bits, codes of at most 5), so that one fma rounds as
// both operations do.
template <class S, class Fmt, class Visit>
inline void each_four_columns(const uint8_t* panel, int64_t begin, int64_t end,
                              const Visit& visit) {
  constexpr int kZero = Fmt::kZeroShift >= 0 ? 128 >> (Fmt::kZeroShift & 7) : 0;
  for (int64_t b = begin; b < end; ++b) {
    const auto block = Fmt::block(panel, b);
    const auto zero = Fmt::kHasZeros ? Fmt::zeros(block) : S::iset1(kZero);
    typename S::F scales[Fmt::kNumHalves], mins[Fmt::kNumHalves];
    TGI_UNROLL(2)
    for (int half = 0; half < Fmt::kNumHalves; ++half) {
      scales[half] = Fmt::scale(block, half);
      mins[half] = Fmt::min(block, half);
    }
    TGI_UNROLL(8)
    for (int j = 0; j < 8; ++j) {
      const int half = Fmt::kNumHalves == 2 ? j / 4 : 0;
      const auto codes = Fmt::quad(block, j);
      typename S::F weights[4];
      TGI_UNROLL(4)
      for (int i = 0; i < 4; ++i) {
        const auto code = code_value<S, Fmt>(codes, i, zero);
        weights[i] =
            Fmt::kHasMin ? S::fma(code, scales[half], mins[half]) : S::mul(code, scales[half]);
      }
      visit(weights);
    }
  }
}

// Dequantises one panel to float32 [column][16], for products with float32 activations.
template <class S, class Fmt>
void dequantise_panel(const uint8_t* panel, int64_t num_blocks, float* out) {
  each_four_columns<S, Fmt>(panel, 0, num_blocks, [&](const typename S::F(&weights)[4]) {
    for (int i = 0; i < 4; ++i, out += 16) S::store(out, weights[i]);
  });
}

template <class S>
void widen_half_panel(const uint8_t* panel, int64_t num_blocks, float* out) {
  for (int64_t k = 0; k < num_blocks * kBlockColumns; ++k)
    S::store(out + 16 * k, S::load_half(panel + 32 * k));
}

template <class S>
void widen_bf16_panel(const uint8_t* panel, int64_t num_blocks, float* out) {
  for (int64_t k = 0; k < num_blocks * kBlockColumns / 2; ++k) {
    const auto pair = S::iload(panel + 64 * k);
    S::istore(out + 32 * k, S::ishl(pair, 16));
    S::istore(out + 32 * k + 16, S::iand(pair, S::iset1(static_cast<int32_t>(0xFFFF0000u))));
  }
}

}  // namespace
}  // namespace tgi::cpu::step
