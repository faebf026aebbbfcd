// Attention of one token per sequence, split over the context (flash-decoding).
//
// The work is a list of items (sequence, chunk of its context, KV head). A chunk's length depends
// only on its own sequence's length, so a row's bits do not depend on the batch. A persistent grid
// processes the items in turn. The query heads of a KV head share an item as the rows of mma, and
// each of four warps (two with a head size of 256) processes every fourth (second) tile of sixteen
// tokens by itself, without barriers. A second kernel merges the chunks of each sequence in order.
#pragma once

#include "attention_context.cuh"
#include "attention_tile.cuh"

namespace tgi::cuda {

constexpr int kMergeThreads = 64;

template <typename Element, typename KvElement, int HeadDim>
struct Decode {
  static constexpr int kWarps = HeadDim <= 128 ? 4 : 2;
  static constexpr int kThreads = kWarps * kWarpSize;
  static constexpr int kStages = HeadDim <= 64 ? 3 : 2;  // within 99 KB: sm_86, 89 and 120
  static constexpr int kTile = 16;                       // tokens
  // A tile's keys or values, in chunks of 16 bytes.
  static constexpr int kTileChunks = kTile * Row<HeadDim>::kStride;
  static constexpr int kSharedChunks =
      kRows * Row<HeadDim>::kStride + kWarps * kStages * 2 * kTileChunks;
  static constexpr int kSharedBytes = kSharedChunks * 16;
  static_assert(kSharedBytes <= 99 << 10);
  // The merge of the warps reuses the tiles' memory.
  static_assert(kWarps * kRows * (HeadDim + 2) * 4 <= kWarps * kStages * 2 * kTileChunks * 16);
  using KvCache = Cache<Element, KvElement, HeadDim>;

  // Query rows beyond the group are zero.
  static __device__ __forceinline__ void load_queries(const AttentionParams& p, int64_t sequence,
                                                      int64_t kv_head, int group, uint4* queries) {
    const Element* q =
        static_cast<const Element*>(p.q) + (sequence * p.num_heads + kv_head * group) * HeadDim;
    for (int i = int(threadIdx.x); i < kRows * Row<HeadDim>::kChunks; i += kThreads) {
      const int row = i / Row<HeadDim>::kChunks, chunk = i % Row<HeadDim>::kChunks;
      queries[Row<HeadDim>::at(row, chunk)] =
          row < group ? *reinterpret_cast<const uint4*>(q + row * HeadDim + chunk * 8)
                      : uint4{0, 0, 0, 0};
    }
  }

  // Processes this warp's part of the tokens [begin, end): tiles warp, warp + kWarps and so on. The
  // query is the last of `context_end` tokens.
  static __device__ __forceinline__ void process_tiles(const AttentionParams& p, int64_t sequence,
                                                       int64_t kv_head, int64_t begin, int64_t end,
                                                       int64_t context_end, const uint4* queries,
                                                       uint4* tiles, RowState<HeadDim>& state) {
    const int warp = int(threadIdx.x) / kWarpSize, lane = int(threadIdx.x) % kWarpSize;
    const int64_t first_tile = begin / kTile;
    const int num_tiles =
        int((ceil_divide<int64_t>(end, kTile) - first_tile - warp + kWarps - 1) / kWarps);
    const auto token_of = [&](int i) { return (first_tile + warp + int64_t{i} * kWarps) * kTile; };
    // Lane i holds the i-th tile's block id. Every address depends on an id, so all ids are fetched
    // at once.
    int32_t own_block = 0;
    if (lane < num_tiles) {
      own_block =
          p.block_table[sequence * p.block_table_stride + int(token_of(lane)) / int(p.block_size)];
    }
    own_block = min(max(own_block, 0), int32_t(p.num_blocks - 1));
    const KvCache cache(p, kv_head);
    const int64_t head = kv_head * divide_narrow(p.num_heads, p.num_kv_heads) + lane / 4;
    const Scores scores(p, head, head + 8);
    const auto load_tile = [&](int i) {
      const int64_t token = token_of(i);
      const int32_t block = __shfl_sync(0xffffffffu, own_block, i % kWarpSize);
      const int64_t place = cache.row_at(block, int(token) % int(p.block_size));
      uint4* stage = tiles + i % kStages * 2 * kTileChunks;
#pragma unroll 4
      for (int k = lane; k < 2 * kTile * KvCache::kCopies; k += kWarpSize) {
        const bool is_value = k >= kTile * KvCache::kCopies;
        const int row = k / KvCache::kCopies % kTile;
        const bool is_valid = token + row >= begin && token + row < end;
        const int64_t at = place + row * HeadDim + (is_value ? cache.value_offset : 0);
        cache.start_copy(stage + (is_value ? kTileChunks : 0), row, k % KvCache::kCopies,
                         is_valid ? at : 0, is_valid);
      }
    };
#pragma unroll
    for (int i = 0; i < kStages - 1; ++i) {
      if (i < num_tiles) load_tile(i);
      async_commit();
    }
    for (int i = 0; i < num_tiles; ++i) {
      async_wait<kStages - 2>();
      __syncwarp();  // all lanes see tile i and have finished with tile i - 1
      if (i + kStages - 1 < num_tiles) load_tile(i + kStages - 1);
      async_commit();
      const uint4* keys = tiles + i % kStages * 2 * kTileChunks;
      const int first = int(max(begin - token_of(i), int64_t{0}));
      const int stop = int(context_end - token_of(i));  // chunks end at tile borders
      attend<Element, HeadDim, kTile>(state, queries, keys, keys + kTileChunks, scores,
                                      first == 0 && stop >= kTile,
                                      Visible{{first, first}, {stop, stop}});
    }
    finish_sums(state);
  }

