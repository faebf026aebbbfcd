// A chunk of attention over an int8 cache. Sums of products are exact integers. Queries and softmax
// weights are 16-bit numbers, split into a high and a low byte; their rounding is negligible next
// to that of keys and values. Included only by the step_<isa>.cpp files.
#pragma once

#include "attention_chunk.h"

namespace tgi::cpu::step {
namespace {

// Offset of a strip of 32 dims in a row's query.
constexpr int64_t query_strip(int64_t strip) { return strip * kInt8QueryStrip; }

// Multiplies sub-blocks [b, b + Blocks) by one strip of a row's query, scales the result and adds
// it to the sums over strips.
template <class S, int Rows, int Blocks>
inline void add_strip_scores(const Tile<S, Precision::kInt8>& tile,
                             const uint8_t* const (&keys)[Blocks],
                             const uint8_t* const (&ahead)[Blocks], int64_t head_dim, int64_t strip,
                             typename S::F (&sums)[Rows][Blocks]) {
  typename S::I high[Rows][Blocks], low[Rows][Blocks];
  TGI_UNROLL(16)
  for (int r = 0; r < Rows; ++r) {
    const auto start = S::ibroadcast(tile.query[r] + query_strip(strip) + kInt8QueryStart);
    TGI_UNROLL(2)
    for (int i = 0; i < Blocks; ++i) {
      high[r][i] = S::izero();
      low[r][i] = start;
    }
  }
  TGI_UNROLL(4)
  for (int j = 0; j < 8; ++j) {
    typename S::I codes[Blocks];
    TGI_UNROLL(2)
    for (int i = 0; i < Blocks; ++i) {
      fetch_stream<S>(ahead[i] + 64 * (8 * strip + j));
      codes[i] = S::iload(keys[i] + 64 * (8 * strip + j));
    }
    TGI_UNROLL(16)
    for (int r = 0; r < Rows; ++r) {
      const uint8_t* query = tile.query[r] + query_strip(strip) + 4 * j;
      const auto high_bytes = S::ibroadcast(query), low_bytes = S::ibroadcast(query + 32);
      TGI_UNROLL(2)
      for (int i = 0; i < Blocks; ++i) {
        high[r][i] = S::dot(high[r][i], codes[i], high_bytes);
        low[r][i] = S::dot(low[r][i], codes[i], low_bytes);
      }
    }
  }
  TGI_UNROLL(2)
  for (int i = 0; i < Blocks; ++i) {
    const auto scale = S::load_half(keys[i] + int8_scales(head_dim, strip));
    TGI_UNROLL(16)
    for (int r = 0; r < Rows; ++r) {
      float factor;
      std::memcpy(&factor, tile.query[r] + query_strip(strip) + kInt8QueryScale, 4);
      const auto total = S::to_float(S::iadd(S::ishl(high[r][i], 8), low[r][i]));
      sums[r][i] = S::fma(S::mul(total, S::set1(factor)), scale, sums[r][i]);
    }
  }
}

template <class S, int Rows, int Blocks>
inline void int8_block_scores(const Tile<S, Precision::kInt8>& tile, const Chunk& chunk,
                              const ChunkShape& shape, int64_t b, float* scores) {
  const int64_t head_dim = shape.head_dim, value_dim = shape.value_dim;
  const uint8_t* keys[Blocks];
  const uint8_t* ahead[Blocks];
  typename S::F sums[Rows][Blocks];
  for (int i = 0; i < Blocks; ++i) {
    const int64_t next = b + i + ahead_of(Precision::kInt8);
    keys[i] = chunk.keys[b + i];
    ahead[i] = next < chunk.num_blocks ? chunk.keys[next] : chunk.values[next % chunk.num_blocks];
    // Scales are read before codes; `int8_weights` reads those of values.
    for (int64_t strip = 0; 32 * strip < head_dim; strip += 2) {
      fetch_stream<S>(ahead[i] + int8_scales(head_dim, strip));
    }
    for (int64_t strip = 0; 32 * strip < value_dim; strip += 2) {
      fetch_stream<S>(chunk.values[b + i] + int8_scales(value_dim, strip));
    }
    TGI_UNROLL(16)
    for (int r = 0; r < Rows; ++r) sums[r][i] = S::zero();
  }
  for (int64_t strip = 0; 32 * strip < head_dim; ++strip) {
    add_strip_scores<S, Rows, Blocks>(tile, keys, ahead, head_dim, strip, sums);
  }
  TGI_UNROLL(2)
  for (int i = 0; i < Blocks; ++i) {
    TGI_UNROLL(16)
    for (int r = 0; r < Rows; ++r) {
      S::store(scores + r * kChunkTokens + 16 * (b + i),
               keep_visible<S>(tile, r, chunk.begin + 16 * (b + i), sums[r][i]));
    }
  }
}

// Computes the factors for a strip of values: each row's softmax weight times the value's scale, as
// 16 bits relative to the chunk's largest. weights: [Rows][high, low][256]; factors: the value of
// one unit of a weight. Tokens that a row may not see count as zero, whatever their memory holds.
template <class S, int Rows>
inline void int8_weights(const Tile<S, Precision::kInt8>& tile, const Chunk& chunk,
                         int64_t value_dim, int64_t strip, const float* softmax, uint8_t* weights,
                         float* factors) {
  alignas(64) float scaled[Rows * kChunkTokens];
  typename S::I largest[Rows];
  TGI_UNROLL(16)
  for (int r = 0; r < Rows; ++r) largest[r] = S::izero();
  for (int64_t b = 0; b < chunk.num_blocks; ++b) {
    const auto scale = S::load_half(chunk.values[b] + int8_scales(value_dim, strip));
    TGI_UNROLL(16)
    for (int r = 0; r < Rows; ++r) {
      const int64_t at = r * kChunkTokens + 16 * b;
      const int64_t seen = tile.visible[r] - chunk.begin - 16 * b;
      const auto weight = keep_first<S>(S::mul(S::load(softmax + at), scale), seen, 0.0f);
      largest[r] = S::imax(S::abs_bits(weight), largest[r]);
      S::store(scaled + at, weight);
    }
  }
  for (int r = 0; r < Rows; ++r) {
    const int32_t bits = S::reduce_imax(largest[r]);  // NaN or infinity if any weight is
    float most;
    std::memcpy(&most, &bits, 4);
    const bool is_tiny = most < 1e-30f;
    const auto inverse = S::set1(is_tiny ? 0.0f : 65535.0f / most);
    factors[r] = is_tiny ? 0.0f : most * (1.0f / 65535.0f);
    auto* high = reinterpret_cast<int8_t*>(weights + 2 * r * kChunkTokens);
    for (int64_t b = 0; b < chunk.num_blocks; ++b) {
      const auto code = S::round(S::mul(S::load(scaled + r * kChunkTokens + 16 * b), inverse));
      S::store_i8(high + 16 * b, S::ishr(code, 8));
      S::store_i8(high + kChunkTokens + 16 * b, code);
    }
  }
}

// Computes a strip of the sums of weight times value. 256 tokens times 65,535 times 127 fit in 31
// bits.
template <class S, int Rows>
inline void int8_values(const Chunk& chunk, int64_t value_dim, int64_t strip,
                        const uint8_t* weights, const float* factors,
                        State<S, Precision::kInt8>& state) {
  typename S::I high[Rows][2], low[Rows][2];
  TGI_UNROLL(16)
  for (int r = 0; r < Rows; ++r) {
    TGI_UNROLL(2)
    for (int v = 0; v < 2; ++v) high[r][v] = low[r][v] = S::izero();
  }
  for (int64_t b = 0; b < chunk.num_blocks; ++b) {
    const int64_t tokens = chunk.num_tokens - 16 * b < 16 ? chunk.num_tokens - 16 * b : 16;
    const uint8_t* values = chunk.values[b] + 128 * strip;
    const uint8_t* ahead = next_prefetch(chunk, Precision::kInt8, b);
    ahead = ahead == nullptr ? values : ahead + 128 * strip;
    for (int64_t t = 0; t < tokens; t += 4) {
      typename S::I codes[2];
      TGI_UNROLL(2)
      for (int v = 0; v < 2; ++v) {
        fetch_stream<S>(ahead + t * value_dim + 64 * v);
        codes[v] = S::iload(values + t * value_dim + 64 * v);
      }
      TGI_UNROLL(16)
      for (int r = 0; r < Rows; ++r) {
        const uint8_t* weight = weights + 2 * r * kChunkTokens + 16 * b + t;
        const auto high_bytes = S::ibroadcast(weight);
        const auto low_bytes = S::ibroadcast(weight + kChunkTokens);
        TGI_UNROLL(2)
        for (int v = 0; v < 2; ++v) {
          high[r][v] = S::dot(high[r][v], high_bytes, codes[v]);
          low[r][v] = S::dot(low[r][v], low_bytes, codes[v]);
        }
      }
    }
  }
  TGI_UNROLL(16)
  for (int r = 0; r < Rows; ++r) {
    TGI_UNROLL(2)
    for (int v = 0; v < 2; ++v) {
      const auto total = S::to_float(S::iadd(S::ishl(high[r][v], 8), low[r][v]));
      S::store(state.row(r) + 32 * strip + 16 * v, S::mul(total, S::set1(factors[r])));
    }
  }
}

template <class S, int Rows>
void attend_int8_chunk(const Tile<S, Precision::kInt8>& tile, const Chunk& chunk,
                       const ChunkShape& shape, State<S, Precision::kInt8>& state) {
  alignas(64) float scores[Rows * kChunkTokens];
  alignas(64) uint8_t weights[2 * Rows * kChunkTokens];
  float factors[Rows];
  int64_t b = 0;
  for (; Rows <= 3 && b + 2 <= chunk.num_blocks; b += 2) {  // no registers for more sums
    int8_block_scores<S, Rows, 2>(tile, chunk, shape, b, scores);
  }
  for (; b < chunk.num_blocks; ++b) {
    int8_block_scores<S, Rows, 1>(tile, chunk, shape, b, scores);
  }
  if (shape.scores != nullptr)
    change_scores<S, Precision::kInt8>(tile, Rows, chunk, *shape.scores, scores);
  const int64_t value_dim = shape.value_dim;
  chunk_softmax<S, Precision::kInt8, Rows>(
      chunk, value_dim, {scores, reinterpret_cast<uint8_t*>(scores), state.maximum, state.total},
      true);
  for (int64_t strip = 0; 32 * strip < value_dim; ++strip) {
    int8_weights<S, Rows>(tile, chunk, value_dim, strip, scores, weights, factors);
    int8_values<S, Rows>(chunk, value_dim, strip, weights, factors, state);
  }
}

}  // namespace
}  // namespace tgi::cpu::step
