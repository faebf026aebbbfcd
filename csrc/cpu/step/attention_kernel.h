// Paged attention of a step: each member's row tiles, chunk by chunk. A tile's context may be split
// over members; chunk results are merged in the same order either way, so a split changes no bit.
// Included only by the step_<isa>.cpp files.
#pragma once

#include <utility>

#include "amx_attention.h"
#include "attention_chunk.h"
#include "attention_int8.h"
#include "attention_latent.h"

namespace tgi::cpu::step {
namespace {

template <class S, Precision precision>
using ChunkFunction = void (*)(const Tile<S, precision>&, const Chunk&, const ChunkShape&,
                               State<S, precision>&);

template <class S, Precision precision, int... Before>
inline ChunkFunction<S, precision> chunk_function(int64_t rows, bool is_latent,
                                                  std::integer_sequence<int, Before...>) {
  if constexpr (precision != Precision::kInt8) {
    constexpr ChunkFunction<S, precision> table[] = {
        attend_latent_chunk<S, precision, Before + 1>...};
    if (is_latent) return table[rows - 1];
  }
  if constexpr (precision == Precision::kInt8) {
    constexpr ChunkFunction<S, precision> table[] = {attend_int8_chunk<S, Before + 1>...};
    return table[rows - 1];
  } else {
    constexpr ChunkFunction<S, precision> table[] = {attend_chunk<S, precision, Before + 1>...};
    return table[rows - 1];
  }
}

// Whether attention over a cache of this precision uses tiles.
template <class S, Precision precision>
constexpr bool kAttendsByTiles = S::kHasTiles && precision == Precision::kBF16;

template <class S, Precision precision>
inline ChunkFunction<S, precision> chunk_function(int64_t rows, bool is_latent) {
  if constexpr (kAttendsByTiles<S, precision>) {
    return is_latent ? attend_latent_tiles_chunk<S> : attend_tiles_chunk<S>;
  } else {
    return chunk_function<S, precision>(
        rows, is_latent, std::make_integer_sequence<int, S::attention_rows(precision)>());
  }
}

template <class S, Precision precision>
inline Tile<S, precision> row_tile(const AttentionParams& p, const StepHeader& step,
                                   const AttentionPoint& at, bool is_cold) {
  constexpr int64_t kRows = S::attention_rows(precision);
  const int64_t group = p.num_heads / p.kv.num_heads;
  const int64_t start = step.query_start[at.sequence];
  const int64_t length = step.query_start[at.sequence + 1] - start;
  const int64_t before = step.context_len[at.sequence] - length;
  const int64_t row_bytes = p.kv.query_bytes();
  const ActivationRow out = row_of(p.out, step, start);  // a sequence's tokens are all of one kind
  Tile<S, precision> tile;
  const int64_t first = at.tile * kRows, all = length * group;
  tile.count = all - first < kRows ? all - first : kRows;
  int64_t token = first / group, offset = first % group;
  tile.precision = out.part.precision;
  tile.longest = 0;
  tile.shortest = INT64_MAX;
  for (int64_t r = 0; r < tile.count; ++r) {
    const int64_t head = at.head * group + offset;
    tile.query[r] =
        static_cast<const uint8_t*>(p.q) + ((start + token) * p.num_heads + head) * row_bytes;
    tile.head[r] = head;
    tile.position[r] = before + token;
    tile.hidden[r] = p.rule.first_seen(before + token);
    const int64_t visible = p.rule.end_seen(step, start + token, before + token);
    tile.visible[r] = visible;
    tile.longest = visible > tile.longest ? visible : tile.longest;
    tile.shortest = visible < tile.shortest ? visible : tile.shortest;
    if (p.rows != nullptr) {
      tile.rows[r] = p.rows + (start + token) * p.stride + head * p.true_dim;
    } else {
      tile.out[r] = slot_of<S>(out.part, out.row + token, head * p.true_dim / kBlockColumns);
    }
    if (++offset == group) {
      offset = 0;
      ++token;
    }
  }
  tile.max_hidden = tile.hidden[tile.count - 1];
  tile.first_chunk = tile.hidden[0] / kChunkTokens;
  tile.is_cold = is_cold;
  return tile;
}

// Returns the keys of the sub-block that holds a token.
inline const uint8_t* keys_at(const AttentionParams& p, const StepHeader& step,
                              const AttentionPoint& at, int64_t token) {
  const int32_t* const table = step.table(p.kv.group, at.sequence);
  return p.kv.keys(at.head, table[token / p.kv.block_size], token % p.kv.block_size);
}

// Returns the first token of the sub-block that holds a token. In the first chunk that a window
// leaves visible, sub-blocks that are hidden from all rows of a tile are not read: their blocks may
// already belong to other sequences.
inline int64_t sub_block_of(int64_t token) { return token / 16 * 16; }

// Returns the first token that a tile reads.
template <class S, Precision precision>
inline int64_t first_read(const AttentionParams& p, const StepHeader& step,
                          const AttentionPoint& at) {
  const int64_t length = step.query_start[at.sequence + 1] - step.query_start[at.sequence];
  const int64_t token = at.tile * S::attention_rows(precision) / (p.num_heads / p.kv.num_heads);
  return sub_block_of(p.rule.first_seen(step.context_len[at.sequence] - length + token));
}

// Looks up the chunk's sub-blocks and, if they are prefetched, the keys that are read next: those
// of this tile, then those of the tile `next`.
template <class S, Precision precision>
inline Chunk chunk_of(const AttentionParams& p, const StepHeader& step, const AttentionPoint& at,
                      const AttentionPoint& next, const Tile<S, precision>& tile, int64_t index) {
  const int64_t longest = tile.longest;
  Chunk chunk;
  chunk.is_cold = tile.is_cold;
  const int64_t start = index * kChunkTokens, stop = start + kChunkTokens;
  const int64_t seen = sub_block_of(tile.hidden[0]);
  chunk.begin = seen > start ? seen : start;
  chunk.num_tokens = (longest < stop ? longest : stop) - chunk.begin;
  chunk.num_blocks = (chunk.num_tokens + 15) / 16;
  const int32_t* table = step.table(p.kv.group, at.sequence) + chunk.begin / p.kv.block_size;
  int64_t offset = chunk.begin % p.kv.block_size;
  for (int64_t b = 0; b < chunk.num_blocks; ++b) {
    chunk.keys[b] = p.kv.keys(at.head, *table, offset);
    chunk.values[b] = p.kv.values(at.head, *table, offset);
    offset += 16;
    if (offset == p.kv.block_size) {
      offset = 0;
      ++table;
    }
  }
  chunk.num_ahead = chunk.num_blocks;
  const bool is_last = stop >= longest;
  if (!chunk.is_cold || (is_last && next.sequence >= step.num_sequences)) return chunk;
  const int64_t begin = is_last ? first_read<S, precision>(p, step, next) : stop;
  const int64_t end = is_last ? step.context_len[next.sequence] : longest;
  const int64_t ahead = ahead_of(precision);
  for (int64_t token = begin; token < end && token < begin + 16 * ahead; token += 16) {
    chunk.keys[chunk.num_ahead++] = keys_at(p, step, is_last ? next : at, token);
  }
  return chunk;
}

// Writes `Count` rows of a tile's results, from `first` on, into the next product's input.
template <class S, int Count, int MaxRows>
inline void write_some_rows(const AttentionParams& p, const RowTile<MaxRows>& tile, int64_t first,
                            const RowState<MaxRows>& state) {
  typename S::F factors[Count];
  BlockSlot to[Count];
  for (int64_t i = 0; i < Count; ++i) {
    to[i] = tile.out[first + i];
    factors[i] = S::set1(1.0f / state.total[first + i]);
  }
  for (int64_t d = 0; d < p.true_dim; d += kBlockColumns) {
    typename S::F a[Count], b[Count];
    TGI_UNROLL(16)
    for (int64_t i = 0; i < Count; ++i) {
      const float* sums = state.row(first + i) + d;
      a[i] = S::mul(S::load(sums), factors[i]);
      b[i] = S::mul(S::load(sums + 16), factors[i]);
    }
    write_blocks<S, Count>(tile.precision, a, b, to);
    for (BlockSlot& slot : to) slot.block += tile_block_bytes(tile.precision, S::kTileTokens);
  }
}

// The same as plain rows with any number of columns; lanes past a head's last dim are undefined.
template <class S, int MaxRows>
void write_plain_rows(const AttentionParams& p, const RowTile<MaxRows>& tile,
                      const RowState<MaxRows>& state) {
  for (int64_t r = 0; r < tile.count; ++r) {
    alignas(64) float values[kMaxHeadDim];
    const auto factor = S::set1(1.0f / state.total[r]);
    float* const to = p.true_dim % 16 == 0 ? tile.rows[r] : values;
    for (int64_t d = 0; d < p.true_dim; d += 16) {
      S::store(to + d, S::mul(S::load(state.row(r) + d), factor));
    }
    if (to == values) {
      std::memcpy(tile.rows[r], values, static_cast<size_t>(p.true_dim) * sizeof(float));
    }
  }
}

// Adds the weight of an attention sink to the sum of weights. A sink has no value.
template <class S, int MaxRows>
inline void add_sinks(const AttentionParams& p, const RowTile<MaxRows>& tile,
                      RowState<MaxRows>& state) {
  for (int64_t r = 0; r < tile.count; ++r) {
    alignas(64) float weight[16];
    const float sink = p.scores.sinks[tile.head[r]];
    S::store(weight, exp2<S, false>(S::set1(sink - state.maximum[r])));
    state.total[r] += weight[0];
  }
}

template <class S, int MaxRows>
void write_rows(const AttentionParams& p, const RowTile<MaxRows>& tile, RowState<MaxRows>& state) {
  if (p.scores.sinks != nullptr) add_sinks<S>(p, tile, state);
  if (p.rows != nullptr) return write_plain_rows<S>(p, tile, state);
  for_each_batch<S>(tile.count,
                    [&](auto n, int64_t first) { write_some_rows<S, n>(p, tile, first, state); });
}

template <class S, Precision precision>
inline AttentionPoint tile_after(const AttentionParams& p, const StepHeader& step,
                                 AttentionPoint at) {
  const int64_t group = p.num_heads / p.kv.num_heads;
  const int64_t rows = (step.query_start[at.sequence + 1] - step.query_start[at.sequence]) * group;
  at.chunk = 0;
  if (++at.tile * S::attention_rows(precision) < rows) return at;
  at.tile = 0;
  if (++at.head < p.kv.num_heads) return at;
  at.head = 0;
  ++at.sequence;
  return at;
}

inline bool same_tile(const AttentionPoint& a, const AttentionPoint& b) {
  return a.sequence == b.sequence && a.head == b.head && a.tile == b.tile;
}
inline bool same_point(const AttentionPoint& a, const AttentionPoint& b) {
  return same_tile(a, b) && a.chunk == b.chunk;
}

// The members that share the tile at `at`: the first of them, and how many have chunks of it.
struct TileMembers {
  int first;
  int count;
};

inline TileMembers tile_members(const AttentionPoint* split, const AttentionPoint& at, int member,
                                int num_members) {
  int first = member;
  while (same_tile(split[first], at) && split[first].chunk > 0) --first;
  int count = 1;
  for (int m = first + 1; m < num_members && same_tile(split[m], at) && split[m].chunk > 0; ++m) {
    if (!same_point(split[m], split[m + 1])) ++count;
  }
  return {first, count};
}

template <int MaxRows>
inline void store_partial(float* data, const RowState<MaxRows>& state, int64_t value_dim) {
  for (int64_t r = 0; r < MaxRows; ++r, data += value_dim + 2) {
    std::memcpy(data, state.row(r), value_dim * sizeof(float));
    data[value_dim] = state.maximum[r];
    data[value_dim + 1] = state.total[r];
  }
}

template <int MaxRows>
inline void load_partial(const float* data, RowState<MaxRows>& state, int64_t value_dim) {
  for (int64_t r = 0; r < MaxRows; ++r, data += value_dim + 2) {
    std::memcpy(state.row(r), data, value_dim * sizeof(float));
    state.maximum[r] = data[value_dim];
    state.total[r] = data[value_dim + 1];
  }
}

template <int MaxRows>
inline void clear(RowState<MaxRows>& state) {
  std::memset(state.sums, 0, MaxRows * state.stride * sizeof(float));
  for (int64_t r = 0; r < MaxRows; ++r) {
    state.maximum[r] = kMinusInfinity;
    state.total[r] = 0;
  }
}

inline ChunkShape chunk_shape(const AttentionParams& p) {
  const int64_t row_dim = p.kv.is_latent ? p.kv.head_dim : p.kv.value_dim;
  return {p.kv.head_dim, p.kv.value_dim, row_dim, p.scores.changes_scores() ? &p.scores : nullptr};
}

// Processes chunks [begin, end) of a tile whose other chunks belong to other members. The last
// member to arrive merges them all.
template <class S, Precision precision>
void attend_shared(const AttentionParams& p, const StepHeader& step, const AttentionPoint& at,
                   const AttentionPoint& next, const Tile<S, precision>& tile, int64_t begin,
                   int64_t end, int member, int num_members) {
  const int64_t value_dim = p.kv.value_dim;
  const int64_t size = S::attention_rows(precision) * (value_dim + 2);
  const auto function = chunk_function<S, precision>(tile.count, p.kv.is_latent);
  const AttentionPoint* const split = step.attention_split + p.split * (num_members + 1);
  const TileMembers all = tile_members(split, at, member, num_members);
  const AttentionPartial& partial = p.partials[all.first];
  State<S, precision> state(value_dim), merged(value_dim);
  clear(state);
  for (int64_t c = begin; c < end; ++c) {
    if (c < tile.first_chunk) continue;
    function(tile, chunk_of<S, precision>(p, step, at, next, tile, c), chunk_shape(p), state);
    store_partial(partial.data + c * size, state, value_dim);
  }
  if (partial.arrived->fetch_add(1, std::memory_order_acq_rel) + 1 != all.count) return;
  partial.arrived->store(0, std::memory_order_relaxed);
  clear(merged);
  for (int64_t c = tile.first_chunk; c * kChunkTokens < tile.longest; ++c) {
    load_partial(partial.data + c * size, state, value_dim);
    merge<S>(merged, state, tile.count);
  }
  write_rows<S>(p, tile, merged);
}

template <class S, Precision precision>
void attend_tile(const AttentionParams& p, const StepHeader& step, const AttentionPoint& at,
                 const AttentionPoint& next, const Tile<S, precision>& tile) {
  const auto function = chunk_function<S, precision>(tile.count, p.kv.is_latent);
  const ChunkShape shape = chunk_shape(p);
  State<S, precision> state(p.kv.value_dim), merged(p.kv.value_dim);
  if (tile.longest <= kChunkTokens) {
    function(tile, chunk_of<S, precision>(p, step, at, next, tile, 0), shape, state);
    return write_rows<S>(p, tile, state);
  }
  function(tile, chunk_of<S, precision>(p, step, at, next, tile, tile.first_chunk), shape, merged);
  for (int64_t c = tile.first_chunk + 1; c * kChunkTokens < tile.longest; ++c) {
    function(tile, chunk_of<S, precision>(p, step, at, next, tile, c), shape, state);
    merge<S>(merged, state, tile.count);
  }
  write_rows<S>(p, tile, merged);
}

// The calling thread's tiles, if attention uses any, with as many rows as the current row tile.
template <class S, Precision precision, bool = kAttendsByTiles<S, precision>>
class TilesOfRows {
 public:
  void use(int64_t) {}
};

template <class S, Precision precision>
class TilesOfRows<S, precision, true> {
 public:
  TilesOfRows() = default;
  TilesOfRows(const TilesOfRows&) = delete;
  TilesOfRows& operator=(const TilesOfRows&) = delete;
  ~TilesOfRows() {
    if (num_rows_ != 0) S::Tiles::release();
  }
  void use(int64_t num_rows) {
    if (num_rows == num_rows_) return;
    num_rows_ = num_rows;
    S::Tiles::configure(attention_tiles(num_rows));
  }

