// Products of routed experts for few pairs per expert: the weights stream from memory once.
//
// The lower bound is the size of the selected experts' matrices over the memory bandwidth. One
// token of Qwen3-30B selects 8 of 128 experts; their gates and ups are 50 MB in bfloat16, 13 us at
// 4 TB/s, and their downs half of that. As in linear.cu, an SM needs about 30 KB in flight for
// that, which a queue in shared memory holds; each lane copies exactly the 16 bytes of weights that
// it multiplies, so the queue needs no barrier. Quantised weights are queued as codes and decoded
// in registers. Their scales, which lie elsewhere, are requested one step before they are used.
//
// A block's warps split the columns, and their sums are added in warp order. The split and the
// order of all additions are the same for every size of tile: a pair's result has the same bits
// alone and in a batch.
#include "experts.cuh"

namespace tgi::cuda {
namespace {

constexpr int kParts = 8;  // of the columns, one per warp
constexpr int kThreads = kParts * kWarpSize;

// The queue of a block.
template <typename W, int Pairs>
struct Queue {
  static constexpr int kPairTiles = Pairs / 8;
  static constexpr int kCopies = 4 + W::kPieces * kPairTiles;  // per lane and step
  static constexpr int kMost = (96 << 10) / (kCopies * kThreads * 16);
  static constexpr int kStages = kMost < 4 ? kMost : 4;
  static constexpr int kBytes = kStages * kCopies * kThreads * 16;
  static constexpr int kSumStride = 32 + 4;  // lanes that write sums access each bank once
  // two blocks per SM of 227 KB; one or two of 164 KB; sm_86, 89 and 120 have 99 KB, for one
  static_assert(kStages >= 2 && kParts * Pairs * kSumStride * 4 <= kBytes && kBytes <= 96 << 10);
};

// The sums over one warp's columns, laid out as mma's d.
template <int Pairs>
struct Sums {
  float at[2][Pairs / 8][4];
};

// Multiplies one step of the queue.
template <typename Element, typename W, int Pairs>
__device__ __forceinline__ void multiply(const uint4* step, int zero,
                                         const typename W::Group (&groups)[4], Sums<Pairs>& sums) {
#pragma unroll
  for (int piece = 0; piece < W::kPieces; ++piece) {
    uint4 values[Pairs / 8];
#pragma unroll
    for (int j = 0; j < Pairs / 8; ++j) {
      values[j] = step[(4 + piece * (Pairs / 8) + j) * kThreads];
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t weights[2][4];
      make_operands<W>(step[2 * half * kThreads], step[(2 * half + 1) * kThreads], piece, zero,
                       groups[2 * half], groups[2 * half + 1], weights);
#pragma unroll
      for (int j = 0; j < Pairs / 8; ++j) {
        mma_m16n8k16<Element>(sums.at[half][j], weights[0], values[j].x, values[j].y);
        mma_m16n8k16<Element>(sums.at[half][j], weights[1], values[j].z, values[j].w);
      }
    }
  }
}

// Processes this warp's columns: steps part, part + kParts and so on of the rows.
template <typename Element, typename W, int Pairs>
__device__ __forceinline__ void multiply_columns(const ExpertsProductParams& p,
                                                 const PairTile& tile, int64_t first, uint4* queue,
                                                 Sums<Pairs>& sums) {
  using Q = Queue<W, Pairs>;
  constexpr int kStride = 4 * W::kColumns;  // columns of a step
  const int part = int(threadIdx.x) / kWarpSize, lane = int(threadIdx.x) % kWarpSize;
  const int columns = int(p.weight.num_columns);
  const LaneRows<W> rows(p, ExpertRows(p), tile.expert, first);
  const Element* values[Q::kPairTiles];
  bool is_pair[Q::kPairTiles];
#pragma unroll
  for (int j = 0; j < Q::kPairTiles; ++j) {
    is_pair[j] = j * 8 + lane / 4 < tile.count;
    const int pair = is_pair[j] ? p.pairs[tile.first + j * 8 + lane / 4] : 0;
    values[j] = static_cast<const Element*>(p.a) + divide_narrow(pair, p.pairs_per_row) * columns +
                lane % 4 * W::kColumns;
  }
  const int num_steps = (ceil_divide(columns, kStride) - part + kParts - 1) / kParts;
  const auto step_at = [&](int i) {
    return queue + i % Q::kStages * Q::kCopies * kThreads + threadIdx.x;
  };
  const auto column_of = [&](int i) { return (i * kParts + part) * kStride; };
  const auto load = [&](int i) {
    const int column = column_of(i);
    const bool is_inside = column + lane % 4 * W::kColumns < columns;
    rows.template copy<kThreads>(column, step_at(i));
#pragma unroll
    for (int k = 0; k < W::kPieces * Q::kPairTiles; ++k) {
      const int piece = k / Q::kPairTiles, j = k % Q::kPairTiles;
      async_copy16(&step_at(i)[(4 + k) * kThreads], values[j] + column + piece * 8,
                   is_inside && is_pair[j]);
    }
  };
  typename W::Loaded groups[4];
#pragma unroll
  for (int i = 0; i < Q::kStages - 1; ++i) {
    if (i < num_steps) load(i);
    async_commit();
  }
  rows.load_groups(p.weight, column_of(0), groups);
  for (int i = 0; i < num_steps; ++i) {
    typename W::Group current[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) current[k] = W::convert(groups[k]);
    if (i + 1 < num_steps) rows.load_groups(p.weight, column_of(i + 1), groups);
    async_wait<Q::kStages - 2>();
    // Overwrites what this lane read in the previous step.
    if (i + Q::kStages - 1 < num_steps) load(i + Q::kStages - 1);
    async_commit();
    multiply<Element, W, Pairs>(step_at(i), p.weight.zero, current, sums);
  }
  async_wait<0>();
}

// Writes the warp's sums to shared memory: [part][pair][row].
template <typename W, int Pairs>
__device__ __forceinline__ void store_sums(const Sums<Pairs>& sums, float* shared) {
  const int part = int(threadIdx.x) / kWarpSize, lane = int(threadIdx.x) % kWarpSize;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int j = 0; j < Pairs / 8; ++j) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int row = half * 16 + lane / 4 + k / 2 * 8, pair = j * 8 + lane % 4 * 2 + k % 2;
        shared[(part * Pairs + pair) * Queue<W, Pairs>::kSumStride + row] = sums.at[half][j][k];
      }
    }
  }
}

