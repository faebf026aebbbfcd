// Attention of many tokens per sequence over the paged cache: causal, for chunked or whole prompts,
// with an optional sliding window.
//
// A block processes 64 rows of one KV head: row r is query token r / group and query head r %
// group, so the heads of a group read keys and values once. Its four warps have sixteen rows each
// and share the tiles of keys, which begin at multiples of the tile's length: a row's bits do not
// depend on how its prompt was split into chunks.
#pragma once

#include "attention_tile.cuh"

namespace tgi::cuda {

template <typename Element, typename KvElement, int HeadDim>
struct Prefill {
  static constexpr int kWarps = 4;
  static constexpr int kThreads = kWarps * kWarpSize;
  static constexpr int kBlockRows = kWarps * kRows;
  static constexpr int kKeys = HeadDim <= 128 ? 64 : 32;
  static constexpr int kStages = 2;
  static constexpr int kUnroll = HeadDim <= 128 ? 2 : 1;  // limited by the registers that the sums
                                                          // occupy
  static constexpr int kTileChunks = kKeys * Row<HeadDim>::kStride;
  static constexpr int kPlaces = 2 * kKeys;  // of two tiles' rows in the cache
  static constexpr int kSharedBytes =
      (kBlockRows * Row<HeadDim>::kStride + kStages * 2 * kTileChunks) * 16 +
      kPlaces * int(sizeof(int64_t));
  static_assert(kSharedBytes <= 99 << 10);
  using KvCache = Cache<Element, KvElement, HeadDim>;

  // Finds the cache positions of the rows in the tile of keys that begins at `token`, once for
  // keys, values and all their 16-byte pieces; -1: outside of [begin, end). They may be read after
  // the next barrier.
  static __device__ __forceinline__ void find_tile(const AttentionParams& p, const KvCache& cache,
                                                   const int32_t* table, int token, int begin,
                                                   int end, int64_t* places) {
    const int row = int(threadIdx.x), position = token + row;
    if (row >= kKeys) return;
    int64_t place = -1;
    if (position >= begin && position < end) {
      const int block_size = int(p.block_size);
      const int block = min(max(table[position / block_size], 0), int(p.num_blocks) - 1);
      place = cache.row_at(block, position % block_size);
    }
    places[token / kKeys % 2 * kKeys + row] = place;
  }

