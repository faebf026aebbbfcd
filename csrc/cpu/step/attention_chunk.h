// A chunk of paged attention: a tile of query rows against up to 256 tokens of context, where
// grouped heads share each read of keys and values. The context may be split over members; chunk
// results are merged in the same order either way. Online softmax: Milakov and Gimelshein, arXiv
// 1805.02867. Included only by the step_<isa>.cpp files.
#pragma once

#include "kv_factors.h"
#include "simd_math.h"
#include "step.h"
#include "stream.h"

namespace tgi::cpu::step {
namespace {

constexpr int64_t kSubBlocks = kChunkTokens / 16;
constexpr int64_t kMaxAhead = 8;
// How far ahead of their use keys and values are prefetched, in sub-blocks: 8 KiB of a head of 64.
constexpr int64_t ahead_of(Precision precision) {
  return precision == Precision::kInt8 ? kMaxAhead : 4;
}
// How many more sub-blocks of values are prefetched during the softmax, so that the memory is not
// idle.
constexpr int64_t softmax_ahead_of(Precision precision) {
  return precision == Precision::kInt8 ? 8 : 6;
}
constexpr float kMinusInfinity = -__builtin_inff();

// A row tile of one sequence and KV head: rows [first, first + count) of its query tokens times
// grouped heads.
template <int MaxRows>
struct RowTile {
  const uint8_t* query[MaxRows];
  int64_t position[MaxRows];  // of a row's token in its context
  int64_t visible[MaxRows];   // end of the context that a row may see
  int64_t hidden[MaxRows];    // and its start: earlier tokens are outside its window or chunk
  int64_t head[MaxRows];
  BlockSlot out[MaxRows];  // where the first 32 columns of its result go,
  float* rows[MaxRows];    // or where the whole result goes as plain floats
  Precision precision;     // of `out`
  int64_t count;
  int64_t longest, shortest;  // largest and smallest of `visible`
  int64_t max_hidden;         // largest of `hidden`
  int64_t first_chunk;        // first chunk that is not hidden from all rows
  bool is_cold;               // the previous tile used other keys and values
};

// The state of a tile's rows after some chunks: sums of p * v, the maximum score, and the sum of p.
template <int MaxRows>
struct RowState {
  alignas(64) float sums[MaxRows * kMaxHeadDim];
  float maximum[MaxRows];
  float total[MaxRows];
  int64_t stride;  // floats per row: whole vectors and no more, or rows would share L1 sets

