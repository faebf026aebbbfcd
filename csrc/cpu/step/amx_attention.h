// A chunk of attention over a bf16 cache with AMX tiles: sixteen query rows against up to 256
// tokens of context. As stored, a sub-block of keys is one tile per 32 dims, and a sub-block of
// values is one tile of half the height per 16 dims. Masks and softmax are those of
// attention_chunk.h. Included by attention_kernel.h, for kernel sets that have tiles.
#pragma once

#include "amx_tiles.h"
#include "attention_chunk.h"

namespace tgi::cpu::step {
namespace {

// Tiles 0 to 3 hold sums, of four sub-blocks or of four times 16 dims; tile 4 holds queries, 5
// keys, 6 weights and 7 values. A decoding token has few rows of queries: with no more rows in the
// tiles, a product of values takes nine cycles instead of sixteen, and less is stored.
constexpr TileConfig attention_tiles(int64_t num_rows) {
  const int rows = static_cast<int>(num_rows);
  TileConfig config;
  for (int tile = 0; tile < 5; ++tile) config.set(tile, rows, 64);
  config.set(5, 16, 64);
  config.set(6, rows, 32);
  config.set(7, 8, 64);
  return config;
}

constexpr int64_t kTileDims = 32;  // of queries and keys
constexpr int64_t kQueryBytes = kMaxHeadDim / kTileDims * kTileBytes;
constexpr int64_t kScoreStride = kChunkTokens * sizeof(float);
constexpr int64_t kWeightStride = kChunkTokens * 2;

inline int64_t key_steps(int64_t head_dim) { return (head_dim + kTileDims - 1) / kTileDims; }

// Gathers the tile's queries, [steps of 32 dims][16 rows][64 bytes], with zeros past the last dim.
template <class S>
inline void gather_queries(const Tile<S, Precision::kBF16>& tile, int64_t head_dim, uint8_t* out) {
  const int64_t size = head_dim * 2, steps = key_steps(head_dim);
  const int64_t whole = size / kTileRowBytes;
  for (int64_t r = 0; r < tile.count; ++r) {
    uint8_t* to = out + r * kTileRowBytes;
    int64_t step = 0;
    for (; step < whole; ++step, to += kTileBytes) {
      S::istore(to, S::iload(tile.query[r] + step * kTileRowBytes));
    }
    if (step == steps) continue;
    S::istore(to, S::izero());
    std::memcpy(to, tile.query[r] + step * kTileRowBytes,
                static_cast<size_t>(size % kTileRowBytes));
  }
}

// Prefetches bytes [begin, end) of what is read after this sub-block, or nothing if `from` is null.
// A few lines go with each tile that is loaded: more at once would wait for each other, and the
// tiles behind them.
template <class S>
inline void fetch_lines(const uint8_t* from, int64_t begin, int64_t end) {
  for (int64_t at = begin; from != nullptr && at < end; at += 64) fetch_stream<S>(from + at);
}

// Copies a sub-block's last dims of keys, if they are fewer than 32, and pads them with zeros:
// other data follows them, and 0 times NaN is NaN.
inline const uint8_t* padded_keys(const uint8_t* keys, int64_t head_dim, uint8_t* out) {
  const int64_t whole = head_dim / kTileDims, pairs = head_dim % kTileDims / 2;
  std::memset(out, 0, kTileBytes);
  std::memcpy(out, keys + whole * kTileBytes, static_cast<size_t>(pairs * kTileRowBytes));
  return out;
}

template <class S, int I>
inline void add_key_scores(const uint8_t* keys, const uint8_t* ahead, int64_t head_dim,
                           int64_t step, uint8_t* padding) {
  using T = typename S::Tiles;
  const bool is_short = (step + 1) * kTileDims > head_dim;
  const int64_t end = is_short ? 32 * head_dim : (step + 1) * kTileBytes;
  fetch_lines<S>(ahead, step * kTileBytes, end);
  T::template load<5>(is_short ? padded_keys(keys, head_dim, padding) : keys + step * kTileBytes,
                      kTileRowBytes);
  T::template dot_bf16<I, 4, 5>();
}

// Computes the scores of sub-blocks [b, b + Blocks), without a mask.
template <class S, int Blocks>
inline void tile_block_scores(const Chunk& chunk, int64_t head_dim, const uint8_t* queries,
                              int64_t b, float* scores) {
  using T = typename S::Tiles;
  alignas(64) uint8_t padding[kTileBytes];
  constexpr int64_t kAhead = ahead_of(Precision::kBF16);
  const uint8_t* ahead[4] = {};  // later keys; after the last keys, the first values
  for (int64_t i = 0; chunk.is_cold && i < Blocks; ++i) {
    const int64_t next = b + i + kAhead;
    ahead[i] = next < chunk.num_blocks ? chunk.keys[next] : chunk.values[next % chunk.num_blocks];
  }
  T::template zero<0>();
  if constexpr (Blocks == 4) T::template zero<1>();
  if constexpr (Blocks == 4) T::template zero<2>();
  if constexpr (Blocks == 4) T::template zero<3>();
  for (int64_t step = 0; step < key_steps(head_dim); ++step) {
    T::template load<4>(queries + step * kTileBytes, kTileRowBytes);
    const auto add = [&](auto i) {
      add_key_scores<S, i()>(chunk.keys[b + i()], ahead[i()], head_dim, step, padding);
    };
    add(std::integral_constant<int, 0>());
    if constexpr (Blocks == 4) add(std::integral_constant<int, 1>());
    if constexpr (Blocks == 4) add(std::integral_constant<int, 2>());
    if constexpr (Blocks == 4) add(std::integral_constant<int, 3>());
  }
  T::template store<0>(scores + 16 * b, kScoreStride);
  if constexpr (Blocks == 4) T::template store<1>(scores + 16 * (b + 1), kScoreStride);
  if constexpr (Blocks == 4) T::template store<2>(scores + 16 * (b + 2), kScoreStride);
  if constexpr (Blocks == 4) T::template store<3>(scores + 16 * (b + 3), kScoreStride);
}

// Masks the scores of positions that a row may not see.
template <class S>
void mask_scores(const Tile<S, Precision::kBF16>& tile, const Chunk& chunk, float* scores) {
  for (int64_t b = 0; b < chunk.num_blocks; ++b) {
    const int64_t begin = chunk.begin + 16 * b;
    if (tile.shortest >= begin + 16 && tile.max_hidden <= begin) continue;
    for (int64_t r = 0; r < tile.count; ++r) {
      float* const at = scores + r * kChunkTokens + 16 * b;
      S::store(at, keep_visible<S>(tile, static_cast<int>(r), begin, S::load(at)));
    }
  }
}

// Copies the values of the chunk's last sub-block with zeros past the context, where the contents
// are undefined.
inline const uint8_t* padded_values(const uint8_t* values, int64_t tokens, int64_t value_dim,
                                    uint8_t* out) {
  const int64_t pair_bytes = value_dim * 4, pairs = tokens / 2;
  std::memset(out, 0, static_cast<size_t>(8 * pair_bytes));
  std::memcpy(out, values, static_cast<size_t>(pairs * pair_bytes));
  for (int64_t d = 0; tokens % 2 != 0 && d < value_dim; ++d) {
    std::memcpy(out + pairs * pair_bytes + 4 * d, values + pairs * pair_bytes + 4 * d, 2);
  }
  return out;
}

template <class S, int I>
inline void add_value_sums(const uint8_t* values, const uint8_t* ahead, int64_t row_bytes) {
  using T = typename S::Tiles;
  constexpr int64_t kBytes = 8 * kTileRowBytes;  // of a tile of values
  fetch_lines<S>(ahead, I * kBytes, (I + 1) * kBytes);
  T::template load<7>(values + I * kTileRowBytes, row_bytes);
  T::template dot_bf16<I, 6, 7>();
}

// Computes dims [dim, dim + 16 * Vectors) of the sums of weight times value.
template <class S, int Vectors>
inline void tile_values(const Chunk& chunk, const uint8_t* const* values, const uint8_t* weights,
                        int64_t row_dim, int64_t dim, State<S, Precision::kBF16>& state) {
  using T = typename S::Tiles;
  T::template zero<0>();
  if constexpr (Vectors > 1) T::template zero<1>();
  if constexpr (Vectors > 2) T::template zero<2>();
  if constexpr (Vectors > 2) T::template zero<3>();
  for (int64_t b = 0; b < chunk.num_blocks; ++b) {
    const uint8_t* ahead = chunk.is_cold ? next_prefetch(chunk, Precision::kBF16, b) : nullptr;
    if (ahead != nullptr) ahead += 32 * dim;
    const uint8_t* const from = values[b] + 4 * dim;
    T::template load<6>(weights + 32 * b, kWeightStride);
    add_value_sums<S, 0>(from, ahead, 4 * row_dim);
    if constexpr (Vectors > 1) add_value_sums<S, 1>(from, ahead, 4 * row_dim);
    if constexpr (Vectors > 2) add_value_sums<S, 2>(from, ahead, 4 * row_dim);
    if constexpr (Vectors > 2) add_value_sums<S, 3>(from, ahead, 4 * row_dim);
  }
  const auto stride = state.stride * static_cast<int64_t>(sizeof(float));
  T::template store<0>(state.sums + dim, stride);
  if constexpr (Vectors > 1) T::template store<1>(state.sums + dim + 16, stride);
  if constexpr (Vectors > 2) T::template store<2>(state.sums + dim + 32, stride);
  if constexpr (Vectors > 2) T::template store<3>(state.sums + dim + 48, stride);
}

template <class S>
void tile_softmax(const Tile<S, Precision::kBF16>& tile, const Chunk& chunk, int64_t value_dim,
                  float* scores, uint8_t* weights, State<S, Precision::kBF16>& state) {
  constexpr Precision kPrecision = Precision::kBF16;
  for (int64_t r = 0; r < tile.count;) {
    const RowResults rows = {scores + r * kChunkTokens, weights + r * kWeightStride,
                             state.maximum + r, state.total + r};
    const bool is_first = r == 0;
    const int64_t left = tile.count - r;
    // Several rows at a time, because a single row waits for each of its steps.
    if (left >= 4) {
      chunk_softmax<S, kPrecision, 4>(chunk, value_dim, rows, is_first);
      r += 4;
    } else if (left == 3) {
      chunk_softmax<S, kPrecision, 3>(chunk, value_dim, rows, is_first);
      r += 3;
    } else if (left == 2) {
      chunk_softmax<S, kPrecision, 2>(chunk, value_dim, rows, is_first);
      r += 2;
    } else {
      chunk_softmax<S, kPrecision, 1>(chunk, value_dim, rows, is_first);
      r += 1;
    }
  }
}

// Adds up a chunk's values, weighted by the softmax of scores [16][256].
template <class S>
void attend_tiles_with_scores(const Tile<S, Precision::kBF16>& tile, const Chunk& chunk,
                              const ChunkShape& shape, float* scores,
                              State<S, Precision::kBF16>& state) {
  alignas(64) uint8_t weights[kTileRows * kWeightStride];
  if (shape.scores != nullptr) {
    change_scores<S, Precision::kBF16>(tile, tile.count, chunk, *shape.scores, scores);
  }
  const int64_t value_dim = shape.value_dim, row_dim = shape.row_dim;
  tile_softmax<S>(tile, chunk, value_dim, scores, weights, state);

  // A row of the last vector may read past the head, into memory of the pool or of this padding.
  alignas(64) uint8_t padding[32 * kMaxLatentDim + kTileRowBytes];
  const uint8_t* values[kSubBlocks];
  std::memcpy(values, chunk.values, sizeof(values));
  const int64_t last = chunk.num_blocks - 1, tokens = chunk.num_tokens - 16 * last;
  if (tokens < 16) values[last] = padded_values(values[last], tokens, row_dim, padding);
  int64_t dim = 0;
  for (; dim + 48 < value_dim; dim += 64) {
    tile_values<S, 4>(chunk, values, weights, row_dim, dim, state);
  }
  for (; dim + 16 < value_dim; dim += 32) {
    tile_values<S, 2>(chunk, values, weights, row_dim, dim, state);
  }
  if (dim < value_dim) tile_values<S, 1>(chunk, values, weights, row_dim, dim, state);
}

template <class S>
void attend_tiles_chunk(const Tile<S, Precision::kBF16>& tile, const Chunk& chunk,
                        const ChunkShape& shape, State<S, Precision::kBF16>& state) {
  static_assert(S::attention_rows(Precision::kBF16) == kTileRows);
  alignas(64) uint8_t queries[kQueryBytes];
  alignas(64) float scores[kTileRows * kChunkTokens];
  gather_queries<S>(tile, shape.head_dim, queries);
  int64_t b = 0;
  for (; b + 4 <= chunk.num_blocks; b += 4) {
    tile_block_scores<S, 4>(chunk, shape.head_dim, queries, b, scores);
  }
  for (; b < chunk.num_blocks; ++b) {
    tile_block_scores<S, 1>(chunk, shape.head_dim, queries, b, scores);
  }
  mask_scores<S>(tile, chunk, scores);
  attend_tiles_with_scores<S>(tile, chunk, shape, scores, state);
}

}  // namespace
}  // namespace tgi::cpu::step
