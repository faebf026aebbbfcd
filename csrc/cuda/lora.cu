// The change that LoRA adapters make to a product, for the tokens that have one: out += up (down x).
// Hu et al., LoRA, arXiv 2106.09685; adapters by token in one batch: Chen et al., Punica, arXiv
// 2310.18547.
//
// A block computes a tile of neighbouring tokens. A step's rows are grouped by adapter, so most tiles
// load each piece of an adapter once; a tile with several adapters is computed just as well, only
// with more loads. Every sum has one order, so the other tokens do not change a token's bits.
#include "kernels.h"
#include "reduce.cuh"
#include "vec.cuh"

namespace tgi::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kTokens = 8;  // of a tile

// Returns the slot of a token's adapter, or -1 if it has none.
__device__ __forceinline__ int slot_of(const LoraTokens& p, int64_t token) {
  const int slot = token < p.num_tokens ? p.adapters[token] : -1;
  return slot >= 0 && slot < p.num_slots ? slot : -1;
}

// A warp computes one inner value of each token of the tile.
template <typename Element>
__global__ void __launch_bounds__(kThreads, 4) lora_down_kernel(LoraDownParams p) {
  wait_for_previous_kernel();
  allow_next_kernel();
  const int lane = int(threadIdx.x) % kWarpSize;
  const int inner = int(blockIdx.y) * kWarps + int(threadIdx.x) / kWarpSize;
  if (inner >= p.num_inner) return;
  const int64_t first = int64_t{blockIdx.x} * kTokens;
  const int index = inner % int(p.tokens.rank);  // within its piece
  int slots[kTokens];
  bool is_needed = false;
#pragma unroll
  for (int i = 0; i < kTokens; ++i) {
    const int slot = slot_of(p.tokens, first + i);
    slots[i] = slot >= 0 && index < p.tokens.ranks[slot] ? slot : -1;
    is_needed = is_needed || slots[i] >= 0;
  }
  if (!is_needed) return;
  const Element* x = static_cast<const Element*>(p.x) + first * p.num_columns;
  const Element* down = static_cast<const Element*>(p.tokens.pool) + inner * p.num_columns;
  float sums[kTokens] = {};
  for (int64_t column = lane * 8; column < p.num_columns; column += kWarpSize * 8) {
    float weights[8];
    int loaded = -1;
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      if (slots[i] < 0) continue;
      if (slots[i] != loaded) load8(down + slots[i] * p.tokens.slot_stride + column, weights);
      loaded = slots[i];
      float values[8];
      load8(x + i * p.num_columns + column, values);
#pragma unroll
      for (int k = 0; k < 8; ++k) sums[i] = fmaf(values[k], weights[k], sums[i]);
    }
  }
#pragma unroll
  for (int i = 0; i < kTokens; ++i) {
    if (slots[i] < 0) continue;
    const float sum = warp_reduce(sums[i], Add());
    if (lane == 0) p.inner[(first + i) * p.num_inner + inner] = sum;
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

// A thread computes two rows of each token of the tile.
template <typename Element, typename Out>
__global__ void __launch_bounds__(kThreads, 2) lora_up_kernel(LoraUpParams p) {
  wait_for_previous_kernel();
  allow_next_kernel();
  const int64_t row = (int64_t{blockIdx.y} * kThreads + threadIdx.x) * 2;
  if (row >= p.num_rows) return;
  const int64_t first = int64_t{blockIdx.x} * kTokens;
  int slots[kTokens], ranks[kTokens], longest = 0;
#pragma unroll
  for (int i = 0; i < kTokens; ++i) {
    slots[i] = slot_of(p.tokens, first + i);
    ranks[i] = slots[i] < 0 ? 0 : min(p.tokens.ranks[slots[i]], int(p.tokens.rank));
    longest = max(longest, ranks[i]);
  }
  const int64_t piece = (row >= p.first_end) + (row >= p.second_end);
  const float* inner = p.inner + first * p.num_inner + piece * p.tokens.rank;
  const Element* up = static_cast<const Element*>(p.tokens.pool) + row * p.tokens.rank;
  float2 sums[kTokens] = {};
  for (int index = 0; index < longest; index += 8) {
    float upper[8], lower[8];
    int loaded = -1;
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      if (index >= ranks[i]) continue;
      if (slots[i] != loaded) {
        const Element* weights = up + slots[i] * p.tokens.slot_stride + index;
        load8(weights, upper);
        load8(weights + p.tokens.rank, lower);
        loaded = slots[i];
      }
      float values[8];
      load8(inner + i * p.num_inner + index, values);
#pragma unroll
      for (int k = 0; k < 8; ++k) {
        sums[i].x = fmaf(values[k], upper[k], sums[i].x);
        sums[i].y = fmaf(values[k], lower[k], sums[i].y);
      }
    }
  }
  Out* out = static_cast<Out*>(p.out) + first * p.num_rows + row;
#pragma unroll
  for (int i = 0; i < kTokens; ++i) {
    if (ranks[i] == 0) continue;
    add_pair(out + i * p.num_rows, float2{p.factor * sums[i].x, p.factor * sums[i].y});
  }
}

template <typename Element>
cudaError_t run_up(const LoraUpParams& p, dim3 grid, cudaStream_t stream) {
  const auto kernel = p.is_wide ? lora_up_kernel<Element, float> : lora_up_kernel<Element, Element>;
  return launch_dependent(kernel, grid, dim3(kThreads), 0, stream, p);
}

bool are_sizes_valid(const LoraTokens& p, int64_t num_inner) {
  return p.rank > 0 && p.rank % 8 == 0 && num_inner % p.rank == 0 && p.slot_stride % 8 == 0;
}

}  // namespace

cudaError_t lora_down(const LoraDownParams& p, cudaStream_t stream) {
  if (!are_sizes_valid(p.tokens, p.num_inner) || p.num_columns % 8 != 0) {
    return cudaErrorInvalidValue;
  }
  if (p.tokens.num_tokens == 0) return cudaSuccess;
  const dim3 grid(unsigned(ceil_divide<int64_t>(p.tokens.num_tokens, kTokens)),
                  unsigned(ceil_divide<int64_t>(p.num_inner, kWarps)));
  const auto kernel =
      p.tokens.type == Type::kBfloat16 ? lora_down_kernel<bf16> : lora_down_kernel<fp16>;
  return launch_dependent(kernel, grid, dim3(kThreads), 0, stream, p);
}

cudaError_t lora_up(const LoraUpParams& p, cudaStream_t stream) {
  if (!are_sizes_valid(p.tokens, p.num_inner) || (p.num_rows | p.first_end | p.second_end) % 2 != 0) {
    return cudaErrorInvalidValue;
  }
  if (p.tokens.num_tokens == 0) return cudaSuccess;
  const dim3 grid(unsigned(ceil_divide<int64_t>(p.tokens.num_tokens, kTokens)),
                  unsigned(ceil_divide<int64_t>(p.num_rows, 2 * kThreads)));
  return p.tokens.type == Type::kBfloat16 ? run_up<bf16>(p, grid, stream)
                                          : run_up<fp16>(p, grid, stream);
}

}  // namespace tgi::cuda
