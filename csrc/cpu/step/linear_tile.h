// The inner products: 32 rows times up to six tokens over all columns, accumulators in registers.
//
// Whatever the number of tokens, an output is the same sequence of roundings: integer sums within a
// block are exact; across blocks one float accumulator, blocks ascending, explicit fma. So a
// token's result does not depend on its batch. Included by the step_<isa>.cpp files only.
#pragma once

#include "linear_formats.h"
#include "stream.h"

namespace tgi::cpu::step {
namespace {

// Cache lines to fetch ahead, `lines` of them after each block.
struct Ahead {
  const uint8_t* next;
  int64_t lines;
};

// Up to this many tokens wait for memory. More wait for arithmetic, which reads from the first
// level of cache.
constexpr int kMemoryBoundTokens = 4;

template <class S, int Tokens>
inline void fetch_ahead(Ahead& ahead) {
  for (int64_t i = 0; i < ahead.lines; ++i, ahead.next += 64) {
    if constexpr (Tokens <= kMemoryBoundTokens) {
      fetch_stream<S>(ahead.next);
    } else {
      S::prefetch(ahead.next);
    }
  }
}

// One block's integer sums of Panels x Tokens outputs over quads [First, Last), from the zero
// point's start values.
template <class S, class Fmt, int Panels, int Tokens, int First, int Last>
inline void block_sums(const typename Fmt::Block (&w)[Panels], const uint8_t* x,
                       typename S::I (&sums)[Panels][Tokens]) {
  TGI_UNROLL(6)
  for (int t = 0; t < Tokens; ++t) {
    auto start = S::izero();
    if constexpr (Fmt::kZeroShift >= 0) {
      start = S::ibroadcast(x + kTileZero + 4 * t);
      if constexpr (Last - First == 4) {
        const auto first = S::ibroadcast(x + kTileZeroFirst + 4 * t);
        start = First == 0 ? first : S::isub(start, first);
      }
      if constexpr (Fmt::kZeroShift > 0) start = S::isar(start, Fmt::kZeroShift);
    }
    TGI_UNROLL(2)
    for (int p = 0; p < Panels; ++p) sums[p][t] = start;
  }
  TGI_UNROLL(8)
  for (int j = First; j < Last; ++j) {
    typename S::I codes[Panels];
    TGI_UNROLL(2)
    for (int p = 0; p < Panels; ++p) codes[p] = Fmt::quad(w[p].codes, j);
    TGI_UNROLL(6)
    for (int t = 0; t < Tokens; ++t) {
      const auto values = S::ibroadcast(x + 32 * t + 4 * j);
      TGI_UNROLL(2)
      for (int p = 0; p < Panels; ++p) {
        sums[p][t] = Fmt::kIsSmall ? S::dot_small(sums[p][t], codes[p], values)
                                   : S::dot(sums[p][t], codes[p], values);
      }
    }
  }
}

template <class S, class Fmt, int Panels, int Tokens, int First, int Last>
inline void add_block(const typename Fmt::Block (&w)[Panels], const uint8_t* x,
                      typename S::F (&out)[Panels][Tokens]) {
  typename S::I sums[Panels][Tokens];
  block_sums<S, Fmt, Panels, Tokens, First, Last>(w, x, sums);
  const auto* scales = reinterpret_cast<const float*>(x + kTileScale);
  TGI_UNROLL(2)
  for (int p = 0; p < Panels; ++p) {
    const auto scale = Fmt::scale(w[p], First / 4);
    TGI_UNROLL(6)
    for (int t = 0; t < Tokens; ++t) {
      out[p][t] = S::fma(S::mul(S::to_float(sums[p][t]), S::set1(scales[t])), scale, out[p][t]);
    }
  }
}

// out: [Tokens][32], panel p at columns 16p. x: an int8 tile.
template <class S, class Fmt, int Panels, int Tokens>
inline void int8_tile(const uint8_t* const (&w)[Panels], const uint8_t* x, int64_t num_blocks,
                      float* out, Ahead ahead) {
  typename S::F total[Panels][Tokens];
  TGI_UNROLL(2)
  for (int p = 0; p < Panels; ++p) {
    TGI_UNROLL(6)
    for (int t = 0; t < Tokens; ++t) total[p][t] = S::zero();
  }
  for (int64_t b = 0; b < num_blocks; ++b, x += tile_block_bytes(Precision::kInt8)) {
    typename Fmt::Block block[Panels];
    TGI_UNROLL(2)
    for (int p = 0; p < Panels; ++p) block[p] = Fmt::block(w[p], b);
    fetch_ahead<S, Tokens>(ahead);
    if constexpr (Fmt::kNumHalves == 1) {
      add_block<S, Fmt, Panels, Tokens, 0, 8>(block, x, total);
    } else {
      add_block<S, Fmt, Panels, Tokens, 0, 4>(block, x, total);
      add_block<S, Fmt, Panels, Tokens, 4, 8>(block, x, total);
    }
    if constexpr (Fmt::kHasMin) {
      const auto* sums = reinterpret_cast<const float*>(x + kTileSum);
      TGI_UNROLL(2)
      for (int p = 0; p < Panels; ++p) {
        const auto min = Fmt::min(block[p]);
        TGI_UNROLL(6)
        for (int t = 0; t < Tokens; ++t) total[p][t] = S::fma(min, S::set1(sums[t]), total[p][t]);
      }
    }
  }
  TGI_UNROLL(2)
  for (int p = 0; p < Panels; ++p) {
    TGI_UNROLL(6)
    for (int t = 0; t < Tokens; ++t) S::store(out + 32 * t + 16 * p, total[p][t]);
  }
}

// Weights [column][16] float32, or [pair of columns][16][2] bf16; x: a tile of the same precision.
template <class S, Precision precision, int Panels, int Tokens>
inline void float_tile(const uint8_t* const (&w)[Panels], const uint8_t* x, int64_t num_blocks,
                       float* out, Ahead ahead) {
  constexpr bool kIsBF16 = precision == Precision::kBF16;
  constexpr int kSteps = kIsBF16 ? 16 : 32;        // vectors in a panel's block
  constexpr int kTokenBytes = kIsBF16 ? 64 : 128;  // of a token in a tile's block
  typename S::F total[Panels][Tokens];
  TGI_UNROLL(2)
  for (int p = 0; p < Panels; ++p) {
    TGI_UNROLL(6)
    for (int t = 0; t < Tokens; ++t) total[p][t] = S::zero();
  }
  for (int64_t b = 0; b < num_blocks; ++b, x += tile_block_bytes(precision)) {
    const int64_t offset = b * kSteps * 64;
    fetch_ahead<S, Tokens>(ahead);
    TGI_UNROLL(4)
    for (int k = 0; k < kSteps; ++k) {
      TGI_UNROLL(6)
      for (int t = 0; t < Tokens; ++t) {
        const uint8_t* value = x + t * kTokenBytes + 4 * k;
        TGI_UNROLL(2)
        for (int p = 0; p < Panels; ++p) {
          const uint8_t* vector = w[p] + offset + 64 * k;
          if constexpr (kIsBF16) {
            total[p][t] = S::dot_bf16(total[p][t], S::iload(vector), S::ibroadcast(value));
          } else {
            total[p][t] = S::fma(S::load(reinterpret_cast<const float*>(vector)),
                                 S::set1(*reinterpret_cast<const float*>(value)), total[p][t]);
          }
        }
      }
    }
  }
  TGI_UNROLL(2)
  for (int p = 0; p < Panels; ++p) {
    TGI_UNROLL(6)
    for (int t = 0; t < Tokens; ++t) S::store(out + 32 * t + 16 * p, total[p][t]);
  }
}

// Strip kernels: 32 rows from two panels, out [tokens][32].
using TileFunction = void (*)(const uint8_t* panel0, const uint8_t* panel1, const uint8_t* x,
                              int64_t num_blocks, float* out, Ahead ahead);

// One token, where streams are fetched into the second level of cache: panel after panel, each
// fetched 5 KiB ahead of its use, as two streams at once are slower. (In the first level they are 4
// to 8 % faster than this.)
constexpr int64_t kStreamDistance = 5120;

template <class S, class Fmt, int Tokens>
void int8_strip(const uint8_t* panel0, const uint8_t* panel1, const uint8_t* x, int64_t num_blocks,
                float* out, Ahead ahead) {
  if (Tokens == 1 && !kStreamsIntoL1) {
    const int64_t lines = (Fmt::kBytes + 63) / 64;
    int8_tile<S, Fmt, 1, 1>({panel0}, x, num_blocks, out, {panel0 + kStreamDistance, lines});
    int8_tile<S, Fmt, 1, 1>({panel1}, x, num_blocks, out + 16, {panel1 + kStreamDistance, lines});
  } else {
    int8_tile<S, Fmt, 2, Tokens>({panel0, panel1}, x, num_blocks, out, ahead);
  }
}

template <class S, Precision precision, int Tokens>
void float_strip(const uint8_t* panel0, const uint8_t* panel1, const uint8_t* x, int64_t num_blocks,
                 float* out, Ahead ahead) {
  float_tile<S, precision, 2, Tokens>({panel0, panel1}, x, num_blocks, out, ahead);
}

// Weights of one panel as float32 [column][16], for products with float32 activations. Rounds as
// dequantising the file does: scale * (code - zero), plus the min.
template <class S, class Fmt>
void dequantise_panel(const uint8_t* panel, int64_t num_blocks, float* out) {
  const auto low_byte = S::iset1(0xFF);
  const auto zero =
      S::iset1(Fmt::kZeroShift >= 0 ? 128 >> (Fmt::kZeroShift < 0 ? 0 : Fmt::kZeroShift) : 0);
  for (int64_t b = 0; b < num_blocks; ++b) {
    const auto block = Fmt::block(panel, b);
    const auto min = Fmt::kHasMin ? Fmt::min(block) : S::zero();
    TGI_UNROLL(8)
    for (int j = 0; j < 8; ++j) {
      const auto scale = Fmt::scale(block, Fmt::kNumHalves == 2 ? j / 4 : 0);
      auto codes = Fmt::quad(block.codes, j);
      for (int i = 0; i < 4; ++i, out += 16, codes = S::ishr(codes, 8)) {
        const auto code = S::to_float(S::isub(S::iand(codes, low_byte), zero));
        const auto weight = S::mul(code, scale);
        S::store(out, Fmt::kHasMin ? S::add(weight, min) : weight);
      }
    }
  }
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
