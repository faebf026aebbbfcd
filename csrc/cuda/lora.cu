// The change that LoRA adapters make to a product, for the tokens that have one: out += up (down
// x). Hu et al., LoRA, arXiv 2106.09685; adapters by token in one batch: Chen et al., Punica, arXiv
// 2310.18547.
//
// A block computes a tile of neighbouring tokens, in one pass for each adapter among them. A step's
// rows are grouped by adapter, so most tiles take one pass, which loads the adapter's part once. In
// a pass, tokens without this adapter read the rows of one that has it, and their sums are dropped:
// no branch keeps the next load waiting. Every sum has one order, so the other tokens of a step do
// not change a token's bits.
#include "kernels.h"
#include "mma.cuh"

namespace tgi::cuda {
namespace {

// The adapters of a tile's tokens, taken one by one. All lanes of a warp must call its functions.
template <int Tokens>
class Passes {
 public:
  __device__ __forceinline__ Passes(const LoraProduct& p, int64_t first) {
    const int lane = int(threadIdx.x) % kWarpSize;
    const bool is_token = lane < Tokens && first + lane < p.num_tokens;
    const int slot = is_token ? p.adapters[first + lane] : -1;
    slot_ = slot < p.num_slots ? slot : -1;  // of this lane's token
    pending_ = __ballot_sync(kAllLanes, slot_ >= 0);
  }

  // Goes on to the next adapter; returns whether there is one.
  __device__ __forceinline__ bool next() {
    if (pending_ == 0) return false;
    leader_ = __ffs(int(pending_)) - 1;
    slot = __shfl_sync(kAllLanes, slot_, leader_);
    members_ = __ballot_sync(kAllLanes, slot_ == slot);
    pending_ &= ~members_;
    return true;
  }

  __device__ __forceinline__ bool has(int token) const { return members_ >> token & 1; }

  // Returns the token, or one that has the adapter.
  __device__ __forceinline__ int row(int token) const { return has(token) ? token : leader_; }

  int slot;  // of the adapter

 private:
  int slot_, leader_;
  uint32_t members_, pending_;
};

// A product's part of an adapter.
template <typename Element>
struct Part {
  const Element* matrices;  // down, then up
  int rank;