  explicit RowState(int64_t value_dim) : stride((value_dim + 15) / 16 * 16) {}
  float* row(int64_t r) { return sums + r * stride; }
  const float* row(int64_t r) const { return sums + r * stride; }
};

template <class S, Precision precision>
using Tile = RowTile<S::attention_rows(precision)>;
template <class S, Precision precision>
using State = RowState<S::attention_rows(precision)>;

// The dimensions of one layer.
struct ChunkShape {
  int64_t head_dim;  // of keys, as stored
  int64_t value_dim;
  int64_t row_dim;            // from one token's values to the next token's
  const ScoreParams* scores;  // null if scores are not modified
};

struct Chunk {
  const uint8_t* keys[kSubBlocks + kMaxAhead];  // this chunk's sub-blocks, then the next ones read
  const uint8_t* values[kSubBlocks];
  int64_t begin;  // first token
  int64_t num_tokens;
  int64_t num_blocks;
  int64_t num_ahead;  // number of entries in `keys`
  bool is_cold;       // not read just before, so keys and values are prefetched
};

// Returns the first `seen` of sixteen values, and `other` in the remaining lanes.
template <class S>
inline typename S::F keep_first(typename S::F values, int64_t seen, float other) {
  if (seen >= 16) return values;
  return S::select_head(static_cast<int>(seen < 0 ? 0 : seen), values, S::set1(other));
}

// Returns the scores of sixteen tokens from `begin` on, -inf for those that a row may not see.
template <class S, int MaxRows>
inline typename S::F keep_visible(const RowTile<MaxRows>& tile, int r, int64_t begin,
                                  typename S::F scores) {
  const int64_t hidden = tile.hidden[r] - begin;
  if (hidden > 0) {
    scores = S::select_head(static_cast<int>(hidden < 16 ? hidden : 16), S::set1(kMinusInfinity),
                            scores);
  }
  return keep_first<S>(scores, tile.visible[r] - begin, kMinusInfinity);
}

// Computes the scores of sub-blocks [b, b + Blocks) of a chunk, -inf for tokens that a row may not
// see.
template <class S, Precision precision, int Rows, int Blocks>
inline void block_scores(const Tile<S, precision>& tile, const Chunk& chunk, int64_t head_dim,
                         int64_t b, float* scores) {
  using Kv = KvTraits<S, precision>;
  const int64_t steps = head_dim / Kv::kNumbers;
  const bool is_cold = chunk.is_cold;
  const uint8_t* ahead[Blocks] = {};  // later keys; after the last keys, the first values
  typename S::F sums[Rows][Blocks];
  TGI_UNROLL(4)
  for (int i = 0; i < Blocks; ++i) {
    const int64_t next = b + i + ahead_of(precision);
    if (next < chunk.num_blocks) {
      ahead[i] = chunk.keys[next];
    } else if (is_cold) {
      ahead[i] = chunk.values[next % chunk.num_blocks];
    }
    TGI_UNROLL(16)
    for (int r = 0; r < Rows; ++r) sums[r][i] = S::zero();
  }
  for (int64_t k = 0; k < steps; ++k) {
    TGI_UNROLL(4)
    for (int i = 0; i < Blocks; ++i) {
      if (is_cold) fetch_stream<S>(ahead[i] + 64 * k);
    }
    TGI_UNROLL(2)
    for (int part = 0; part < Kv::kParts; ++part) {
      const int64_t at = Kv::kNumbers * Kv::kFactorBytes * k + Kv::factor_at(part);
      typename Kv::Vector keys[Blocks];
      TGI_UNROLL(4)
      for (int i = 0; i < Blocks; ++i) keys[i] = Kv::load(chunk.keys[b + i] + 64 * k, part);
      TGI_UNROLL(16)
      for (int r = 0; r < Rows; ++r) {
        const auto value = Kv::broadcast(tile.query[r] + at);
        TGI_UNROLL(4)
        for (int i = 0; i < Blocks; ++i) sums[r][i] = Kv::multiply(sums[r][i], keys[i], value);
      }
    }
  }
  float* const out = scores + 16 * b;
  if (tile.shortest >= chunk.begin + 16 * (b + Blocks) && tile.max_hidden <= chunk.begin + 16 * b) {
    TGI_UNROLL(16)
    for (int r = 0; r < Rows; ++r) {
      TGI_UNROLL(4)
      for (int i = 0; i < Blocks; ++i) S::store(out + r * kChunkTokens + 16 * i, sums[r][i]);
    }
    return;
  }
  TGI_UNROLL(4)
  for (int i = 0; i < Blocks; ++i) {
    const int64_t begin = chunk.begin + 16 * (b + i);
    TGI_UNROLL(16)
    for (int r = 0; r < Rows; ++r) {
      S::store(scores + r * kChunkTokens + 16 * (b + i),
               keep_visible<S>(tile, r, begin, sums[r][i]));
    }
  }
}

// How many sub-blocks, or vectors of values, are multiplied by all rows at once: as many as leave
// the sums in registers.
template <class S>
constexpr int kMostAtOnce = S::kNumRegisters >= 32 ? 4 : 1;

// scores: [Rows][256].
template <class S, Precision precision, int Rows>
void chunk_scores(const Tile<S, precision>& tile, const Chunk& chunk, int64_t head_dim,
                  float* scores) {
  int64_t b = 0;
  if constexpr (kMostAtOnce<S> == 4) {
    for (; b + 4 <= chunk.num_blocks; b += 4) {
      block_scores<S, precision, Rows, 4>(tile, chunk, head_dim, b, scores);
    }
    for (; b + 2 <= chunk.num_blocks; b += 2) {
      block_scores<S, precision, Rows, 2>(tile, chunk, head_dim, b, scores);
    }
  }
  for (; b < chunk.num_blocks; ++b) {
    block_scores<S, precision, Rows, 1>(tile, chunk, head_dim, b, scores);
  }
}

// Caps scores and adds the distance term (ALiBi); hidden scores stay hidden.
template <class S, Precision precision>
void change_scores(const Tile<S, precision>& tile, int64_t num_rows, const Chunk& chunk,
                   const ScoreParams& p, float* scores) {
  alignas(64) static constexpr float kLanes[16] = {0, 1, 2,  3,  4,  5,  6,  7,
                                                   8, 9, 10, 11, 12, 13, 14, 15};
  const auto lanes = S::load(kLanes), one = S::set1(1.0f);
  const auto cap = S::set1(p.cap), steepness = S::set1(p.cap == 0 ? 0 : 2 * kFloatLog2E / p.cap);
  for (int64_t r = 0; r < num_rows; ++r) {
    const auto slope = S::set1(p.slopes == nullptr ? 0 : p.slopes[tile.head[r]]);
    for (int64_t b = 0; b < chunk.num_blocks; ++b) {
      const int64_t begin = chunk.begin + 16 * b;
      float* const at = scores + r * kChunkTokens + 16 * b;
      auto score = S::load(at);
      if (p.cap != 0) {  // tanh(y) = 1 - 2 / (e^2y + 1)
        const auto e = exp2<S, false>(S::mul(score, steepness));
        score = S::mul(cap, S::sub(one, S::div(S::set1(2.0f), S::add(e, one))));
      }
      if (p.slopes != nullptr) {  // whole numbers below 2^24 are exact
        const auto distance = S::set1(static_cast<float>(begin - tile.position[r]));
        score = S::fma(slope, S::add(distance, lanes), score);
      }
      S::store(at, keep_visible<S>(tile, static_cast<int>(r), begin, score));
    }
  }
}

// Prefetches the values that follow those that the score loop has prefetched.
template <class S, Precision precision>
class ValueFetch {
 public:
  ValueFetch(const Chunk& chunk, int64_t value_dim, int64_t num_steps) : chunk_(chunk) {
    constexpr int64_t kBytes = precision == Precision::kInt8   ? 17  // per dim of a sub-block
                               : precision == Precision::kBF16 ? 32
                                                               : 64;
    block_ = ahead_of(precision);
    const int64_t stop = block_ + softmax_ahead_of(precision);
    stop_ = stop < chunk.num_blocks ? stop : chunk.num_blocks;
    lines_ = (kBytes * value_dim + 63) / 64;
    share_ = stop_ > block_ && chunk.is_cold
                 ? ((stop_ - block_) * lines_ + num_steps - 1) / num_steps
                 : 0;
  }
  // Prefetches one step's share.
  inline void step() {
    for (int64_t i = 0; i < share_ && block_ < stop_; ++i) {
      fetch_stream<S>(chunk_.values[block_] + 64 * line_);
      if (++line_ < lines_) continue;
      line_ = 0;
      ++block_;
    }
  }

