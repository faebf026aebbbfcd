// Attention over units of work; see attention.h for the terms and simd.h for the three variants.
#pragma once

#include "attention.h"
#include "kv_layout.h"
#include "simd.h"

namespace tgi::cpu::TGI_ISA {

namespace {

// Rows that go through the cache together, and vectors of head_dim they keep in registers.
#if defined(TGI_AVX512)
constexpr int kPassRows = 6;
constexpr int kPassVectors = 4;
#else
constexpr int kPassRows = 2;
constexpr int kPassVectors = 2;
#endif

constexpr int64_t kMaxHeadDim = 256;
constexpr int64_t kMaxBlocks = kChunk / kKeyTile;  // of a chunk, at the smallest block size

// A tile with its rows' queries and the running softmax.
struct TileState {
  const AttentionTile* tile;
  int64_t head;                                     // KV head
  alignas(64) float q[kMaxTileRows * kMaxHeadDim];  // [rows][head_dim], times scale and log2(e)
  int64_t visible[kMaxTileRows];                    // positions that the row attends to
};

// Parts are max[kMaxTileRows], sum[kMaxTileRows], values [kMaxTileRows][head_dim].
inline float* part_max(float* part) { return part; }
inline float* part_sum(float* part) { return part + kMaxTileRows; }
inline float* part_values(float* part) { return part + 2 * kMaxTileRows; }

// One chunk of one (sequence, KV head): the blocks that hold it.
template <typename Element>
struct Chunk {
  const Element* key[kMaxBlocks];
  const Element* value[kMaxBlocks];
  int64_t num_tokens;  // that some row of the tile attends to
};

// scores [Rows][kChunk] of Groups tiles of 16 keys, from d = 0 upwards.
template <int Rows, int Groups>
inline void score(const float* const* key, const float* q, int64_t dim, float* scores) {
  Vec sums[Rows][Groups];
  for (auto& row : sums) {
    for (Vec& sum : row) sum = splat(0.0f);
  }
  for (int64_t d = 0; d < dim; ++d) {
    Vec k[Groups];
    for (int g = 0; g < Groups; ++g) k[g] = load(key[g] + d * kKeyTile);
    for (int r = 0; r < Rows; ++r) {
      const Vec x = splat(q[r * dim + d]);
      for (int g = 0; g < Groups; ++g) sums[r][g] = fma(x, k[g], sums[r][g]);
    }
  }
  for (int r = 0; r < Rows; ++r) {
    for (int g = 0; g < Groups; ++g) store(scores + r * kChunk + g * kKeyTile, sums[r][g]);
  }
}

template <int Rows, int Groups>
inline void score(const uint16_t* const* key, const float* q, int64_t dim, float* scores) {
  Vec sums[Rows][Groups];
  for (auto& row : sums) {
    for (Vec& sum : row) sum = splat(0.0f);
  }
  for (int64_t d = 0; d < dim; d += 2) {
    Vec even[Groups], odd[Groups];
    for (int g = 0; g < Groups; ++g) load_pairs(key[g] + d * kKeyTile, even[g], odd[g]);
    for (int r = 0; r < Rows; ++r) {
      const Vec x = splat(q[r * dim + d]), y = splat(q[r * dim + d + 1]);
      for (int g = 0; g < Groups; ++g) sums[r][g] = fma(y, odd[g], fma(x, even[g], sums[r][g]));
    }
  }
  for (int r = 0; r < Rows; ++r) {
    for (int g = 0; g < Groups; ++g) store(scores + r * kChunk + g * kKeyTile, sums[r][g]);
  }
}

// values [Rows][dim] from column d on: sums of weights [Rows][kChunk] times V, tokens ascending.
// Positions from num_tokens on are not read: they may hold anything.
template <int Rows, int Vectors>
inline void weigh(const Chunk<float>& chunk, int64_t block_size, const float* weights, int64_t dim,
                  int64_t d, float* values) {
  Vec sums[Rows][Vectors];
  for (auto& row : sums) {
    for (Vec& sum : row) sum = splat(0.0f);
  }
  for (int64_t token = 0; token < chunk.num_tokens; ++token) {
    const float* v = chunk.value[token / block_size] + token % block_size * dim + d;
    for (int k = 0; k < Vectors; ++k) {
      const Vec x = load(v + 16 * k);
      for (int r = 0; r < Rows; ++r)
        sums[r][k] = fma(splat(weights[r * kChunk + token]), x, sums[r][k]);
    }
  }
  for (int r = 0; r < Rows; ++r) {
    for (int k = 0; k < Vectors; ++k) store(values + r * dim + d + 16 * k, sums[r][k]);
  }
}

template <int Rows, int Vectors>
inline void weigh(const Chunk<uint16_t>& chunk, int64_t block_size, const float* weights,
                  int64_t dim, int64_t d, float* values) {
  Vec sums[Rows][Vectors];
  for (auto& row : sums) {
    for (Vec& sum : row) sum = splat(0.0f);
  }
  for (int64_t token = 0; token < chunk.num_tokens; token += 2) {
    const uint16_t* v = chunk.value[token / block_size] + (token % block_size * dim + 2 * d);
    const bool has_odd = token + 1 < chunk.num_tokens;
    for (int k = 0; k < Vectors; ++k) {
      Vec even, odd;
      load_pairs(v + 32 * k, even, odd);
      for (int r = 0; r < Rows; ++r) {
        sums[r][k] = fma(splat(weights[r * kChunk + token]), even, sums[r][k]);
        if (has_odd) sums[r][k] = fma(splat(weights[r * kChunk + token + 1]), odd, sums[r][k]);
      }
    }
  }
  for (int r = 0; r < Rows; ++r) {
    for (int k = 0; k < Vectors; ++k) store(values + r * dim + d + 16 * k, sums[r][k]);
  }
}

// Turns a row's scores into weights 2^(score - max), zero from `visible` on. At least one is
// visible.
inline void softmax(float* scores, int64_t visible, int64_t num_tokens, float& max_out,
                    float& sum_out) {
  Vec largest = splat(-INFINITY);
  int64_t i = 0;
  for (; i + 16 <= visible; i += 16) largest = max(largest, load(scores + i));
  if (i < visible) largest = max(largest, keep_first(load(scores + i), visible - i, -INFINITY));
  max_out = reduce_max(largest);
  const Vec shift = splat(max_out);
  Vec sum = splat(0.0f);
  for (i = 0; i + 16 <= visible; i += 16) {
    const Vec weight = exp2(load(scores + i) - shift);
    store(scores + i, weight);
    sum = sum + weight;
  }
  if (i < visible) {
    const Vec weight = exp2(keep_first(load(scores + i) - shift, visible - i, -INFINITY));
    store(scores + i, weight);
    sum = sum + weight;
    i += 16;
  }
  for (; i < num_tokens; i += 16) store(scores + i, splat(0.0f));
  sum_out = reduce_add(sum);
}

// One pass of Rows rows over a chunk, into the part's entries of those rows.
template <int Rows, typename Element>
void attend_rows(const Chunk<Element>& chunk, const TileState& state, int64_t first_row,
                 int64_t start, int64_t block_size, int64_t dim, float* part) {
  alignas(64) float scores[Rows * kChunk];
  const float* q = state.q + first_row * dim;
  const int64_t num_groups = (chunk.num_tokens + kKeyTile - 1) / kKeyTile;
  const int64_t groups_per_block = block_size / kKeyTile;
  auto key_group = [&](int64_t group) {
    return chunk.key[group / groups_per_block] + group % groups_per_block * kKeyTile * dim;
  };
  int64_t group = 0;
  for (; group + 2 <= num_groups; group += 2) {
    const Element* const keys[] = {key_group(group), key_group(group + 1)};
    score<Rows, 2>(keys, q, dim, scores + group * kKeyTile);
  }
  if (group < num_groups) {
    const Element* const keys[] = {key_group(group)};
    score<Rows, 1>(keys, q, dim, scores + group * kKeyTile);
  }
  for (int r = 0; r < Rows; ++r) {
    const int64_t row = first_row + r;
    int64_t visible = state.visible[row] - start;
    visible = visible > chunk.num_tokens ? chunk.num_tokens : visible;
    if (visible > 0) {
      softmax(scores + r * kChunk, visible, chunk.num_tokens, part_max(part)[row],
              part_sum(part)[row]);
    } else {
      for (int64_t i = 0; i < chunk.num_tokens; i += 16)
        store(scores + r * kChunk + i, splat(0.0f));
      part_max(part)[row] = -INFINITY;
      part_sum(part)[row] = 0.0f;
    }
  }
  float* values = part_values(part) + first_row * dim;
  int64_t d = 0;
  for (; d + 16 * kPassVectors <= dim; d += 16 * kPassVectors) {
    weigh<Rows, kPassVectors>(chunk, block_size, scores, dim, d, values);
  }
  for (; d < dim; d += 16) weigh<Rows, 1>(chunk, block_size, scores, dim, d, values);
}

template <typename Element>
void attend_pass(const Chunk<Element>& chunk, const TileState& state, int64_t first_row,
                 int64_t num_rows, int64_t start, int64_t block_size, int64_t dim, float* part) {
  switch (num_rows) {
#if defined(TGI_AVX512)
    case 6:
      return attend_rows<6>(chunk, state, first_row, start, block_size, dim, part);
    case 5:
      return attend_rows<5>(chunk, state, first_row, start, block_size, dim, part);
    case 4:
      return attend_rows<4>(chunk, state, first_row, start, block_size, dim, part);
    case 3:
      return attend_rows<3>(chunk, state, first_row, start, block_size, dim, part);
#endif
    case 2:
      return attend_rows<2>(chunk, state, first_row, start, block_size, dim, part);
    default:
      return attend_rows<1>(chunk, state, first_row, start, block_size, dim, part);
  }
}

template <typename Element>
void attend_chunk(const AttentionParams& p, const TileState& state, int64_t index, float* part) {
  const AttentionTile& tile = *state.tile;
  const int64_t start = index * kChunk;
  int64_t most = 0;
  for (int64_t r = 0; r < tile.num_rows; ++r)
    most = state.visible[r] > most ? state.visible[r] : most;
  Chunk<Element> chunk;
  chunk.num_tokens = most - start < kChunk ? most - start : kChunk;
  const int32_t* blocks =
      p.block_table + tile.sequence * p.block_table_stride + start / p.block_size;
  const int64_t block_elements = p.block_size * p.head_dim;
  for (int64_t b = 0; b * p.block_size < chunk.num_tokens; ++b) {
    chunk.key[b] = static_cast<const Element*>(p.kv) + blocks[b] * p.block_stride +
                   state.head * block_elements;
    chunk.value[b] = chunk.key[b] + p.num_kv_heads * block_elements;
  }
  const int64_t num_passes = (tile.num_rows + kPassRows - 1) / kPassRows;
  for (int64_t pass = 0, row = 0; pass < num_passes; ++pass) {
    const int64_t rows = (tile.num_rows - row + num_passes - pass - 1) / (num_passes - pass);
    attend_pass(chunk, state, row, rows, start, p.block_size, p.head_dim, part);
    row += rows;
  }
}

// state += part, in the order of chunks. A row that sees nothing of the chunk is left alone.
inline void merge(float* state, const float* part, int64_t num_rows, int64_t dim) {
  for (int64_t r = 0; r < num_rows; ++r) {
    if (part[kMaxTileRows + r] == 0.0f) continue;
    // A lane a row would do; vectors of one value keep the arithmetic that of the rest.
    const Vec old_max = splat(state[r]), new_max = splat(part[r]);
    const Vec both = max(old_max, new_max);
    const Vec keep = exp2(old_max - both), add = exp2(new_max - both);
    const Vec sum = fma(splat(state[kMaxTileRows + r]), keep, splat(part[kMaxTileRows + r]) * add);
    store_first(state + r, both, 1);
    store_first(state + kMaxTileRows + r, sum, 1);
    float* values = part_values(state) + r * dim;
    const float* more = part + 2 * kMaxTileRows + r * dim;
    for (int64_t d = 0; d < dim; d += 16) {
      store(values + d, fma(load(values + d), keep, load(more + d) * add));
    }
  }
}

inline void clear(float* state, int64_t dim) {
  for (int64_t r = 0; r < kMaxTileRows; ++r) {
    part_max(state)[r] = -INFINITY;
    part_sum(state)[r] = 0.0f;
  }
  for (int64_t i = 0; i < kMaxTileRows * dim; ++i) part_values(state)[i] = 0.0f;
}

inline void open_tile(const AttentionParams& p, const AttentionTile& tile, int64_t head,
                      TileState& state) {
  const int64_t group = p.num_heads / p.num_kv_heads;
  const int64_t first_token = p.query_start[tile.sequence];
  const int64_t num_queries = p.query_start[tile.sequence + 1] - first_token;
  const int64_t cached = p.context_len[tile.sequence] - num_queries;
  const float factor = p.scale * kLog2e;
  state.tile = &tile;
  state.head = head;
  for (int64_t r = 0; r < tile.num_rows; ++r) {
    const int64_t row = tile.first_row + r, token = row / group;
    const float* q =
        p.q + ((first_token + token) * p.num_heads + head * group + row % group) * p.head_dim;
    for (int64_t d = 0; d < p.head_dim; ++d) state.q[r * p.head_dim + d] = q[d] * factor;
    state.visible[r] = cached + token + 1;
  }
}

inline void write_out(const AttentionParams& p, const AttentionTile& tile, int64_t head,
                      float* state) {
  const int64_t group = p.num_heads / p.num_kv_heads, dim = p.head_dim;
  const int64_t first_token = p.query_start[tile.sequence];
  for (int64_t r = 0; r < tile.num_rows; ++r) {
    const int64_t row = tile.first_row + r;
    float* out =
        p.out + ((first_token + row / group) * p.num_heads + head * group + row % group) * dim;
    const Vec inverse = splat(1.0f) / splat(part_sum(state)[r]);
    const float* values = part_values(state) + r * dim;
    for (int64_t d = 0; d < dim; d += 16) store(out + d, load(values + d) * inverse);
  }
}

}  // namespace

void attention_share(const AttentionParams& p, const AttentionShare& share) {
  const int64_t part_floats = attention_part_floats(p.head_dim);
  alignas(64) float part[kMaxTileRows * (kMaxHeadDim + 2)];
  TileState state;
  float* parts = share.parts;
  int64_t tile_index = 0;
  for (int64_t unit = share.begin; unit < share.end;) {
    const int64_t head = unit / share.units_per_head, in_head = unit % share.units_per_head;
    if (in_head == 0) tile_index = 0;
    while (in_head >= share.tiles[tile_index].first_unit + share.tiles[tile_index].num_chunks)
      ++tile_index;
    const AttentionTile& tile = share.tiles[tile_index];
    const int64_t first = in_head - tile.first_unit;
    const int64_t left = share.end - unit;
    const int64_t last = first + left < tile.num_chunks ? first + left : tile.num_chunks;
    open_tile(p, tile, head, state);
    if (first == 0) clear(share.carried, p.head_dim);
    for (int64_t chunk = first; chunk < last; ++chunk) {
      float* into = first == 0 ? part : parts;
      if (p.kv_type == FloatType::kFloat32) {
        attend_chunk<float>(p, state, chunk, into);
      } else {
        attend_chunk<uint16_t>(p, state, chunk, into);
      }
      if (first == 0) {
        merge(share.carried, part, tile.num_rows, p.head_dim);
      } else {
        parts += part_floats;
      }
    }
    if (first == 0 && last == tile.num_chunks) write_out(p, tile, head, share.carried);
    unit += last - first;
  }
}

void attention_merge(const AttentionParams& p, const AttentionTile& tile, int64_t head,
                     float* state, const float* const* parts, int64_t num_parts) {
  for (int64_t i = 0; i < num_parts; ++i) merge(state, parts[i], tile.num_rows, p.head_dim);
  write_out(p, tile, head, state);
}

}  // namespace tgi::cpu::TGI_ISA