  __device__ __forceinline__ Part(const LoraProduct& p, int slot) {
    const int32_t* place = p.places + (slot * p.num_products + p.product) * 2;
    rank = place[0];
    const int64_t begin = slot * p.slot_stride + int64_t{place[1]} * 8;
    matrices = static_cast<const Element*>(p.pool) + begin;
  }
};

constexpr int kDownThreads = 512;
constexpr int kDownWarps = kDownThreads / kWarpSize;
constexpr int kDownTokens = 16;  // of a tile, the rows of mma's first matrix
constexpr int kInner = 8;        // inner values of a tile, the columns of its second
constexpr int kColumns = 32;     // of a warp's step: two mma

__device__ __forceinline__ uint4 load_eight(const void* row, int64_t column, bool is_valid) {
  return is_valid ? *reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(row) + column)
                  : uint4{};
}

// A block computes `Tiles` tiles of inner values for a tile of tokens; its warps share the columns.
// A lane loads eight adjacent columns of each matrix and hands them to two mma as if they were
// apart:
//
//     columns  0 1 | 2 3 | 4 5 | 6 7   of a lane
//     k of mma 0 1 | 8 9 | 0 1 | 8 9   of its first two columns; then the second mma
template <typename Element, int Tiles>
__global__ void __launch_bounds__(kDownThreads, 1) lora_down_kernel(LoraDownParams p) {
  allow_next_kernel();
  wait_for_previous_kernel();
  constexpr int kSums = Tiles * kDownTokens * kInner, kPartials = kDownWarps * kSums;
  SHARED_ARRAY(float, partial, kPartials);
  const LoraProduct& product = p.product;
  const int thread = int(threadIdx.x), warp = thread / kWarpSize, lane = thread % kWarpSize;
  const int64_t columns = product.num_columns, first = int64_t{blockIdx.x} * kDownTokens;
  const int inner = int(blockIdx.y) * Tiles * kInner;
  const Element* x = static_cast<const Element*>(p.x) + first * columns;
  Passes<kDownTokens> passes(product, first);
  while (passes.next()) {
    const Part<Element> part(product, passes.slot);
    const Element* down[Tiles];
    bool has_tile[Tiles], has_any = false;
#pragma unroll
    for (int tile = 0; tile < Tiles; ++tile) {
      const int piece = (inner + tile * kInner) / int(product.rank);
      const int index = (inner + tile * kInner) % int(product.rank);
      has_tile[tile] = index < part.rank && inner + tile * kInner < p.num_inner;
      has_any = has_any || has_tile[tile];
      down[tile] = part.matrices + (int64_t{piece} * part.rank + index + lane / 4) * columns;
    }
    if (!has_any) continue;
    const Element* upper = x + passes.row(lane / 4) * columns;
    const Element* lower = x + passes.row(lane / 4 + 8) * columns;
    float sums[Tiles][4] = {};
#pragma unroll 4
    for (int64_t start = warp * kColumns; start < columns; start += kDownWarps * kColumns) {
      const int64_t column = start + lane % 4 * 8;
      const bool is_valid = column < columns;
      const uint4 a = load_eight(upper, column, is_valid), b = load_eight(lower, column, is_valid);
#pragma unroll
      for (int tile = 0; tile < Tiles; ++tile) {
        const uint4 weights = load_eight(down[tile], column, is_valid && has_tile[tile]);
        mma_m16n8k16<Element>(sums[tile], {a.x, b.x, a.y, b.y}, weights.x, weights.y);
        mma_m16n8k16<Element>(sums[tile], {a.z, b.z, a.w, b.w}, weights.z, weights.w);
      }
    }
#pragma unroll
    for (int tile = 0; tile < Tiles; ++tile) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        partial[warp * kSums + (tile * kDownTokens + row) * kInner + column] = sums[tile][i];
      }
    }
    __syncthreads();
    if (thread < kSums) {
      float sum = partial[thread];
#pragma unroll
      for (int other = 1; other < kDownWarps; ++other) sum += partial[other * kSums + thread];
      const int tile = thread / (kDownTokens * kInner), token = thread / kInner % kDownTokens;
      bool is_used = false;
#pragma unroll
      for (int i = 0; i < Tiles; ++i) is_used = is_used || (i == tile && has_tile[i]);
      const int64_t place = inner + tile * kInner + thread % kInner;
      if (is_used && passes.has(token)) p.inner[(first + token) * p.num_inner + place] = sum;
    }
    __syncthreads();
  }
}

__device__ __forceinline__ void add_pair(float* out, float2 sum) {
  float2* pair = reinterpret_cast<float2*>(out);
  *pair = float2{pair->x + sum.x, pair->y + sum.y};
}

template <typename Element>
__device__ __forceinline__ void add_pair(Element* out, float2 sum) {
  auto* word = reinterpret_cast<typename Pair<Element>::Word*>(out);
  const float2 old = Pair<Element>::unpack(*word);
  *word = Pair<Element>::pack(old.x + sum.x, old.y + sum.y);
}

constexpr int kTokens = 8;      // of a tile
constexpr int kUpThreads = 64;  // few, so that a product of few rows has blocks for many processors

