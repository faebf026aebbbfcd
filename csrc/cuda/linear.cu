// Products with plain weights for a few tokens: out [tokens, rows] = a [tokens, columns] times W
// [rows, columns] transposed.
//
// The lower bound is W's size over the memory bandwidth: 28672 x 4096 elements of 16 bits are 235
// MB, 59 us at 4 TB/s. To stream at that rate an SM needs about 30 KB in flight (bandwidth times
// latency, divided by the number of SMs). Registers would be nearly exhausted by that, so a queue
// in shared memory holds it: 48 KB of W in flight per block of up to 16 tokens, two of which fit on
// an SM. Blocks of 16 rows, four on an SM, are 2 to 4 % slower for 8 tokens on an H200.
//
// Rows of W are the 16-row operand of mma, tokens the 8-wide one. Both operands have their columns
// in the same order in registers, and the sum is the same in any order. A lane therefore takes 8
// consecutive columns of a row, 16 bytes, instead of the four pairs of mma's layout. It copies
// exactly the data that it multiplies itself, so the queue needs no barrier, swizzle or ldmatrix.
//
// A block's warps split the columns, and their sums are added in warp order. The split and the
// order of all additions are the same for every number of tokens: a token's result has the same
// bits alone and in a batch.
#include "async.cuh"
#include "kernels.h"
#include "mma.cuh"
#include "vec.cuh"

namespace tgi::cuda {
namespace {

constexpr int kParts = 8;  // of the columns, one per warp
constexpr int kThreads = kParts * kWarpSize;
constexpr int kStep = 32;  // columns that a warp processes at a time: 16 bytes per lane and row

// A block's part of the output. With more rows, fewer blocks read the same activations (from L2).
template <int Tokens>
struct Tile {
  static constexpr int kRowTiles = 2;  // of 16
  static constexpr int kTokenTiles = Tokens / 8;
  static constexpr int kRows = 16 * kRowTiles;
  static constexpr int kCopies = 2 * kRowTiles + kTokenTiles;  // 16-byte copies per lane and step
  static constexpr int kStages = Tokens <= 16 ? 4 : Tokens == 32 ? 3 : 2;
  static constexpr int kBlocks = 2;             // per SM
  static constexpr int kSumStride = kRows + 4;  // lanes that write sums access each bank once
  static constexpr int kQueueBytes = kStages * kCopies * kThreads * 16;
  static constexpr int kSumBytes = kParts * Tokens * kSumStride * 4;
  // sm_86, 89 and 120 have 99 KB
  static_assert(kSumBytes <= kQueueBytes && kQueueBytes <= 96 << 10);
};

// The sums over one warp's columns, laid out as mma's d.
template <int Tokens>
struct Sums {
  float at[Tile<Tokens>::kRowTiles][Tile<Tokens>::kTokenTiles][4];
};

// Multiplies one step of the queue.
template <typename Element, int Tokens>
__device__ __forceinline__ void multiply(const uint4* step, Sums<Tokens>& sums) {
  using T = Tile<Tokens>;
  uint32_t weights[T::kRowTiles][2][4];  // for two mma
#pragma unroll
  for (int i = 0; i < T::kRowTiles; ++i) {
    const uint4 low = step[2 * i * kThreads], high = step[(2 * i + 1) * kThreads];
    weights[i][0][0] = low.x, weights[i][0][1] = high.x;
    weights[i][0][2] = low.y, weights[i][0][3] = high.y;
    weights[i][1][0] = low.z, weights[i][1][1] = high.z;
    weights[i][1][2] = low.w, weights[i][1][3] = high.w;
  }
#pragma unroll
  for (int j = 0; j < T::kTokenTiles; ++j) {
    const uint4 values = step[(2 * T::kRowTiles + j) * kThreads];
#pragma unroll
    for (int i = 0; i < T::kRowTiles; ++i) {
      mma_m16n8k16<Element>(sums.at[i][j], weights[i][0], values.x, values.y);
      mma_m16n8k16<Element>(sums.at[i][j], weights[i][1], values.z, values.w);
    }
  }
}

// Processes this warp's columns: steps part, part + kParts and so on of the row.
template <typename Element, int Tokens>
__device__ __forceinline__ void multiply_columns(const LinearParams& p, int64_t first_row,
                                                 int64_t first_token, uint4* queue,
                                                 Sums<Tokens>& sums) {
  using T = Tile<Tokens>;
  const int part = int(threadIdx.x) / kWarpSize, lane = int(threadIdx.x) % kWarpSize;
  const int64_t row = first_row + lane / 4, token = first_token + lane / 4;
  const int64_t first_column = part * kStep + lane % 4 * 8;
  const auto* weights = static_cast<const Element*>(p.weight) + row * p.num_columns + first_column;
  const auto* values = static_cast<const Element*>(p.a) + token * p.num_columns + first_column;
  const auto num_steps =
      int((ceil_divide<int64_t>(p.num_columns, kStep) - part + kParts - 1) / kParts);
  const auto step_at = [&](int i) {
    return queue + i % T::kStages * T::kCopies * kThreads + threadIdx.x;
  };
  const auto offset_of = [](int i) { return int64_t{i} * kParts * kStep; };
  const auto is_inside = [&](int i) { return first_column + offset_of(i) < p.num_columns; };
  const auto load_weights = [&](int i) {
#pragma unroll
    for (int k = 0; k < 2 * T::kRowTiles; ++k) {
      async_copy16(&step_at(i)[k * kThreads], weights + k * 8 * p.num_columns + offset_of(i),
                   is_inside(i) && row + k * 8 < p.num_rows);
    }
  };
  const auto load_values = [&](int i) {
#pragma unroll
    for (int k = 0; k < T::kTokenTiles; ++k) {
      async_copy16(&step_at(i)[(2 * T::kRowTiles + k) * kThreads],
                   values + k * 8 * p.num_columns + offset_of(i),
                   is_inside(i) && token + k * 8 < p.num_tokens);
    }
  };
  allow_next_kernel();
  // Weights are never written, so their first copies start before the previous kernel has ended.
#pragma unroll
  for (int i = 0; i < T::kStages - 1; ++i) {
    if (i < num_steps) load_weights(i);
  }
  wait_for_previous_kernel();
#pragma unroll
  for (int i = 0; i < T::kStages - 1; ++i) {
    if (i < num_steps) load_values(i);
    async_commit();
  }
  for (int i = 0; i < num_steps; ++i) {
    async_wait<T::kStages - 2>();
    if (i + T::kStages - 1 < num_steps) {  // overwrites what this lane read in the previous step
      load_weights(i + T::kStages - 1);
      load_values(i + T::kStages - 1);
    }
    async_commit();
    multiply<Element>(step_at(i), sums);
  }
  async_wait<0>();
}

// Writes the warp's sums to shared memory: [part][token][row].
template <int Tokens>
__device__ __forceinline__ void store_sums(const Sums<Tokens>& sums, float* shared) {
  using T = Tile<Tokens>;
  const int part = int(threadIdx.x) / kWarpSize, lane = int(threadIdx.x) % kWarpSize;
#pragma unroll
  for (int i = 0; i < T::kRowTiles; ++i) {
#pragma unroll
    for (int j = 0; j < T::kTokenTiles; ++j) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int row = i * 16 + lane / 4 + k / 2 * 8, token = j * 8 + lane % 4 * 2 + k % 2;
        shared[(part * Tokens + token) * T::kSumStride + row] = sums.at[i][j][k];
      }
    }
  }
}

