// Products with AMX tiles: 16 tokens times 16 rows at once. One operand is a block of a panel, as
// stored; the other is a tile of tokens. Included by linear_kernels.h, for kernel sets that have
// tiles.
#pragma once

#include <type_traits>

#include "amx_tiles.h"
#include "decode_weights.h"
#include "linear_tile.h"
#include "step.h"

namespace tgi::cpu::step {
namespace {

// bf16. Tiles 0 to 3 hold the sums of two tiles of tokens (4, 5) by two panels (6, 7). With fewer
// than sixteen tokens, only their rows are read.
constexpr TileConfig bf16_tiles(int64_t num_tokens) {
  const int rows = static_cast<int>(num_tokens < kTileRows ? num_tokens : kTileRows);
  TileConfig config;
  for (int tile = 0; tile < 6; ++tile) config.set(tile, rows, 64);
  for (const int tile : {6, 7}) config.set(tile, 16, 64);
  return config;
}

constexpr int64_t kTileFloats = kTileRows * kStripRows;  // of a strip's sums
// Blocks, at most, whose part of two panels stays in L1, along with what it is multiplied by.
constexpr int64_t kChunkBlocks = 9;
constexpr int64_t kFetchedAhead = 4096;  // bytes of each panel

// Tokens multiplied together. Weights are decoded, or read from memory, once for all of them.
constexpr int64_t kMaxTileTokens = 512;

// What is multiplied before something else takes its place in the L2 cache (2 MiB): some blocks of
// the activations, and the sums of some strips, 512 KiB each for 512 tokens. Of wide matrices, the
// same blocks of several strips are multiplied before the next blocks.
struct TilePortion {
  int64_t blocks, strips;
};

inline TilePortion tile_portion(int64_t num_columns, int64_t unit_strips) {
  constexpr int64_t kWide = 1024, kBlocks = 16, kStrips = 8;
  if (num_columns <= kWide) return {num_columns / kBlockColumns, unit_strips};
  return {kBlocks, unit_strips < kStrips ? kStrips / unit_strips * unit_strips : unit_strips};
}

// A strip's weights and the activations that they multiply, both starting at the same block.
struct TileOperands {
  const uint8_t* panels[2];
  const uint8_t* x;    // a tile of tokens
  int64_t tile_bytes;  // to the next tile
};

// Where a tile of sums is in [16 or 32 tokens][32].
template <int Sum>
constexpr int64_t kSumAt = Sum / 2 * kTileFloats + Sum % 2 * kPanelRows;
constexpr int64_t kSumStride = kStripRows * sizeof(float);

template <class S, int Sum>
inline void store_sum(float* out) {
  S::Tiles::template store<Sum>(out + kSumAt<Sum>, kSumStride);
}

// Stores all sums of one or two tiles of tokens.
template <class S, bool HasTwo>
inline void store_sums(float* out) {
  store_sum<S, 0>(out);
  store_sum<S, 1>(out);
  if constexpr (HasTwo) store_sum<S, 2>(out);
  if constexpr (HasTwo) store_sum<S, 3>(out);
}

// Stores the sum that a tile still has for earlier tokens, if any; then it starts those of `out`.
template <class S, int Sum>
inline void turn_over(float* earlier, const float* out, bool is_first) {
  if (earlier != nullptr) store_sum<S, Sum>(earlier);
  if (is_first) {
    S::Tiles::template zero<Sum>();
  } else {
    S::Tiles::template load<Sum>(out + kSumAt<Sum>, kSumStride);
  }
}

// Adds `num_blocks` blocks to out, [16 or 32 tokens][32], or starts a new sum if is_first. Sums
// keep their bits when they are stored and loaded again. The new sums stay in the tiles: a store
// waits for its tile's last product, so that it is left to the next call, between whose first
// products it costs nothing. `earlier`, if not null, is where the sums of the call before belong.
template <class S, bool HasTwo, bool IsFetched>
inline void add_bf16_blocks(const TileOperands& in, int64_t num_blocks, bool is_first,
                            float* earlier, const float* out) {
  using T = typename S::Tiles;
  // Separate pointers: from a base plus an offset, GCC 12 would compute a base for each of the 32
  // prefetches.
  const uint8_t* x = in.x;
  const uint8_t* panel0 = in.panels[0];
  const uint8_t* panel1 = in.panels[1];
  const auto add_block = [&](auto is_start) {
    const auto turn = [&](auto sum) {
      if constexpr (is_start()) turn_over<S, sum()>(earlier, out, is_first);
    };
    T::template load<4>(x, kTileRowBytes);
    T::template load<6>(panel0, kTileRowBytes);
    turn(std::integral_constant<int, 0>());
    T::template dot_bf16<0, 4, 6>();
    T::template load<7>(panel1, kTileRowBytes);
    turn(std::integral_constant<int, 1>());
    T::template dot_bf16<1, 4, 7>();
    if constexpr (HasTwo) {
      T::template load<5>(x + in.tile_bytes, kTileRowBytes);
      turn(std::integral_constant<int, 2>());
      T::template dot_bf16<2, 5, 6>();
      turn(std::integral_constant<int, 3>());
      T::template dot_bf16<3, 5, 7>();
    }
    x += kTileBytes;
    panel0 += kTileBytes;
    panel1 += kTileBytes;
  };
  for (int64_t b = 0; b < num_blocks; ++b) {
    if constexpr (IsFetched) {
      // After the end of a panel comes the strip's other panel; the same panel of the next strip is
      // one panel further.
      const bool is_last = (b + 1) * kTileBytes + kFetchedAhead > num_blocks * kTileBytes;
      const int64_t ahead = kFetchedAhead + (is_last ? num_blocks * kTileBytes : 0);
      for (int64_t line = ahead; line < ahead + kTileBytes; line += 64) {
        S::prefetch_l2(panel0 + line);
        S::prefetch_l2(panel1 + line);
      }
    }
    if (b == 0) {
      add_block(std::true_type());
    } else {
      add_block(std::false_type());
    }
  }
}

// The same for all pairs of tiles, with all sums stored.
template <class S>
void add_bf16_chunk(TileOperands in, int64_t num_blocks, bool is_first, int64_t num_tiles,
                    PanelsAhead ahead, float* out) {
  float* earlier = nullptr;
  for (; num_tiles >= 2; num_tiles -= 2) {
    ahead.fetch<S>();
    add_bf16_blocks<S, true, false>(in, num_blocks, is_first, earlier, out);
    in.x += 2 * in.tile_bytes;
    earlier = out;
    out += 2 * kTileFloats;
  }
  if (earlier != nullptr) store_sums<S, true>(earlier);
  if (num_tiles == 0) return;
  ahead.fetch<S>();
  add_bf16_blocks<S, false, false>(in, num_blocks, is_first, nullptr, out);
  store_sums<S, false>(out);
}

// Adds blocks [begin, end) of a strip for `num_tiles` tiles of tokens: out [tokens][32]. Codes are
// decoded chunk by chunk, once for all tokens, into a buffer for part of two panels that stays in
// L1.
template <class S>
void bf16_tiles_strip(const TileOperands& in, Format format, int64_t begin, int64_t end,
                      int64_t num_tiles, uint8_t* decoded, float* out) {
  const DecodeBF16 decode = decode_bf16_function<S>(format);  // null: weights are bf16
  const int64_t num_blocks = end - begin;
  if (decode == nullptr && num_tiles == 1) {
    add_bf16_blocks<S, false, true>(in, num_blocks, true, nullptr, out);
    return store_sums<S, false>(out);
  }
  if (decode == nullptr && num_tiles == 2) {
    add_bf16_blocks<S, true, true>(in, num_blocks, true, nullptr, out);
    return store_sums<S, true>(out);
  }
  const int64_t num_chunks = (num_blocks + kChunkBlocks - 1) / kChunkBlocks;
  const int64_t chunk_blocks = (num_blocks + num_chunks - 1) / num_chunks;
  const int64_t num_pairs = (num_tiles + 1) / 2;  // of token tiles
  for (int64_t at = begin; at < end; at += chunk_blocks) {
    const int64_t stop = at + chunk_blocks < end ? at + chunk_blocks : end;
    // After the last chunk comes the next strip's first one.
    const int64_t next = stop < end ? stop : begin;
    const int64_t next_stop = next + chunk_blocks < end ? next + chunk_blocks : end;
    const int64_t from = block_offset(format, next);
    const int64_t lines = (block_offset(format, next_stop) - from + 63) / 64;
    const int64_t to_panel = stop < end ? 0 : 2 * (in.panels[1] - in.panels[0]);
    const PanelsAhead ahead = {{in.panels[0] + to_panel + from, in.panels[1] + to_panel + from},
                               (lines + num_pairs - 1) / num_pairs};
    TileOperands chunk = in;
    chunk.x += at * kTileBytes;
    for (int64_t i = 0; i < 2; ++i) {
      if (decode == nullptr) {
        chunk.panels[i] += at * kTileBytes;
      } else {
        uint8_t* const to = decoded + i * kChunkBlocks * kTileBytes;
        decode(in.panels[i], at, stop, to);
        chunk.panels[i] = to;
      }
    }
    add_bf16_chunk<S>(chunk, stop - at, at == 0, num_tiles, ahead, out);
  }
}

// int8, with the same bits as the vector kernels: integer sums over a block of 32 columns are
// exact, and the steps after them are the same. Tiles 0 and 1 hold the sums of alternating blocks,
// 4 and 5 their tokens, 6 and 7 their codes.
constexpr TileConfig int8_tiles() {
  TileConfig config;
  for (const int tile : {0, 1}) config.set(tile, 16, 64);
  for (const int tile : {4, 5}) config.set(tile, 16, 32);
  for (const int tile : {6, 7}) config.set(tile, 8, 64);
  return config;
}
constexpr TileConfig kInt8Tiles = int8_tiles();

// Returns whether tiles are faster than the vector kernels: from 32 tokens on, if the last tile is
// not mostly empty.
inline bool is_for_tiles(int64_t num_tokens) {
  const int64_t whole = (num_tokens + kTileRows - 1) / kTileRows * kTileRows;
  return num_tokens >= 32 && 5 * num_tokens >= 4 * whole;
}

// Whether tiles sum up a format's codes. Formats with one scale per half block would need two
// products of half a tile and gain nothing.
template <class Fmt>
constexpr bool kIsByTiles = Fmt::kNumHalves == 1;

// Does the work of add_block and add_mins for one panel and sixteen tokens. sums: [16 tokens][16
// rows].
template <class S, class D>
inline void add_tile_sums(const typename D::Block& decoded, const TokenBlock<S>& x,
                          const int32_t* sums, typename S::F (&out)[kTileRows]) {
  const auto scale = D::scale(decoded, 0);
  TGI_UNROLL(16)
  for (int t = 0; t < kTileRows; ++t) {
    auto sum = S::iload(sums + kPanelRows * t);
    if constexpr (D::kZeroShift >= 0) sum = S::iadd(sum, sum_start<S, 0, 8>(x, t));
    out[t] = S::fma(S::mul(S::to_float(sum), S::set1(x.scale(t))), scale, out[t]);
  }
  if constexpr (D::kHasMin) {
    const auto min = D::min(decoded, 0);
    TGI_UNROLL(16)
    for (int t = 0; t < kTileRows; ++t) out[t] = S::fma(min, S::set1(x.sum(t)), out[t]);
  }
}

template <class S, int Turn>
inline void multiply_codes(const uint8_t* codes, const TokenBlock<S>& x) {
  using T = typename S::Tiles;
  T::template load<6 + Turn>(codes, kTileRowBytes);
  T::template load<4 + Turn>(x.first_values, kBlockColumns);
  T::template zero<Turn>();
  T::template dot_int8<Turn, 4 + Turn, 6 + Turn>();
}

// Multiplies a decoded panel by a tile of tokens: out [16 tokens][32], of which the panel fills
// sixteen columns. Prefetches lines of a later panel with each block.
template <class S, class D>
void int8_tiles_panel(const uint8_t* panel, const TokenGroup<S>& group, int64_t num_blocks,
                      float* out, Ahead ahead) {
  using T = typename S::Tiles;
  TokenBlock<S> x(group);
  alignas(64) int32_t sums[2][kTileRows * kPanelRows];
  typename S::F total[kTileRows];
  TGI_UNROLL(16)
  for (int t = 0; t < kTileRows; ++t) total[t] = S::zero();
  multiply_codes<S, 0>(panel, x);
  // The next block is multiplied while a block's sums are stored and added up.
  for (int64_t b = 0; b < num_blocks; b += 2) {
    TokenBlock<S> next = x;
    next.advance();
    const bool has_next = b + 1 < num_blocks;
    for (int64_t i = 0; i < 2 * ahead.lines; ++i, ahead.next += 64) S::prefetch_l2(ahead.next);
    if (has_next) multiply_codes<S, 1>(D::block(panel, b + 1).codes, next);
    T::template store<0>(sums[0], kTileRowBytes);
    add_tile_sums<S, D>(D::block(panel, b), x, sums[0], total);
    if (!has_next) break;
    TokenBlock<S> after = next;
    after.advance();
    if (b + 2 < num_blocks) multiply_codes<S, 0>(D::block(panel, b + 2).codes, after);
    T::template store<1>(sums[1], kTileRowBytes);
    add_tile_sums<S, D>(D::block(panel, b + 1), next, sums[1], total);
    x = after;
  }
  TGI_UNROLL(16)
  for (int t = 0; t < kTileRows; ++t) S::store(out + kStripRows * t, total[t]);
}

// The functions that decode a format's panels and multiply them by tiles of tokens; null if there
// are none.
template <class S>
struct Int8TileFunctions {
  void (*decode)(const uint8_t* panel, int64_t num_blocks, uint8_t* out) = nullptr;
  void (*multiply)(const uint8_t* panel, const TokenGroup<S>& group, int64_t num_blocks, float* out,
                   Ahead ahead) = nullptr;
};

template <class S, class Fmt>
constexpr Int8TileFunctions<S> int8_tile_functions() {
  if constexpr (kIsByTiles<Fmt>)
    return {decode_codes<S, Fmt>, int8_tiles_panel<S, DecodedOf<S, Fmt>>};
  return {};
}

template <class S>
inline Int8TileFunctions<S> int8_tile_functions(Format format) {
  switch (format) {
#define TGI_FLOAT_FORMAT(...)
#define TGI_CODE_FORMAT(name, ...) \
  case Format::k##name:            \
    return int8_tile_functions<S, name<S>>();
#define TGI_DECODED_FORMAT(...)
#include "../../formats.def"
    default:
      return {};
  }
}

// A member's work memory, in floats, for units of `unit_strips` strips.
template <class S>
inline int64_t tile_scratch_floats(const PackedMatrix& weight, Precision precision,
                                   int64_t unit_strips) {
  if (precision == Precision::kBF16) {
    const int64_t decoded_bytes =
        is_decoded_to_bf16(weight.format, precision) ? 2 * kChunkBlocks * kTileBytes : 0;
    const TilePortion portion = tile_portion(weight.num_columns, unit_strips);
    return portion.strips * kMaxTileTokens * kStripRows + decoded_bytes / 4;
  }
  if (int8_tile_functions<S>(weight.format).decode == nullptr) return 0;
  const int64_t num_blocks = weight.num_columns / kBlockColumns;
  return 2 * unit_strips * num_blocks * decoded_block_bytes<S>(weight.format) / 4;
}

}  // namespace
}  // namespace tgi::cpu::step
