// Products of routed experts for many pairs per expert: tiles of 32 or 64 pairs on tensor cores.
//
// A prompt of 4,096 tokens gives each of Qwen3-30B's 128 experts 256 pairs: 0.31 TFLOP a layer, 0.4
// ms at the 788 TFLOP/s that cuBLAS reaches on an H200, and 0.3 ms to read the weights. Operands
// come from L2 with 43 FLOP per byte in a block of 128 rows by 64 pairs: 230 TFLOP/s if L2 gives
// 5.5 TB/s, which is not measured. A larger tile would suit Mixtral's few experts, which have 1,024
// pairs each, and leave most of Qwen3's half empty for prompts of 512 tokens.
//
// Each warp computes 32 rows for all pairs of the tile, so every weight is decoded once per block.
// A lane copies the weights that it multiplies itself; activations are shared by the warps and lie
// in the order in which lanes read them, without bank conflicts: [piece][pair][lane % 4] of 16
// bytes.
#include "experts.cuh"

namespace tgi::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarpSize;

// The queue of a block: a stage has weights [4][thread], then activations.
template <typename W, int Pairs>
struct Queue {
  static constexpr int kPairTiles = Pairs / 8;
  static constexpr int kPieceSlots = Pairs * 4;  // of 16 bytes
  static constexpr int kSlots = 4 * kThreads + W::kPieces * kPieceSlots;
  static constexpr int kMost = (72 << 10) / (kSlots * 16);
  static constexpr int kStages = kMost < 4 ? kMost : 4;
  static constexpr int kBytes = kStages * kSlots * 16;
  static constexpr int kSumStride = kWarps * 32 + 4;  // lanes that write sums access each bank once
  static constexpr int kOwn = kPieceSlots / kThreads;  // slots of a piece that a thread fills
  // three blocks per SM of 227 KB, two of 164 KB, one of 99 KB (sm_86, 89 and 120)
  static_assert(kStages >= 3 && Pairs * kSumStride * 4 <= kBytes && kOwn * kThreads == kPieceSlots);
};

// The sums of a warp, laid out as mma's d.
template <int Pairs>
struct Sums {
  float at[2][Pairs / 8][4];
};

// Multiplies a stage. weights: this lane's; values: the stage's.
template <typename Element, typename W, int Pairs>
__device__ __forceinline__ void multiply(const uint4* weights, const uint4* values, int zero,
                                         const typename W::Group (&groups)[4], Sums<Pairs>& sums) {
  using Q = Queue<W, Pairs>;
  const int lane = int(threadIdx.x) % kWarpSize;
#pragma unroll
  for (int piece = 0; piece < W::kPieces; ++piece) {
    uint32_t operands[2][2][4];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      make_operands<W>(weights[2 * half * kThreads], weights[(2 * half + 1) * kThreads], piece,
                       zero, groups[2 * half], groups[2 * half + 1], operands[half]);
    }
#pragma unroll
    for (int j = 0; j < Q::kPairTiles; ++j) {
      const uint4 value = values[piece * Q::kPieceSlots + j * kWarpSize + lane];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        mma_m16n8k16<Element>(sums.at[half][j], operands[half][0], value.x, value.y);
        mma_m16n8k16<Element>(sums.at[half][j], operands[half][1], value.z, value.w);
      }
    }
  }
}

template <typename Element, typename W, int Pairs>
__device__ __forceinline__ void multiply_rows(const ExpertsProductParams& p, const PairTile& tile,
                                              int64_t first, uint4* queue, Sums<Pairs>& sums) {
  using Q = Queue<W, Pairs>;
  constexpr int kStride = 4 * W::kColumns;  // columns of a step
  const auto thread = int(threadIdx.x);
  const int columns = int(p.weight.num_columns), own_column = thread % 4 * W::kColumns;
  const LaneRows<W> rows(p, ExpertRows(p), tile.expert, first);
  const Element* values[Q::kOwn];  // activations that this thread copies
  bool is_pair[Q::kOwn];
#pragma unroll
  for (int k = 0; k < Q::kOwn; ++k) {
    const int place = (k * kThreads + thread) / 4;
    is_pair[k] = place < tile.count;
    const int pair = is_pair[k] ? p.pairs[tile.first + place] : 0;
    values[k] = static_cast<const Element*>(p.a) + divide_narrow(pair, p.pairs_per_row) * columns +
                own_column;
  }
  const int num_steps = ceil_divide(columns, kStride);
  const auto stage_at = [&](int i) { return queue + i % Q::kStages * Q::kSlots; };
  const auto load = [&](int i) {
    const int column = i * kStride;
    rows.template copy<kThreads>(column, stage_at(i) + thread);
    const bool is_inside = own_column + column < columns;
#pragma unroll
    for (int piece = 0; piece < W::kPieces; ++piece) {
#pragma unroll
      for (int k = 0; k < Q::kOwn; ++k) {
        async_copy16(&stage_at(i)[4 * kThreads + piece * Q::kPieceSlots + k * kThreads + thread],
                     values[k] + column + piece * 8, is_inside && is_pair[k]);
      }
    }
  };
  typename W::Loaded groups[4];
#pragma unroll
  for (int i = 0; i < Q::kStages - 1; ++i) {
    if (i < num_steps) load(i);
    async_commit();
  }
  rows.load_groups(p.weight, 0, groups);
  for (int i = 0; i < num_steps; ++i) {
    typename W::Group current[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) current[k] = W::convert(groups[k]);
    if (i + 1 < num_steps) rows.load_groups(p.weight, (i + 1) * kStride, groups);
    async_wait<Q::kStages - 2>();
    __syncthreads();  // all see the stage, and none reads the one that is overwritten
    if (i + Q::kStages - 1 < num_steps) load(i + Q::kStages - 1);
    async_commit();
    multiply<Element, W, Pairs>(stage_at(i) + thread, stage_at(i) + 4 * kThreads, p.weight.zero,
                                current, sums);
  }
  async_wait<0>();
}