template <typename Element, typename W, int Pairs>
__global__ void __launch_bounds__(kThreads, 2)
    experts_stream_kernel(ExpertsProductParams p, int64_t max_tiles) {
  allow_next_kernel();
  wait_for_previous_kernel();
  DYNAMIC_SHARED(uint4, queue);  // [stage][copy][thread]; then the sums
  // Blocks that share rows of weights are adjacent, so all but the first find them in L2.
  const int64_t row_tile = divide_narrow(blockIdx.x, max_tiles);
  const int64_t index = blockIdx.x - row_tile * max_tiles;
  if (index >= p.tiles[0]) return;
  const PairTile tile = PairTile::load(p.tiles, index);
  const ExpertRows rows(p);
  const int width = width_of(p);
  const int64_t first = row_tile * width;
  Sums<Pairs> sums = {};
  multiply_columns<Element, W, Pairs>(p, tile, first, queue, sums);
  __syncthreads();  // the queue is no longer needed
  auto* shared = reinterpret_cast<float*>(queue);
  store_sums<W>(sums, shared);
  __syncthreads();
  const auto sum_of = [&](int pair, int row) {
    float sum = 0;
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      sum += shared[(part * Pairs + pair) * Queue<W, Pairs>::kSumStride + row];
    }
    return sum;
  };
  for (int i = int(threadIdx.x); i < Pairs * width; i += kThreads) {
    const int pair = i / width, column = i % width;
    if (pair >= tile.count || first + column >= rows.columns) continue;
    const float sum = with_bias(p, rows, tile.expert, first + column, sum_of(pair, column));
    float value = sum;
    if (rows.is_gated) {
      const int64_t up = rows.second + first + column;
      value = gate_value(p, sum, with_bias(p, rows, tile.expert, up, sum_of(pair, 16 + column)));
    }
    const int64_t place = p.pairs[tile.first + pair] * rows.columns + first + column;
    static_cast<Element*>(p.out)[place] = Element{uint16_t(Pair<Element>::pack(value, 0.0f))};
  }
}

template <typename Element, typename W, int Pairs>
cudaError_t run(const ExpertsProductParams& p, cudaStream_t stream) {
  const int64_t max_tiles = experts_max_tiles(p.num_pairs, p.num_experts, p.is_streamed != 0);
  const int64_t columns = p.weight.num_rows / p.num_experts / (p.is_gated ? 2 : 1);
  const int64_t blocks = ceil_divide<int64_t>(columns, width_of(p)) * max_tiles;
  return launch_dependent(experts_stream_kernel<Element, W, Pairs>, dim3(unsigned(blocks)),
                          dim3(kThreads), Queue<W, Pairs>::kBytes, stream, p, max_tiles);
}

}  // namespace

cudaError_t experts_stream(const ExpertsProductParams& p, cudaStream_t stream) {
  const int64_t size = tile_pairs_of(p.num_pairs, p.num_experts, p.is_streamed != 0);
  return for_weights(p, [&](auto element, auto weights) {
    using Element = decltype(element);
    using W = decltype(weights);
    return size == 8 ? run<Element, W, 8>(p, stream) : run<Element, W, 16>(p, stream);
  });
}

}  // namespace tgi::cuda