  // Writes the warp's rows to shared memory: [warp][row] sums, then each row's maximum and total.
  static __device__ __forceinline__ void store_rows(const RowState<HeadDim>& state, float* sums,
                                                    float* stats) {
    const int warp = int(threadIdx.x) / kWarpSize, lane = int(threadIdx.x) % kWarpSize;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = warp * kRows + lane / 4 + 8 * half;
#pragma unroll
      for (int j = 0; j < HeadDim / 8; ++j) {
        *reinterpret_cast<float2*>(sums + row * HeadDim + j * 8 + lane % 4 * 2) =
            float2{state.out[j][2 * half], state.out[j][2 * half + 1]};
      }
      if (lane % 4 == 0)
        *reinterpret_cast<float2*>(stats + row * 2) = float2{state.max[half], state.sum[half]};
    }
  }
};

// Combines the partial results of a softmax over parts of the keys, in order.
struct Merged {
  float out, max, sum;

  __device__ __forceinline__ void add(float part_out, float2 part) {
    const float larger = fmaxf(max, part.x);
    if (larger == -INFINITY) return;
    const float own = exp2f(max - larger), other = exp2f(part.x - larger);
    out = out * own + part_out * other;
    sum = sum * own + part.y * other;
    max = larger;
  }
};

template <typename Element, typename KvElement, int HeadDim>
__global__ void __launch_bounds__(Decode<Element, KvElement, HeadDim>::kThreads, 2)
    decode_kernel(AttentionParams p) {
  wait_for_previous_kernel();
  allow_next_kernel();
  using Kernel = Decode<Element, KvElement, HeadDim>;
  DYNAMIC_SHARED(uint4, queries);  // [16 rows], then the warps' tiles
  uint4* tiles = queries + kRows * Row<HeadDim>::kStride;
  auto* sums = reinterpret_cast<float*>(tiles);  // reuses the tiles' memory after them
  float* stats = sums + Kernel::kWarps * kRows * HeadDim;
  const int group = int(divide_narrow(p.num_heads, p.num_kv_heads));
  const Workspace workspace(p);
  const int64_t num_items = int64_t{p.plan[p.num_sequences]} * p.num_kv_heads;
  for (int64_t item = blockIdx.x; item < num_items; item += gridDim.x) {
    const int64_t chunk = divide_narrow(item, p.num_kv_heads),
                  kv_head = item - chunk * p.num_kv_heads;
    int64_t sequence = 0;  // the last that begins at or before this chunk
    for (int64_t stop = p.num_sequences; stop - sequence > 1;) {
      const int64_t middle = (sequence + stop) / 2;
      (p.plan[middle] <= chunk ? sequence : stop) = middle;
    }
    const Context context(p, sequence);
    const int64_t start = (context.first_chunk() + chunk - p.plan[sequence]) * context.length;
    const int64_t begin = max(context.begin, start), end = min(context.end, start + context.length);
    Kernel::load_queries(p, sequence, kv_head, group, queries);
    __syncthreads();  // also: all threads have finished merging the previous item, so its tiles are
                      // free
    RowState<HeadDim> state;
    state.clear();
    Kernel::process_tiles(
        p, sequence, kv_head, begin, end, context.end, queries,
        tiles + threadIdx.x / kWarpSize * Kernel::kStages * 2 * Kernel::kTileChunks, state);
    __syncthreads();  // the tiles are no longer needed
    Kernel::store_rows(state, sums, stats);
    __syncthreads();
    for (int i = int(threadIdx.x); i < group * HeadDim; i += Kernel::kThreads) {
      const int row = i / HeadDim, d = i % HeadDim;
      Merged merged = {0, -INFINITY, 0};
#pragma unroll
      for (int warp = 0; warp < Kernel::kWarps; ++warp) {
        const int from = warp * kRows + row;
        merged.add(sums[from * HeadDim + d], *reinterpret_cast<const float2*>(stats + from * 2));
      }
      const int64_t head = kv_head * group + row, place = chunk * p.num_heads + head;
      workspace.out[place * HeadDim + d] = merged.out;
      if (d == 0) workspace.stats[place] = float2{merged.max, merged.sum};
    }
  }
}