 private:
  int64_t num_rows_ = 0;
};

template <class S, Precision precision>
void attend(const AttentionParams& p, const StepHeader& step, int member, int num_members) {
  const AttentionPoint* const split = step.attention_split + p.split * (num_members + 1);
  AttentionPoint at = split[member];
  const AttentionPoint stop = split[member + 1];
  bool is_cold = true;
  TilesOfRows<S, precision> tiles;
  constexpr int64_t kWideRows = kWidensQueries<S, precision> ? S::attention_rows(precision) : 0;
  alignas(64) float queries[kWideRows * kMaxHeadDim + 1];
  while (!same_point(at, stop)) {
    Tile<S, precision> tile = row_tile<S, precision>(p, step, at, is_cold);
    for (int64_t r = 0; kWideRows > 0 && !p.kv.is_latent && r < tile.count; ++r) {
      float* const wide = queries + r * p.kv.head_dim;
      widen_query<S>(tile.query[r], p.kv.head_dim, wide);
      tile.query[r] = reinterpret_cast<const uint8_t*>(wide);
    }
    tiles.use(tile.count);
    const AttentionPoint next = tile_after<S, precision>(p, step, at);
    const int64_t num_chunks = (tile.longest + kChunkTokens - 1) / kChunkTokens;
    const int64_t end = same_tile(at, stop) ? stop.chunk : num_chunks;
    if (at.chunk == 0 && end == num_chunks) {
      attend_tile<S, precision>(p, step, at, next, tile);
    } else {
      attend_shared<S, precision>(p, step, at, next, tile, at.chunk, end, member, num_members);
    }
    if (same_tile(at, stop)) return;
    is_cold = next.tile == 0;
    at = next;
  }
}

template <class S>
void attention(const AttentionParams& p, const StepHeader& step, int member, int num_members) {
  switch (p.kv.precision) {
    case Precision::kInt8:
      return attend<S, Precision::kInt8>(p, step, member, num_members);
    case Precision::kBF16:
      return attend<S, Precision::kBF16>(p, step, member, num_members);
    case Precision::kFloat32:
      return attend<S, Precision::kFloat32>(p, step, member, num_members);
  }
}

}  // namespace
}  // namespace tgi::cpu::step
