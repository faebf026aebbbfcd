// Attention of one token per sequence, split over the context (flash-decoding).
//
// The work is a list of items (sequence, chunk of its context, KV head). A chunk's length depends
// only on its own sequence's length, so a row's bits do not depend on the batch. A persistent grid
// processes the items in turn, and a block copies its next tile while it attends to the present
// one, also where an item ends: what the next item needs to know is looked up an item ahead. A
// second kernel merges the chunks of each sequence in order.
//
//   copies       item 1, tile 0 | item 1, tile 1 | item 2, tile 0 | item 2, tile 1 | ...
//   arithmetic                  | item 1, tile 0 | item 1, tile 1 | item 2, tile 0 | ...
#pragma once

#include <climits>

#include "attention_decode_merge.cuh"
#include "attention_decode_tile.cuh"

namespace tgi::cuda {

template <typename Element, typename KvElement, int HeadDim, int Rows>
struct Decode {
  using Tile = DecodeTile<Element, KvElement, HeadDim, Rows>;
  using Shared = typename Tile::Shared;
  static constexpr int kThreads = Tile::kThreads;
  // Blocks that a multiprocessor of sm_90 shall hold: one tile of each is in flight, and 30 KB hide
  // the latency of memory.
  static constexpr int kBlocks = sizeof(Shared) <= 55 << 10 && (Rows == 8 || HeadDim <= 64) ? 4 : 3;

  // An item, and where the warp's tokens of its tiles are in the cache.
  struct Item {
    int sequence = 0;
    int chunk, kv_head;
    int begin, end;   // tokens of the chunk
    int context_end;  // the query is the last of so many tokens
    int block;        // lane i: id of the block of the i-th tile, if the warp has tokens there
    int offset;       // lane i: first token within the block

    // Moves on to a later item.
    __device__ __forceinline__ void find(const AttentionParams& p, int index) {
      const int lane = Tile::lane();
      chunk = int(divide_narrow(index, p.num_kv_heads));
      kv_head = index - chunk * int(p.num_kv_heads);
      // Finds the last sequence that begins at or before the chunk, among 32 at a time.
      int first_chunk, context;
      for (int last = kWarpSize - 1; last == kWarpSize - 1;) {
        const int64_t other = int64_t{sequence} + lane;
        const bool exists = other < p.num_sequences;
        const int start = exists ? p.plan[other] : INT_MAX;
        const int length = exists ? p.context_len[other] : 0;
        last = __popc(__ballot_sync(kAllLanes, start <= chunk)) - 1;
        sequence += last;
        first_chunk = __shfl_sync(kAllLanes, start, last);
        context = __shfl_sync(kAllLanes, length, last);
      }
      const Context seen(p, context);
      const int64_t start = (seen.first_chunk() + chunk - first_chunk) * seen.length;
      begin = int(max(seen.begin, start));
      end = int(min(seen.end, start + seen.length));
      context_end = int(seen.end);
      // All ids at once; they are not used before the first tile is copied.
      const int token = first_token(lane), block_size = int(p.block_size);
      block = 0;
      if (token + 16 > begin && token < end)
        block = p.block_table[sequence * p.block_table_stride + token / block_size];
      offset = token % block_size;
    }
    __device__ __forceinline__ int num_tiles() const {
      return (end + Tile::kTokens - 1) / Tile::kTokens - begin / Tile::kTokens;
    }
    // The warp's first token of a tile.
    __device__ __forceinline__ int first_token(int tile) const {
      return (begin / Tile::kTokens + tile) * Tile::kTokens + 16 * Tile::warp();
    }
  };