// One block per (sequence, head): merges its chunks and divides.
template <typename Element, int HeadDim>
__global__ void __launch_bounds__(kMergeThreads, 8) merge_kernel(AttentionParams p) {
  wait_for_previous_kernel();
  allow_next_kernel();
  const Workspace workspace(p);
  const int64_t sequence = divide_narrow(blockIdx.x, p.num_heads),
                head = blockIdx.x - sequence * p.num_heads;
  const int64_t first = p.plan[sequence], stop = p.plan[sequence + 1];
  for (int d = 2 * int(threadIdx.x); d < HeadDim; d += 2 * kMergeThreads) {
    Merged merged[2] = {{0, -INFINITY, 0}, {0, -INFINITY, 0}};
    for (int64_t chunk = first; chunk < stop; ++chunk) {
      const int64_t place = chunk * p.num_heads + head;
      const float2 out = *reinterpret_cast<const float2*>(workspace.out + place * HeadDim + d);
      merged[0].add(out.x, workspace.stats[place]);
      merged[1].add(out.y, workspace.stats[place]);
    }
    const float factor = first == stop ? 0.0f : inverse_sum(p, head, merged[0].max, merged[0].sum);
    Element* out = static_cast<Element*>(p.out) + (sequence * p.num_heads + head) * HeadDim + d;
    *reinterpret_cast<uint32_t*>(out) =
        Pair<Element>::pack(merged[0].out * factor, merged[1].out * factor);
  }
}

template <typename Element, typename KvElement>
cudaError_t launch_decode(const AttentionParams& p, cudaStream_t stream) {
  return for_head_dim(p.head_dim, [&](auto head_dim) {
    constexpr int kHeadDim = decltype(head_dim)::value;
    using Kernel = Decode<Element, KvElement, kHeadDim>;
    const int64_t items =
        p.num_sequences * max_chunks(p.block_table_stride * p.block_size) * p.num_kv_heads;
    const auto blocks = unsigned(min(items, int64_t{2} * num_multiprocessors()));
    const cudaError_t error =
        launch_dependent(decode_kernel<Element, KvElement, kHeadDim>, dim3(blocks),
                         dim3(Kernel::kThreads), Kernel::kSharedBytes, stream, p);
    if (error != cudaSuccess) return error;
    return launch_dependent(merge_kernel<Element, kHeadDim>,
                            dim3(unsigned(p.num_sequences * p.num_heads)), dim3(kMergeThreads), 0,
                            stream, p);
  });
}

}  // namespace tgi::cuda