  static __device__ __forceinline__ void load_tile(const KvCache& cache, int token,
                                                   const int64_t* places, uint4* stage) {
#pragma unroll(kUnroll)
    for (int k = int(threadIdx.x); k < kKeys * KvCache::kCopies; k += kThreads) {
      const int row = k / KvCache::kCopies, i = k % KvCache::kCopies;
      const int64_t place = places[token / kKeys % 2 * kKeys + row];
      const bool is_valid = place >= 0;
      const int64_t at = is_valid ? place : 0;
      cache.start_copy(stage, row, i, at, is_valid);
      cache.start_copy(stage + kTileChunks, row, i, at + cache.value_offset, is_valid);
    }
  }
};

template <typename Element, typename KvElement, int HeadDim>
__global__ void __launch_bounds__(Prefill<Element, KvElement, HeadDim>::kThreads, 1)
    prefill_kernel(AttentionParams p) {
  using Kernel = Prefill<Element, KvElement, HeadDim>;
  using Tile = Row<HeadDim>;
  DYNAMIC_SHARED(uint4, queries);  // [64 rows], then the stages' tiles, then `places`
  uint4* tiles = queries + Kernel::kBlockRows * Tile::kStride;
  auto* places = reinterpret_cast<int64_t*>(tiles + Kernel::kStages * 2 * Kernel::kTileChunks);
  const int64_t sequence = blockIdx.z, kv_head = blockIdx.y;
  const int group = int(divide_narrow(p.num_heads, p.num_kv_heads));
  const int64_t query_begin = min(max(int64_t{p.query_start[sequence]}, int64_t{0}), p.num_tokens);
  const int64_t query_end =
      min(max(int64_t{p.query_start[sequence + 1]}, query_begin), p.num_tokens);
  const int num_rows = int(query_end - query_begin) * group;
  // The last rows see the most keys, so they start first.
  const int first_row = int(gridDim.x - 1 - blockIdx.x) * Kernel::kBlockRows;
  if (first_row >= num_rows) return;
  const int last_row = min(first_row + Kernel::kBlockRows, num_rows) - 1;
  const int64_t longest = p.block_table_stride * p.block_size;
  const int64_t context = min(max(int64_t{p.context_len[sequence]}, int64_t{0}), longest);
  const int before = int(context - (query_end - query_begin));  // position of the first query
  const int nearest = before + first_row / group, furthest = before + last_row / group;
  const int window = int(p.window), begin = window > 0 ? max(nearest - window + 1, 0) : 0,
            end = furthest + 1;

  const Element* q =
      static_cast<const Element*>(p.q) + (query_begin * p.num_heads + kv_head * group) * HeadDim;
  for (int i = int(threadIdx.x); i < Kernel::kBlockRows * Tile::kChunks; i += Kernel::kThreads) {
    const int row = i / Tile::kChunks, chunk = i % Tile::kChunks;
    const int from = first_row + row;
    const int64_t offset =
        (int64_t{from / group} * p.num_heads + from % group) * HeadDim + chunk * 8;
    async_copy16(&queries[Tile::at(row, chunk)], from < num_rows ? q + offset : q, from < num_rows);
  }
  const typename Kernel::KvCache cache(p, kv_head);
  const int32_t* table = p.block_table + sequence * p.block_table_stride;
  const int first_tile = begin / Kernel::kKeys, stop_tile = ceil_divide(end, Kernel::kKeys);
  Kernel::find_tile(p, cache, table, first_tile * Kernel::kKeys, begin, end, places);
  Kernel::find_tile(p, cache, table, (first_tile + 1) * Kernel::kKeys, begin, end, places);
  __syncthreads();
  Kernel::load_tile(cache, first_tile * Kernel::kKeys, places, tiles);
  async_commit();

  const int warp = int(threadIdx.x) / kWarpSize, lane = int(threadIdx.x) % kWarpSize;
  const int row = first_row + warp * kRows + lane / 4;  // and row + 8
  const int position[2] = {before + row / group, before + (row + 8) / group};
  const Scores scores(p, kv_head * group + row % group, kv_head * group + (row + 8) % group);
  RowState<HeadDim> state;
  state.clear();
  for (int tile = first_tile; tile < stop_tile; ++tile) {
    async_wait<0>();
    __syncthreads();  // all threads see this tile and have finished with the previous one
    const int stage = (tile - first_tile) % Kernel::kStages;
    const int token = tile * Kernel::kKeys;
    if (tile + 1 < stop_tile) {
      Kernel::load_tile(cache, token + Kernel::kKeys, places,
                        tiles + (stage ^ 1) * 2 * Kernel::kTileChunks);
    }
    async_commit();
    // Overwrites this tile's positions, which all threads finished using before the barrier.
    Kernel::find_tile(p, cache, table, token + 2 * Kernel::kKeys, begin, end, places);
    Visible visible;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      visible.stop[half] = position[half] + 1 - token;
      visible.first[half] = window > 0 ? max(position[half] + 1 - window - token, 0) : 0;
    }
    const bool is_all_visible =
        token + Kernel::kKeys <= nearest + 1 && (window == 0 || token >= furthest + 1 - window);
    const uint4* keys = tiles + stage * 2 * Kernel::kTileChunks;
    attend<Element, HeadDim, Kernel::kKeys>(state, queries + warp * kRows * Tile::kStride, keys,
                                            keys + Kernel::kTileChunks, scores, is_all_visible,
                                            visible);
  }
  async_wait<0>();  // of the queries, if there was no tile
  finish_sums(state);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int own_row = row + 8 * half;
    if (own_row >= num_rows) continue;
    const int64_t head = kv_head * group + own_row % group;
    const float factor = inverse_sum(p, head, state.max[half], state.sum[half]);
    Element* out = static_cast<Element*>(p.out) +
                   ((query_begin + own_row / group) * p.num_heads + head) * HeadDim;
#pragma unroll
    for (int j = 0; j < HeadDim / 8; ++j) {
      *reinterpret_cast<uint32_t*>(out + j * 8 + lane % 4 * 2) =
          Pair<Element>::pack(state.out[j][2 * half] * factor, state.out[j][2 * half + 1] * factor);
    }
  }
}

template <typename Element, typename KvElement>
cudaError_t launch_prefill(const AttentionParams& p, cudaStream_t stream) {
  return for_head_dim(p.head_dim, [&](auto head_dim) {
    using Kernel = Prefill<Element, KvElement, decltype(head_dim)::value>;
    const int64_t rows = p.max_query_len * (p.num_heads / p.num_kv_heads);
    const dim3 grid(unsigned(ceil_divide<int64_t>(rows, Kernel::kBlockRows)),
                    unsigned(p.num_kv_heads), unsigned(p.num_sequences));
    return launch(prefill_kernel<Element, KvElement, decltype(head_dim)::value>, grid,
                  dim3(Kernel::kThreads), Kernel::kSharedBytes, stream, p);
  });
}

}  // namespace tgi::cuda