  // Starts copying the warp's tokens of a tile; zeros replace those outside of the item.
  static __device__ __forceinline__ void load_tile(const AttentionParams& p, const Item& item,
                                                   int tile, uint4* tiles, int stage) {
    constexpr int kCopies = Tile::KvRow::kChunks;
    const int token = item.first_token(tile);
    const int64_t block =
        min(max(__shfl_sync(kAllLanes, item.block, tile), 0), int(p.num_blocks) - 1);
    const int offset = __shfl_sync(kAllLanes, item.offset, tile);
    const Cache<Element, KvElement, HeadDim> cache(p, item.kv_head);
    const auto* keys = reinterpret_cast<const uint4*>(cache.head + cache.row_at(block, offset));
    const auto* values = reinterpret_cast<const uint4*>(cache.head + cache.row_at(block, offset) +
                                                        cache.value_offset);
    const int first = stage * Tile::kStageChunks + 16 * Tile::warp() * Tile::KvRow::kStride;
    const int own = first + Tile::KvRow::at(Tile::lane() / kCopies, Tile::lane() % kCopies);
#pragma unroll
    for (int i = 0; i < 16 * kCopies; i += kWarpSize) {
      const int k = i + Tile::lane(), row = k / kCopies;
      if (16 * kCopies % kWarpSize != 0 && k >= 16 * kCopies) break;
      const bool is_valid = token + row >= item.begin && token + row < item.end;
      int to = first + Tile::KvRow::at(row, k % kCopies);
      if constexpr (kWarpSize % kCopies == 0)  // the same in fewer instructions
        to = (own ^ (i / kCopies & 7)) + i / kCopies * Tile::KvRow::kStride;
      async_copy16(&tiles[to], keys + k, is_valid);
      async_copy16(&tiles[to + Tile::kKeyChunks], values + k, is_valid);
    }
  }

  // Starts copying an item's queries; rows beyond the group are zero.
  static __device__ __forceinline__ void load_queries(const AttentionParams& p, const Item& item,
                                                      int group, uint4* queries) {
    using QueryRow = typename Tile::QueryRow;
    const Element* q = static_cast<const Element*>(p.q) +
                       (item.sequence * p.num_heads + int64_t{item.kv_head} * group) * HeadDim;
#pragma unroll
    for (int first = 0; first < Rows * QueryRow::kChunks; first += kThreads) {
      const int i = first + int(threadIdx.x);
      if (i >= Rows * QueryRow::kChunks) break;
      const int row = i / QueryRow::kChunks, chunk = i % QueryRow::kChunks;
      async_copy16(&queries[QueryRow::at(row, chunk)], q + row * HeadDim + chunk * 8, row < group);
    }
  }

