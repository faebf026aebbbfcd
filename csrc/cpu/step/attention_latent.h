// A chunk of attention over latents (MLA). Each token has one row, whose first dims are its values,
// and all query heads share it. The row has the layout of values, sixteen dims per vector, so
// scores are summed lane by lane and reduced at the end. Source: DeepSeek-AI, DeepSeek-V2, arXiv
// 2405.04434, section 2.1. Included only by attention_kernel.h.
#pragma once

#include "amx_attention.h"
#include "attention_chunk.h"

namespace tgi::cpu::step {
namespace {

// The content of a sub-block's vector: sixteen dims of kTokens tokens.
template <class S, Precision precision>
struct LatentTraits;

template <class S>
struct LatentTraits<S, Precision::kBF16> {
  static constexpr int kTokens = 2;
  static inline void load(const uint8_t* p, typename S::F* values) {
    const auto pairs = S::iload(p);
    values[0] = S::as_float(S::ishl(pairs, 16));
    values[1] = S::as_float(S::iand(pairs, S::iset1(static_cast<int32_t>(0xFFFF0000u))));
  }
};

template <class S>
struct LatentTraits<S, Precision::kFloat32> {
  static constexpr int kTokens = 1;
  static inline void load(const uint8_t* p, typename S::F* values) {
    values[0] = S::load(reinterpret_cast<const float*>(p));
  }
};

// Computes the scores of Rows queries with Tokens tokens, whose rows begin at `latents`.
template <class S, Precision precision, int Rows, int Tokens>
inline void latent_dots(const uint8_t* const* queries, const uint8_t* latents, int64_t head_dim,
                        float* scores) {
  using Latents = LatentTraits<S, precision>;
  typename S::F sums[Rows][Tokens];
  TGI_UNROLL(4)
  for (int r = 0; r < Rows; ++r) {
    TGI_UNROLL(4)
    for (int t = 0; t < Tokens; ++t) sums[r][t] = S::zero();
  }
  for (int64_t dim = 0; dim < head_dim; dim += 16) {
    typename S::F values[Tokens];
    TGI_UNROLL(4)
    for (int t = 0; t < Tokens; t += Latents::kTokens) {
      Latents::load(latents + (t / Latents::kTokens * head_dim + dim) * 4, values + t);
    }
    TGI_UNROLL(4)
    for (int r = 0; r < Rows; ++r) {
      const auto query = S::load(reinterpret_cast<const float*>(queries[r]) + dim);
      TGI_UNROLL(4)
      for (int t = 0; t < Tokens; ++t) sums[r][t] = S::fma(values[t], query, sums[r][t]);
    }
  }
  TGI_UNROLL(4)
  for (int r = 0; r < Rows; ++r) {
    TGI_UNROLL(4)
    for (int t = 0; t < Tokens; ++t) scores[r * kChunkTokens + t] = S::reduce_add(sums[r][t]);
  }
}

// scores: [tile.count][256], -inf for tokens that a row may not see. The next sub-block is
// prefetched while the current one is read: 18 KiB for DeepSeek.
template <class S, Precision precision>
void latent_scores(const Tile<S, precision>& tile, const Chunk& chunk, int64_t head_dim,
                   float* scores) {
  constexpr int kAtOnce = S::kNumRegisters >= 32 ? 4 : 2;  // rows and tokens processed together
  constexpr int64_t kPieces = 16 / kAtOnce;
  const int64_t row_bytes = head_dim * 4;  // of a row of vectors: all dims of kTokens tokens
  const int64_t block_bytes = 16 / LatentTraits<S, precision>::kTokens * row_bytes;
  const int64_t piece = (block_bytes + kPieces - 1) / kPieces;
  for (int64_t b = 0; b < chunk.num_blocks; ++b) {
    const bool is_fetching = chunk.is_cold && b + 1 < chunk.num_ahead;
    for (int64_t t = 0; t < 16; t += kAtOnce) {
      for (int64_t at = 0; is_fetching && at < piece; at += 64) {
        fetch_stream<S>(chunk.keys[b + 1] + t / kAtOnce * piece + at);
      }
      const uint8_t* const latents =
          chunk.keys[b] + t / LatentTraits<S, precision>::kTokens * row_bytes;
      float* const out = scores + 16 * b + t;
      int64_t r = 0;
      for (; r + kAtOnce <= tile.count; r += kAtOnce) {
        latent_dots<S, precision, kAtOnce, kAtOnce>(tile.query + r, latents, head_dim,
                                                    out + r * kChunkTokens);
      }
      for (; r < tile.count; ++r) {
        latent_dots<S, precision, 1, kAtOnce>(tile.query + r, latents, head_dim,
                                              out + r * kChunkTokens);
      }
    }
    for (int64_t r = 0; r < tile.count; ++r) {
      float* const at = scores + r * kChunkTokens + 16 * b;
      S::store(at, keep_visible<S>(tile, static_cast<int>(r), chunk.begin + 16 * b, S::load(at)));
    }
  }
}

// Returns the chunk marked as just read.
inline Chunk marked_warm(Chunk chunk) {
  chunk.is_cold = false;
  return chunk;
}

template <class S, Precision precision, int Rows>
void attend_latent_chunk(const Tile<S, precision>& tile, const Chunk& chunk,
                         const ChunkShape& shape, State<S, precision>& state) {
  alignas(64) float scores[Rows * kChunkTokens];
  latent_scores<S, precision>(tile, chunk, shape.head_dim, scores);
  attend_with_scores<S, precision, Rows>(tile, marked_warm(chunk), shape, scores, state);
}

// Scores use vectors, because tiles would need the rows in another order; values use tiles.
template <class S>
void attend_latent_tiles_chunk(const Tile<S, Precision::kBF16>& tile, const Chunk& chunk,
                               const ChunkShape& shape, State<S, Precision::kBF16>& state) {
  alignas(64) float scores[kTileRows * kChunkTokens];
  latent_scores<S, Precision::kBF16>(tile, chunk, shape.head_dim, scores);
  attend_tiles_with_scores<S>(tile, marked_warm(chunk), shape, scores, state);
}

}  // namespace
}  // namespace tgi::cpu::step