template <typename Element, int Tokens>
__global__ void __launch_bounds__(kThreads, Tile<Tokens>::kBlocks) linear_kernel(LinearParams p) {
  using T = Tile<Tokens>;
  DYNAMIC_SHARED(uint4, queue);  // [stage][copy][thread]; then the sums
  // Blocks that share rows of W are adjacent, so all but the first find them in L2.
  const int64_t token_tiles = ceil_divide<int64_t>(p.num_tokens, Tokens);
  const int64_t row_tile = divide_narrow(blockIdx.x, token_tiles);
  const int64_t first_token = (blockIdx.x - row_tile * token_tiles) * Tokens;
  const int64_t first_row = row_tile * T::kRows;
  Sums<Tokens> sums = {};
  multiply_columns<Element>(p, first_row, first_token, queue, sums);
  __syncthreads();  // the queue is no longer needed
  auto* shared = reinterpret_cast<float*>(queue);
  store_sums(sums, shared);
  __syncthreads();
  for (int i = int(threadIdx.x); i < Tokens * T::kRows; i += kThreads) {
    const int64_t token = first_token + i / T::kRows, row = first_row + i % T::kRows;
    if (token >= p.num_tokens || row >= p.num_rows) continue;
    float sum = 0;
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      sum += shared[(part * Tokens + i / T::kRows) * T::kSumStride + i % T::kRows];
    }
    if (p.bias != nullptr) sum += p.bias[row];
    const int64_t place = token * p.num_rows + row;
    if (p.is_wide) {
      float* out = static_cast<float*>(p.out) + place;
      *out = p.is_added ? *out + sum : sum;
    } else {
      static_cast<Element*>(p.out)[place] = Element{uint16_t(Pair<Element>::pack(sum, 0.0f))};
    }
  }
}

template <typename Element, int Tokens>
cudaError_t launch_linear(const LinearParams& p, cudaStream_t stream) {
  using T = Tile<Tokens>;
  const int64_t blocks =
      ceil_divide<int64_t>(p.num_rows, T::kRows) * ceil_divide<int64_t>(p.num_tokens, Tokens);
  return launch_dependent(linear_kernel<Element, Tokens>, dim3(unsigned(blocks)), dim3(kThreads),
                          T::kQueueBytes, stream, p);
}

template <typename Element>
cudaError_t launch_type(const LinearParams& p, cudaStream_t stream) {
  if (p.num_tokens <= 8) return launch_linear<Element, 8>(p, stream);
  if (p.num_tokens <= 16) return launch_linear<Element, 16>(p, stream);
  // cuBLAS is faster from here on, but only this kernel gives a token the same bits in any batch.
  if (p.num_tokens <= 32) return launch_linear<Element, 32>(p, stream);
  return launch_linear<Element, 64>(p, stream);
}

}  // namespace

cudaError_t linear(const LinearParams& p, cudaStream_t stream) {
  if (p.num_columns % 8 != 0 || (p.is_added && !p.is_wide)) return cudaErrorInvalidValue;
  if (p.num_tokens == 0 || p.num_rows == 0) return cudaSuccess;
  return p.type == Type::kBfloat16 ? launch_type<bf16>(p, stream) : launch_type<fp16>(p, stream);
}

}  // namespace tgi::cuda