  // Writes an item's results to the workspace.
  static __device__ __forceinline__ void store(const AttentionParams& p, const Item& item,
                                               int group, const Tile& state, const Shared& shared) {
    const Workspace workspace(p);
    const int64_t place = int64_t{item.chunk} * p.num_heads + int64_t{item.kv_head} * group;
    float* out = workspace.out + place * HeadDim;
    state.for_each_sum([&](int row, int d, float sum) {
      if (row < group) out[row * HeadDim + d] = sum;
    });
    if (Tile::warp() > 0 || Tile::lane() % 4 > 0) return;
#pragma unroll
    for (int half = 0; half < Tile::kHalves; ++half) {
      const int row = Tile::lane() / 4 + 8 * half;
      float sum = 0;
#pragma unroll
      for (int i = 0; i < Tile::kWarps; ++i) sum += shared.sums[i][row];
      if (row < group) workspace.stats[place + row] = float2{state.max[half], sum};
    }
  }
};

template <typename Element, typename KvElement, int HeadDim, int Rows>
__global__ void __launch_bounds__(Decode<Element, KvElement, HeadDim, Rows>::kThreads,
                                  Decode<Element, KvElement, HeadDim, Rows>::kBlocks)
    decode_kernel(AttentionParams p) {
  allow_next_kernel();
  wait_for_previous_kernel();
  using Kernel = Decode<Element, KvElement, HeadDim, Rows>;
  using Tile = typename Kernel::Tile;
  DYNAMIC_SHARED(typename Kernel::Shared, shared);
  const int group = int(divide_narrow(p.num_heads, p.num_kv_heads));
  const int num_items = p.plan[p.num_sequences] * int(p.num_kv_heads);
  int index = int(blockIdx.x);
  typename Kernel::Item item;
  item.find(p, index);  // also if there is none: it need not wait for their number
  if (index >= num_items) return;
  Kernel::load_queries(p, item, group, shared->queries[0]);
  Kernel::load_tile(p, item, 0, shared->tiles, 0);
  async_commit();
  typename Kernel::Item next = item;
  index += int(gridDim.x);
  if (index < num_items) next.find(p, index);
  Scores scores(p, 0, 0);
  Tile state;
  bool is_first = true;
  for (int tile = 0, stage = 0, parity = 0;; stage ^= 1, is_first = false) {
    if (!is_first) {
      async_wait<0>();
      __syncthreads();  // the tile is there for all, and all have finished with the one before
    }
    const bool is_last = tile + 1 >= item.num_tiles();
    if (!is_last) {
      Kernel::load_tile(p, item, tile + 1, shared->tiles, stage ^ 1);
    } else if (index < num_items) {
      Kernel::load_queries(p, next, group, shared->queries[parity ^ 1]);
      Kernel::load_tile(p, next, 0, shared->tiles, stage ^ 1);
    }
    async_commit();
    if (is_first) {  // two tiles at once: a small batch has not many more
      async_wait<1>();
      __syncthreads();  // the first tile is there
    }
    if (tile == 0) {
      state.begin(shared->queries[parity]);
      const int64_t head = int64_t{item.kv_head} * group + Tile::lane() / 4;
      scores = Scores(p, head, head + 8);
    }
    const int token = item.first_token(tile);
    // chunks end at tiles' borders
    state.attend(*shared, stage, scores, item.begin - token, item.context_end - token, is_last);
    ++tile;
    if (!is_last) continue;
    Kernel::store(p, item, group, state, *shared);
    if (index >= num_items) break;
    item = next;
    tile = 0;
    parity ^= 1;
    index += int(gridDim.x);
    if (index < num_items) next.find(p, index);
  }
}

template <typename Element, typename KvElement>
cudaError_t launch_decode(const AttentionParams& p, cudaStream_t stream) {
  return for_head_dim(p.head_dim, [&](auto head_dim) {
    constexpr int kHeadDim = decltype(head_dim)::value;
    const int64_t items =
        p.num_sequences * max_chunks(p.block_table_stride * p.block_size) * p.num_kv_heads;
    const auto launch_rows = [&](auto rows) {
      constexpr int kRows = decltype(rows)::value;
      using Kernel = Decode<Element, KvElement, kHeadDim, kRows>;
      constexpr size_t kSharedBytes = sizeof(typename Kernel::Shared);
      const int64_t blocks = num_resident_blocks(kSharedBytes, Kernel::kBlocks);
      return launch_dependent(decode_kernel<Element, KvElement, kHeadDim, kRows>,
                              dim3(unsigned(min(items, blocks))), dim3(Kernel::kThreads),
                              kSharedBytes, stream, p);
    };
    // eight rows halve the registers of the sums, and are enough for most models
    const cudaError_t error = p.num_heads <= 8 * p.num_kv_heads
                                  ? launch_rows(std::integral_constant<int, 8>())
                                  : launch_rows(std::integral_constant<int, 16>());
    if (error != cudaSuccess) return error;
    const int64_t heads = p.num_sequences * p.num_heads;
    return launch_dependent(merge_kernel<Element, kHeadDim>,
                            dim3(unsigned(ceil_divide<int64_t>(heads, Merge<kHeadDim>::kWarps))),
                            dim3(Merge<kHeadDim>::kThreads), 0, stream, p);
  });
}

}  // namespace tgi::cuda
