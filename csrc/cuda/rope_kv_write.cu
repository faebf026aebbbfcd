// Head norms, rotary embedding and the write of keys and values to the cache: one warp per (token,
// head).
#include "kernels.h"
#include "reduce.cuh"
#include "vec.cuh"

namespace tgi::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kMaxWords = 4;  // pairs of elements per lane: head_dim up to 256

struct Words {
  float2 at[kMaxWords];  // elements 2 (lane + 32 k) and the next
};

template <typename Element>
__device__ __forceinline__ float2 load_pair(const Element* p) {
  return Pair<Element>::unpack(*reinterpret_cast<const typename Pair<Element>::Word*>(p));
}

template <typename Element>
__device__ __forceinline__ void store_pair(Element* p, float2 x) {
  *reinterpret_cast<typename Pair<Element>::Word*>(p) = Pair<Element>::pack(x.x, x.y);
}

// A head's norm.
struct HeadNorm {
  const float* weight;  // [head_dim], or null: no norm
  const float* bias;
  float mean, inverse;

  __device__ __forceinline__ HeadNorm(const RopeParams& p, bool is_query, int64_t head)
      : weight(is_query ? p.q_norm : p.k_norm),
        bias(is_query ? p.q_bias : p.k_bias),
        mean(0),
        inverse(1) {
    const int64_t start = (is_query ? head : head - p.num_heads) * p.norm_stride;
    if (weight != nullptr) weight += start;
    if (bias != nullptr) bias += start;
  }

  __device__ __forceinline__ void measure(const Words& words, int lane, int head_dim, float eps) {
    if (weight == nullptr) return;
    if (bias != nullptr) {
      float sum = 0;
#pragma unroll
      for (int k = 0; k < kMaxWords; ++k) {
        if (2 * (lane + kWarpSize * k) < head_dim) sum += words.at[k].x + words.at[k].y;
      }
      mean = __fdividef(warp_reduce(sum, Add()), float(head_dim));
    }
    float squares = 0;
#pragma unroll
    for (int k = 0; k < kMaxWords; ++k) {
      if (2 * (lane + kWarpSize * k) < head_dim) {
        const float x = words.at[k].x - mean, y = words.at[k].y - mean;
        squares += x * x + y * y;
      }
    }
    inverse = rsqrtf(__fdividef(warp_reduce(squares, Add()), float(head_dim)) + eps);
  }

  // Returns the normalised pair at d.
  __device__ __forceinline__ float2 apply(float2 x, int d) const {
    if (weight == nullptr) return x;
    x.x = (x.x - mean) * inverse * weight[d];
    x.y = (x.y - mean) * inverse * weight[d + 1];
    if (bias != nullptr) x.x += bias[d], x.y += bias[d + 1];
    return x;
  }
};

// Returns the head's element pair at d, normalised if requested and rotated. The other half is read
// from `head` again: it is in L1.
template <typename Element>
__device__ __forceinline__ float2 rotate(const Element* head, float2 x, int d, int half,
                                         const float* cos, const float* sin, const HeadNorm& norm,
                                         bool is_normed) {
  const bool is_first = d < half;
  if (is_normed) x = norm.apply(x, d);
  if (d >= 2 * half) return x;
  const int other = is_first ? d + half : d - half, angle = is_first ? d : other;
  float2 y = load_pair(head + other);
  if (is_normed) y = norm.apply(y, other);
  const float sign = is_first ? -1.0f : 1.0f;
  return float2{x.x * cos[angle] + sign * y.x * sin[angle],
                x.y * cos[angle + 1] + sign * y.y * sin[angle + 1]};
}