// Writes the warp's sums to shared memory: [pair][warp][row].
template <typename W, int Pairs>
__device__ __forceinline__ void store_sums(const Sums<Pairs>& sums, float* shared) {
  const int warp = int(threadIdx.x) / kWarpSize, lane = int(threadIdx.x) % kWarpSize;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int j = 0; j < Pairs / 8; ++j) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int row = half * 16 + lane / 4 + k / 2 * 8, pair = j * 8 + lane % 4 * 2 + k % 2;
        shared[pair * Queue<W, Pairs>::kSumStride + warp * 32 + row] = sums.at[half][j][k];
      }
    }
  }
}

template <typename Element, typename W, int Pairs>
__global__ void __launch_bounds__(kThreads, W::kHasGroups&& Pairs == 64 ? 2 : 3)
    experts_tile_kernel(ExpertsProductParams p, int64_t max_tiles) {
  allow_next_kernel();
  wait_for_previous_kernel();
  DYNAMIC_SHARED(uint4, queue);  // stages; then the sums
  // Blocks that share rows of weights are adjacent, so all but the first find them in L2.
  const int64_t row_tile = divide_narrow(blockIdx.x, max_tiles);
  const int64_t index = blockIdx.x - row_tile * max_tiles;
  if (index >= p.tiles[0]) return;
  const PairTile tile = PairTile::load(p.tiles, index);
  const ExpertRows rows(p);
  const int width = width_of(p);
  const int64_t block_first = row_tile * kWarps * width;
  Sums<Pairs> sums = {};
  multiply_rows<Element, W, Pairs>(p, tile, block_first + int(threadIdx.x) / kWarpSize * width,
                                   queue, sums);
  __syncthreads();  // the queue is no longer needed
  auto* shared = reinterpret_cast<float*>(queue);
  store_sums<W>(sums, shared);
  __syncthreads();
  const int words = kWarps * width / 2;  // of two columns, per pair
  for (int i = int(threadIdx.x); i < tile.count * words; i += kThreads) {
    const int pair = i / words, column = i % words * 2;
    const int64_t first = block_first + column;
    if (first >= rows.columns) continue;
    const int in_warp = column / width * 32 + column % width;
    const float* from = shared + pair * Queue<W, Pairs>::kSumStride + in_warp;
    float values[2];
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      values[k] = with_bias(p, rows, tile.expert, first + k, from[k]);
      if (!rows.is_gated) continue;
      const int64_t up = rows.second + first + k;
      values[k] = gate_value(p, values[k], with_bias(p, rows, tile.expert, up, from[16 + k]));
    }
    const int64_t place = p.pairs[tile.first + pair] * rows.columns + first;
    *reinterpret_cast<uint32_t*>(static_cast<Element*>(p.out) + place) =
        Pair<Element>::pack(values[0], values[1]);
  }
}

template <typename Element, typename W, int Pairs>
cudaError_t run(const ExpertsProductParams& p, cudaStream_t stream) {
  const int64_t max_tiles = experts_max_tiles(p.num_pairs, p.num_experts, false);
  const int64_t columns = p.weight.num_rows / p.num_experts / (p.is_gated ? 2 : 1);
  const int64_t blocks = ceil_divide<int64_t>(columns, kWarps * width_of(p)) * max_tiles;
  return launch_dependent(experts_tile_kernel<Element, W, Pairs>, dim3(unsigned(blocks)),
                          dim3(kThreads), Queue<W, Pairs>::kBytes, stream, p, max_tiles);
}

}  // namespace

cudaError_t experts_tile(const ExpertsProductParams& p, cudaStream_t stream) {
  const int64_t size = tile_pairs_of(p.num_pairs, p.num_experts, false);
  return for_weights(p, [&](auto element, auto weights) {
    using Element = decltype(element);
    using W = decltype(weights);
    return size == 32 ? run<Element, W, 32>(p, stream) : run<Element, W, 64>(p, stream);
  });
}

}  // namespace tgi::cuda
