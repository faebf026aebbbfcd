// Copies a sequence's keys and values from its blocks into contiguous memory, where a library's
// attention reads them, and converts an 8-bit cache to the queries' type.
//
// Rows past the sequence's end become zero: a library that computes whole tiles multiplies them by
// weights of 0, which would be NaN for what may have been left there.
//
// A thread copies kVectors times 16 bytes of output. With six blocks on an SM that is up to 96 KB
// in flight, four times what the bandwidth needs: each copy first waits for its block's id.
#include "kernels.h"
#include "vec.cuh"

namespace tgi::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kVectors = 4;

// Reads eight elements of the cache as eight of the queries' type.
template <typename Element>
__device__ __forceinline__ uint4 load_as(const Element* p) {
  return *reinterpret_cast<const uint4*>(p);
}

template <typename Element>
__device__ __forceinline__ uint4 load_as(const fp8* p) {
  const uint2 codes = *reinterpret_cast<const uint2*>(p);
  const uint32_t word[2] = {codes.x, codes.y};
  float x[8];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = Pair<fp8>::unpack(uint16_t(word[i / 2] >> (i % 2 * 16)));
    x[2 * i] = pair.x;
    x[2 * i + 1] = pair.y;
  }
  return pack8<Element>(x);
}

// A block copies consecutive vectors of one head's keys or values.
template <typename Element, typename Kv>
__global__ void __launch_bounds__(kThreads, 6) gather_kernel(AttentionGatherParams p) {
  allow_next_kernel();
  wait_for_previous_kernel();
  const int64_t vectors = p.head_dim / 8;  // per row
  const int64_t head = blockIdx.y;         // of keys, then of values
  const auto* kv = static_cast<const Kv*>(p.kv);
  auto* out = static_cast<Element*>(p.out) + head * p.capacity * p.head_dim;
  const int64_t first = int64_t{blockIdx.x} * kThreads * kVectors + threadIdx.x;
  uint4 copied[kVectors];
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int64_t at = first + i * kThreads, row = divide_narrow(at, vectors);
    copied[i] = uint4{0, 0, 0, 0};
    if (row >= p.context_len) continue;
    const int64_t index = divide_narrow(row, p.block_size);
    const int64_t block = min(max(int64_t{p.block_table[index]}, int64_t{0}), p.num_blocks - 1);
    const int64_t from =
        (block * 2 * p.num_kv_heads + head) * p.block_size + row - index * p.block_size;
    copied[i] = load_as<Element>(kv + from * p.head_dim + (at - row * vectors) * 8);
  }
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int64_t at = first + i * kThreads;
    if (at < p.num_rows * vectors) *reinterpret_cast<uint4*>(out + at * 8) = copied[i];
  }
}

template <typename Element>
cudaError_t launch_gather(const AttentionGatherParams& p, cudaStream_t stream) {
  const int64_t vectors = p.num_rows * (p.head_dim / 8);
  const dim3 grid(unsigned(ceil_divide<int64_t>(vectors, kThreads * kVectors)),
                  unsigned(2 * p.num_kv_heads));
  const auto kernel =
      p.kv_type == Type::kFloat8 ? gather_kernel<Element, fp8> : gather_kernel<Element, Element>;
  return launch_dependent(kernel, grid, dim3(kThreads), 0, stream, p);
}

}  // namespace

cudaError_t attention_gather(const AttentionGatherParams& p, cudaStream_t stream) {
  const bool fits = p.head_dim % 8 == 0 && p.num_blocks > 0 && p.context_len <= p.num_rows &&
                    p.num_rows <= p.capacity && p.num_rows * p.head_dim < int64_t{1} << 32;
  if (!fits) return cudaErrorInvalidValue;
  if (p.num_rows == 0) return cudaSuccess;
  return p.type == Type::kBfloat16 ? launch_gather<bf16>(p, stream)
                                   : launch_gather<fp16>(p, stream);
}

}  // namespace tgi::cuda