template <typename Element, typename KvElement>
__global__ void __launch_bounds__(kThreads, 4) rope_kernel(RopeParams p) {
  wait_for_previous_kernel();
  allow_next_kernel();
  const int lane = int(threadIdx.x) % kWarpSize, head_dim = int(p.head_dim),
            half = int(p.rotary_dim / 2);
  const int64_t all_heads = p.num_heads + 2 * p.num_kv_heads, token = blockIdx.x;
  const int64_t head = int64_t{blockIdx.y} * kWarps + threadIdx.x / kWarpSize;
  if (head >= all_heads) return;
  const bool is_query = head < p.num_heads, is_value = head >= p.num_heads + p.num_kv_heads;
  const Element* in =
      static_cast<const Element*>(p.qkv) + (token * all_heads + head) * head_dim;  // [head_dim]
  Words words;
#pragma unroll
  for (int k = 0; k < kMaxWords; ++k) {
    const int d = 2 * (lane + kWarpSize * k);
    if (d < head_dim) words.at[k] = load_pair(in + d);
  }
  if (!is_value) {
    HeadNorm norm(p, is_query, head);
    if (!p.is_norm_last) norm.measure(words, lane, head_dim, p.eps);
    const int64_t position = min(max(int64_t{p.positions[token]}, int64_t{0}), p.num_positions - 1);
#pragma unroll
    for (int k = 0; k < kMaxWords; ++k) {
      const int d = 2 * (lane + kWarpSize * k);
      if (d >= head_dim) continue;
      words.at[k] = rotate(in, words.at[k], d, half, p.cos + position * half,
                           p.sin + position * half, norm, !p.is_norm_last);
    }
    if (p.is_norm_last) {
      norm.measure(words, lane, head_dim, p.eps);
#pragma unroll
      for (int k = 0; k < kMaxWords; ++k) {
        const int d = 2 * (lane + kWarpSize * k);
        if (d < head_dim) words.at[k] = norm.apply(words.at[k], d);
      }
    }
  }
  if (is_query) {
    Element* q = static_cast<Element*>(p.q) + (token * p.num_heads + head) * head_dim;
#pragma unroll
    for (int k = 0; k < kMaxWords; ++k) {
      const int d = 2 * (lane + kWarpSize * k);
      if (d < head_dim) store_pair(q + d, words.at[k]);
    }
    return;
  }
  const int64_t slot = p.slots[token];
  if (slot < 0 || slot >= p.num_blocks * p.block_size) return;
  const int64_t kv_head = head - p.num_heads - (is_value ? p.num_kv_heads : 0);
  const auto place = static_cast<uint32_t>(slot), block_size = static_cast<uint32_t>(p.block_size);
  const int64_t plane = int64_t{place / block_size} * 2 + (is_value ? 1 : 0);
  KvElement* out =
      static_cast<KvElement*>(p.kv) +
      ((plane * p.num_kv_heads + kv_head) * p.block_size + place % block_size) * head_dim;
  const float factor = __fdividef(1.0f, is_value ? p.value_scale : p.key_scale);
#pragma unroll
  for (int k = 0; k < kMaxWords; ++k) {
    const int d = 2 * (lane + kWarpSize * k);
    if (d < head_dim) store_pair(out + d, float2{words.at[k].x * factor, words.at[k].y * factor});
  }
}

template <typename Element>
cudaError_t launch_rope(const RopeParams& p, cudaStream_t stream) {
  const int64_t all_heads = p.num_heads + 2 * p.num_kv_heads;
  const auto kernel =
      p.kv_type == Type::kFloat8 ? rope_kernel<Element, fp8> : rope_kernel<Element, Element>;
  return launch_dependent(
      kernel, dim3(unsigned(p.num_tokens), unsigned(ceil_divide<int64_t>(all_heads, kWarps))),
      dim3(kThreads), 0, stream, p);
}

}  // namespace

cudaError_t rope_kv_write(const RopeParams& p, cudaStream_t stream) {
  const bool fits = p.head_dim % 16 == 0 && p.head_dim >= 16 && p.head_dim <= 64 * kMaxWords &&
                    p.rotary_dim % 4 == 0 && p.rotary_dim >= 0 && p.rotary_dim <= p.head_dim &&
                    p.num_blocks * p.block_size <= int64_t{UINT32_MAX};
  if (!fits || (p.kv_type != p.type && p.kv_type != Type::kFloat8)) return cudaErrorInvalidValue;
  if (p.num_tokens == 0) return cudaSuccess;
  return p.type == Type::kBfloat16 ? launch_rope<bf16>(p, stream) : launch_rope<fp16>(p, stream);
}

}  // namespace tgi::cuda