// A thread computes two rows of each token of the tile.
template <typename Element, typename Out>
__global__ void __launch_bounds__(kUpThreads, 6) lora_up_kernel(LoraUpParams p) {
  allow_next_kernel();
  wait_for_previous_kernel();
  const LoraProduct& product = p.product;
  const int64_t first = int64_t{blockIdx.x} * kTokens;
  const int64_t own_row = (int64_t{blockIdx.y} * kUpThreads + threadIdx.x) * 2;
  const int64_t row = min(own_row, p.num_rows - 2);
  const int64_t piece = (row >= p.first_end) + (row >= p.second_end);
  const float* inner = p.inner + first * p.num_inner + piece * product.rank;
  Out* out = static_cast<Out*>(p.out) + first * p.num_rows + row;
  Passes<kTokens> passes(product, first);
  while (passes.next()) {
    const Part<Element> part(product, passes.slot);
    const int64_t rank = part.rank;
    const int64_t num_inner = int(p.num_inner) / int(product.rank) * rank;
    const Element* up = part.matrices + num_inner * product.num_columns + row * rank;
    float2 sums[kTokens] = {};
    for (int64_t index = 0; index < rank; index += 8) {
      float upper[8], lower[8];
      load8(up + index, upper);
      load8(up + rank + index, lower);
#pragma unroll
      for (int i = 0; i < kTokens; ++i) {
        float values[8];
        load8(inner + passes.row(i) * p.num_inner + index, values);
#pragma unroll
        for (int k = 0; k < 8; ++k) {
          sums[i].x = fmaf(values[k], upper[k], sums[i].x);
          sums[i].y = fmaf(values[k], lower[k], sums[i].y);
        }
      }
    }
    if (rank == 0 || own_row >= p.num_rows) continue;
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      const float2 sum = {p.factor * sums[i].x, p.factor * sums[i].y};
      if (passes.has(i)) add_pair(out + i * p.num_rows, sum);
    }
  }
}

template <typename Element>
cudaError_t run_up(const LoraUpParams& p, dim3 grid, cudaStream_t stream) {
  const auto kernel = p.is_wide ? lora_up_kernel<Element, float> : lora_up_kernel<Element, Element>;
  return launch_dependent(kernel, grid, dim3(kUpThreads), 0, stream, p);
}

template <typename Element>
cudaError_t run_down(const LoraDownParams& p, cudaStream_t stream) {
  // Two tiles halve the reads of x; few tokens need their blocks on many multiprocessors instead.
  const int num_tiles = p.product.num_tokens >= 512 ? 2 : 1;
  const dim3 grid(unsigned(ceil_divide<int64_t>(p.product.num_tokens, kDownTokens)),
                  unsigned(ceil_divide<int64_t>(p.num_inner, num_tiles * kInner)));
  const auto kernel = num_tiles == 2 ? lora_down_kernel<Element, 2> : lora_down_kernel<Element, 1>;
  return launch_dependent(kernel, grid, dim3(kDownThreads), 0, stream, p);
}

bool are_sizes_valid(const LoraProduct& p, int64_t num_inner) {
  return p.rank > 0 && p.rank % 8 == 0 && num_inner % p.rank == 0 && p.slot_stride % 8 == 0 &&
         p.num_columns % 8 == 0;
}

}  // namespace

cudaError_t lora_down(const LoraDownParams& p, cudaStream_t stream) {
  if (!are_sizes_valid(p.product, p.num_inner)) return cudaErrorInvalidValue;
  if (p.product.num_tokens == 0) return cudaSuccess;
  return p.product.type == Type::kBfloat16 ? run_down<bf16>(p, stream) : run_down<fp16>(p, stream);
}

cudaError_t lora_up(const LoraUpParams& p, cudaStream_t stream) {
  const bool are_pairs = (p.num_rows | p.first_end | p.second_end) % 2 == 0 && p.num_rows > 0;
  if (!are_sizes_valid(p.product, p.num_inner) || !are_pairs) return cudaErrorInvalidValue;
  if (p.product.num_tokens == 0) return cudaSuccess;
  const dim3 grid(unsigned(ceil_divide<int64_t>(p.product.num_tokens, kTokens)),
                  unsigned(ceil_divide<int64_t>(p.num_rows, 2 * kUpThreads)));
  return p.product.type == Type::kBfloat16 ? run_up<bf16>(p, grid, stream)
                                           : run_up<fp16>(p, grid, stream);
}

}  // namespace tgi::cuda