 private:
  const Chunk& chunk_;
  int64_t block_, stop_, lines_, share_, line_ = 0;
};

// Scores [row][256] of some rows, and their softmax: weights in the precision that values are
// multiplied in, or as float32 before they become integers (these may overwrite the scores).
struct RowResults {
  const float* scores;
  uint8_t* weights;
  float* maximum;
  float* total;
};

// is_fetching: whether to prefetch the chunk's values, if they are cold.
template <class S, Precision precision, int Rows>
void chunk_softmax(const Chunk& chunk, int64_t value_dim, const RowResults& out, bool is_fetching) {
  constexpr bool kIsBF16 = precision == Precision::kBF16 && S::kHasBF16Dot;
  const float* const scores = out.scores;
  uint8_t* const weights = out.weights;
  ValueFetch<S, precision> values(chunk, value_dim, chunk.num_blocks);
  typename S::F largest[Rows];
  TGI_UNROLL(16)
  for (int r = 0; r < Rows; ++r) largest[r] = S::set1(kMinusInfinity);
  for (int64_t b = 0; b < chunk.num_blocks; ++b) {
    TGI_UNROLL(16)
    for (int r = 0; r < Rows; ++r) {
      largest[r] = S::max(S::load(scores + r * kChunkTokens + 16 * b), largest[r]);
    }
  }
  typename S::F shift[Rows], total[Rows];
  TGI_UNROLL(16)
  for (int r = 0; r < Rows; ++r) {
    const float maximum = S::reduce_max(largest[r]);
    out.maximum[r] = maximum;
    shift[r] = S::set1(maximum == kMinusInfinity ? 0.0f : maximum);
    total[r] = S::zero();
  }
  const auto weigh = [&](int r, int64_t at) {
    const auto score = S::sub(S::load(scores + at), shift[r]);  // at most 0
    const auto weight = exp2_below_128<S, precision != Precision::kFloat32>(score);
    total[r] = S::add(total[r], weight);
    return weight;
  };
  int64_t b = 0;
  if constexpr (kIsBF16 && S::kStoresBF16Pairs) {
    for (; b + 2 <= chunk.num_blocks; b += 2) {
      if (is_fetching) values.step();
      if (is_fetching) values.step();
      TGI_UNROLL(16)
      for (int r = 0; r < Rows; ++r) {
        const int64_t at = r * kChunkTokens + 16 * b;
        const auto first = weigh(r, at), second = weigh(r, at + 16);
        store_both_bf16<S>(weights + at * 2, first, second);
      }
    }
  }
  for (; b < chunk.num_blocks; ++b) {
    if (is_fetching) values.step();
    TGI_UNROLL(16)
    for (int r = 0; r < Rows; ++r) {
      const int64_t at = r * kChunkTokens + 16 * b;
      const auto p = weigh(r, at);
      if constexpr (kIsBF16) {
        S::store_bf16(weights + at * 2, p);
      } else {
        S::store(reinterpret_cast<float*>(weights) + at, p);
      }
    }
  }
  TGI_UNROLL(16)
  for (int r = 0; r < Rows; ++r) out.total[r] = S::reduce_add(total[r]);
}

#pragma GCC diagnostic push
// GCC 16 unrolls a loop over sub-blocks and warns of values[16]; there are at most 16 of them.
#pragma GCC diagnostic ignored "-Warray-bounds"
// Returns what to prefetch while the values of sub-block b are read: later values, and after the
// last of them the keys that are read next. Null if the softmax loop has already prefetched it, or
// if nothing further is known.
inline const uint8_t* next_prefetch(const Chunk& chunk, Precision precision, int64_t b) {
  const int64_t next = b + ahead_of(precision), value = next + softmax_ahead_of(precision);
  if (value < chunk.num_blocks) return chunk.values[value];
  return next >= chunk.num_blocks && next < chunk.num_ahead ? chunk.keys[next] : nullptr;
}
#pragma GCC diagnostic pop

// Computes dims [first_dim, first_dim + 16 * Vectors) of the sums of weight times value.
template <class S, Precision precision, int Rows, int Vectors>
void chunk_values(const Chunk& chunk, const uint8_t* weights, int64_t row_dim, int64_t first_dim,
                  State<S, precision>& state) {
  using Kv = KvTraits<S, precision>;
  constexpr int kStepTokens = Kv::kNumbers;
  constexpr int64_t kWeightBytes = Kv::kFactorBytes;
  typename S::F sums[Rows][Vectors];
  const bool is_cold = chunk.is_cold;
  TGI_UNROLL(16)
  for (int r = 0; r < Rows; ++r) {
    TGI_UNROLL(4)
    for (int v = 0; v < Vectors; ++v) sums[r][v] = S::zero();
  }
  for (int64_t b = 0; b < chunk.num_blocks; ++b) {
    const int64_t tokens = chunk.num_tokens - 16 * b < 16 ? chunk.num_tokens - 16 * b : 16;
    const uint8_t* values = chunk.values[b] + first_dim * 4;
    const uint8_t* weight = weights + 16 * b * kWeightBytes;
    const uint8_t* ahead = next_prefetch(chunk, precision, b);
    ahead = ahead == nullptr ? values : ahead + first_dim * 4;
    for (int64_t t = 0; t < tokens; t += kStepTokens) {
      const int64_t row_bytes = t / kStepTokens * row_dim * 4;
      TGI_UNROLL(4)
      for (int v = 0; v < Vectors; ++v) {
        if (is_cold) fetch_stream<S>(ahead + row_bytes + 64 * v);
      }
      // The second token of the last pair may be past the context, where the contents are
      // undefined.
      const bool is_pair = t + 1 < tokens;
      TGI_UNROLL(2)
      for (int part = 0; part < Kv::kParts; ++part) {
        if (Kv::kParts == 2 && part == 0 && !is_pair) continue;
        typename Kv::Vector vector[Vectors];
        TGI_UNROLL(4)
        for (int v = 0; v < Vectors; ++v) vector[v] = Kv::load(values + row_bytes + 64 * v, part);
        if constexpr (Kv::kNumbers == 2 && Kv::kParts == 1) {
          const auto mask = S::iset1(is_pair ? -1 : 0xFFFF);
          TGI_UNROLL(4)
          for (int v = 0; v < Vectors; ++v) vector[v] = S::iand(vector[v], mask);
        }
        TGI_UNROLL(16)
        for (int r = 0; r < Rows; ++r) {
          const int64_t at = (r * kChunkTokens + t) * kWeightBytes + Kv::factor_at(part);
          const auto p = Kv::broadcast(weight + at);
          TGI_UNROLL(4)
          for (int v = 0; v < Vectors; ++v) sums[r][v] = Kv::multiply(sums[r][v], vector[v], p);
        }
      }
    }
  }
  TGI_UNROLL(16)
  for (int r = 0; r < Rows; ++r) {
    TGI_UNROLL(4)
    for (int v = 0; v < Vectors; ++v) S::store(state.row(r) + first_dim + 16 * v, sums[r][v]);
  }
}

// Adds up a chunk's values, weighted by the softmax of scores [Rows][256].
template <class S, Precision precision, int Rows>
void attend_with_scores(const Tile<S, precision>& tile, const Chunk& chunk, const ChunkShape& shape,
                        float* scores, State<S, precision>& state) {
  alignas(64) uint8_t weights[Rows * kChunkTokens * KvTraits<S, precision>::kFactorBytes];
  const int64_t value_dim = shape.value_dim, row_dim = shape.row_dim;
  if (shape.scores != nullptr)
    change_scores<S, precision>(tile, Rows, chunk, *shape.scores, scores);
  chunk_softmax<S, precision, Rows>(chunk, value_dim, {scores, weights, state.maximum, state.total},
                                    true);
  // The last vector may read past the head, into memory that also belongs to the pool.
  int64_t dim = 0;
  if constexpr (kMostAtOnce<S> == 4) {
    for (; dim + 48 < value_dim; dim += 64) {
      chunk_values<S, precision, Rows, 4>(chunk, weights, row_dim, dim, state);
    }
    for (; dim + 16 < value_dim; dim += 32) {
      chunk_values<S, precision, Rows, 2>(chunk, weights, row_dim, dim, state);
    }
  }
  for (; dim < value_dim; dim += 16) {
    chunk_values<S, precision, Rows, 1>(chunk, weights, row_dim, dim, state);
  }
}

template <class S, Precision precision, int Rows>
void attend_chunk(const Tile<S, precision>& tile, const Chunk& chunk, const ChunkShape& shape,
                  State<S, precision>& state) {
  alignas(64) float scores[Rows * kChunkTokens];
  chunk_scores<S, precision, Rows>(tile, chunk, shape.head_dim, scores);
  attend_with_scores<S, precision, Rows>(tile, chunk, shape, scores, state);
}

// Merges the rows of `next` into `merged`, in this order. A chunk that is hidden from a row does
// not change that row.
template <class S, int MaxRows>
void merge(RowState<MaxRows>& merged, const RowState<MaxRows>& next, int64_t num_rows) {
  for (int64_t r = 0; r < num_rows; ++r) {
    if (next.total[r] == 0.0f) continue;
    const float maximum = next.maximum[r] > merged.maximum[r] ? next.maximum[r] : merged.maximum[r];
    const auto old_factor = exp2<S, false>(S::set1(merged.maximum[r] - maximum));
    const auto new_factor = exp2<S, false>(S::set1(next.maximum[r] - maximum));
    alignas(64) float total[16];
    S::store(total, S::fma(S::set1(merged.total[r]), old_factor,
                           S::mul(S::set1(next.total[r]), new_factor)));
    merged.total[r] = total[0];
    merged.maximum[r] = maximum;
    for (int64_t d = 0; d < merged.stride; d += 16) {
      const auto part = S::mul(S::load(next.row(r) + d), new_factor);
      S::store(merged.row(r) + d, S::fma(S::load(merged.row(r) + d), old_factor, part));
    }
  }
}

}  // namespace
}  // namespace tgi::cpu::step
