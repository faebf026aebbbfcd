// Head norms, rotary embedding and the write of keys and values to the cache.
//
// Eight lanes have a head of 128 elements: each holds a pair of runs that the rotation mixes, eight
// elements from each half, so that it reads and writes 16 bytes at a time. A thread requests its
// runs of several heads before it uses the first, and reads their angles once: with a head per warp
// an SM had 9 KB in flight, a third of what its share of the memory's bandwidth takes.
#include "kernels.h"
#include "reduce.cuh"
#include "vec.cuh"

namespace tgi::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kHeads = 3;  // of a thread: a block covers the 48 of 32 query and 8 KV heads

// `Width` adjacent elements.
template <typename Element, int Width>
struct Run;

template <typename Element>
struct Run<Element, 8> {
  using Word = uint4;
  static __device__ __forceinline__ void unpack(Word word, float (&out)[8]) {
    unpack8<Element>(word, out);
  }
  static __device__ __forceinline__ Word pack(const float (&x)[8]) { return pack8<Element>(x); }
};

template <>
struct Run<fp8, 8> {
  using Word = uint2;
  static __device__ __forceinline__ Word pack(const float (&x)[8]) {
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) words[i] = Pair<fp8>::pack(x[2 * i], x[2 * i + 1]);
    return uint2{words[0] | words[1] << 16, words[2] | words[3] << 16};
  }
};

template <typename Element>
struct Run<Element, 2> {
  using Word = typename Pair<Element>::Word;
  static __device__ __forceinline__ void unpack(Word word, float (&out)[2]) {
    const float2 pair = Pair<Element>::unpack(word);
    out[0] = pair.x, out[1] = pair.y;
  }
  static __device__ __forceinline__ Word pack(const float (&x)[2]) {
    return Pair<Element>::pack(x[0], x[1]);
  }
};

__device__ __forceinline__ void load_floats(const float* p, float (&out)[8]) { load8(p, out); }
__device__ __forceinline__ void load_floats(const float* p, float (&out)[2]) {
  const float2 pair = *reinterpret_cast<const float2*>(p);
  out[0] = pair.x, out[1] = pair.y;
}

// The runs of a lane: where they begin in a head, and whether they are rotated. Beyond the rotated
// elements, a pair consists of two adjacent runs.
//
//     |0 .. half|half .. rotary_dim|rest |
//      a b c d   a b c d            e e      pairs by letter
template <int Width>
struct Runs {
  static constexpr int kPairs = Width == 8 ? 1 : 2;  // of a lane: head_dim up to 256

  int at[kPairs][2];
  bool is_rotated[kPairs];
  bool is_valid[kPairs];  // false: the head has no more

  __device__ __forceinline__ Runs(int lane, int lanes, int head_dim, int half) {
#pragma unroll
    for (int k = 0; k < kPairs; ++k) {
      const int pair = lane + k * lanes, start = pair * Width;
      is_rotated[k] = start < half;
      is_valid[k] = 2 * start < head_dim;
      at[k][0] = is_rotated[k] ? start : 2 * start;
      at[k][1] = at[k][0] + (is_rotated[k] ? half : Width);
    }
  }
};

template <int Width>
using Values = float[Runs<Width>::kPairs][2][Width];

__device__ __forceinline__ float sum_over(float x, int lanes) {
  for (int other = lanes / 2; other > 0; other /= 2) x += __shfl_xor_sync(kAllLanes, x, other);
  return x;
}

// A head's norm. All lanes of a warp must call its functions, also those without a norm.
struct HeadNorm {
  const float* weight;  // [head_dim], or null: no norm
  const float* bias;

  __device__ __forceinline__ HeadNorm(const RopeParams& p, bool is_query, int64_t head)
      : weight(is_query ? p.q_norm : p.k_norm), bias(is_query ? p.q_bias : p.k_bias) {
    const int64_t start = (is_query ? head : head - p.num_heads) * p.norm_stride;
    if (weight != nullptr) weight += start;
    if (bias != nullptr) bias += start;
  }

  template <int Width>
  __device__ __forceinline__ void apply(const RopeParams& p, const Runs<Width>& runs, int lanes,
                                        bool is_normed, Values<Width>& x) const {
    const auto head_dim = float(p.head_dim);
    float mean = 0, squares = 0;
    if (p.q_bias != nullptr || p.k_bias != nullptr) {
      float sum = 0;
#pragma unroll
      for (int k = 0; k < Runs<Width>::kPairs; ++k) {
#pragma unroll
        for (int i = 0; i < Width; ++i) sum += x[k][0][i] + x[k][1][i];  // 0 beyond the head
      }
      sum = sum_over(sum, lanes);
      if (bias != nullptr) mean = __fdividef(sum, head_dim);
    }
#pragma unroll
    for (int k = 0; k < Runs<Width>::kPairs; ++k) {
#pragma unroll
      for (int side = 0; side < 2; ++side) {
#pragma unroll
        for (int i = 0; i < Width; ++i) {
          const float own = runs.is_valid[k] ? x[k][side][i] - mean : 0.0f;
          squares += own * own;
        }
      }
    }
    const float inverse = rsqrtf(__fdividef(sum_over(squares, lanes), head_dim) + p.eps);
    if (!is_normed || weight == nullptr) return;
#pragma unroll
    for (int k = 0; k < Runs<Width>::kPairs; ++k) {
      if (!runs.is_valid[k]) continue;
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        float factors[Width], terms[Width] = {};
        load_floats(weight + runs.at[k][side], factors);
        if (bias != nullptr) load_floats(bias + runs.at[k][side], terms);
#pragma unroll
        for (int i = 0; i < Width; ++i) {
          x[k][side][i] = (x[k][side][i] - mean) * inverse * factors[i] + terms[i];
        }
      }
    }
  }
};

// The cosines and sines of a token for a lane's pairs.
template <int Width>
struct Angles {
  float cos[Runs<Width>::kPairs][Width], sin[Runs<Width>::kPairs][Width];

  __device__ __forceinline__ Angles(const RopeParams& p, int64_t position,
                                    const Runs<Width>& runs) {
    const int64_t row = position * (p.rotary_dim / 2);
#pragma unroll
    for (int k = 0; k < Runs<Width>::kPairs; ++k) {
      if (!runs.is_rotated[k]) continue;
      load_floats(p.cos + row + runs.at[k][0], cos[k]);
      load_floats(p.sin + row + runs.at[k][0], sin[k]);
    }
  }

  __device__ __forceinline__ void rotate(const Runs<Width>& runs, Values<Width>& x) const {
#pragma unroll
    for (int k = 0; k < Runs<Width>::kPairs; ++k) {
      if (!runs.is_rotated[k]) continue;
#pragma unroll
      for (int i = 0; i < Width; ++i) {
        const float first = x[k][0][i], second = x[k][1][i];
        x[k][0][i] = first * cos[k][i] - second * sin[k][i];
        x[k][1][i] = second * cos[k][i] + first * sin[k][i];
      }
    }
  }
};

template <typename Element, int Width>
__device__ __forceinline__ void store(Element* head, const Runs<Width>& runs,
                                      const Values<Width>& x) {
  using Packed = Run<Element, Width>;
#pragma unroll
  for (int k = 0; k < Runs<Width>::kPairs; ++k) {
    if (!runs.is_valid[k]) continue;
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      *reinterpret_cast<typename Packed::Word*>(head + runs.at[k][side]) = Packed::pack(x[k][side]);
    }
  }
}

// `lanes` have a head: a power of two.
template <typename Element, typename KvElement, int Width>
__global__ void __launch_bounds__(kThreads, 4) rope_kernel(RopeParams p, int lanes) {
  allow_next_kernel();
  wait_for_previous_kernel();
  constexpr int kPairs = Runs<Width>::kPairs;
  using In = Run<Element, Width>;
  const int head_dim = int(p.head_dim), all_heads = int(p.num_heads + 2 * p.num_kv_heads);
  const int stride = kThreads / lanes;  // between the heads of a thread
  const int first = int(blockIdx.y) * kHeads * stride + int(threadIdx.x) / lanes;
  const int64_t token = blockIdx.x;
  const Runs<Width> runs(int(threadIdx.x) % lanes, lanes, head_dim, int(p.rotary_dim / 2));
  const Element* in = static_cast<const Element*>(p.qkv) + token * all_heads * head_dim;
  typename In::Word words[kHeads][kPairs][2];
#pragma unroll
  for (int i = 0; i < kHeads; ++i) {
    const int head = first + i * stride;
#pragma unroll
    for (int k = 0; k < kPairs; ++k) {
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        words[i][k][side] = {};
        if (head >= all_heads || !runs.is_valid[k]) continue;
        words[i][k][side] = *reinterpret_cast<const typename In::Word*>(
            in + int64_t{head} * head_dim + runs.at[k][side]);
      }
    }
  }
  const int64_t slot = p.slots[token];
  const int64_t position = min(max(int64_t{p.positions[token]}, int64_t{0}), p.num_positions - 1);
  const Angles<Width> angles(p, position, runs);
  const bool is_written = slot >= 0 && slot < p.num_blocks * p.block_size;
  const auto place = static_cast<uint32_t>(slot), block_size = static_cast<uint32_t>(p.block_size);
  const int64_t block = place / block_size, offset = place % block_size;
  const bool has_norm = p.q_norm != nullptr || p.k_norm != nullptr;
#pragma unroll
  for (int i = 0; i < kHeads; ++i) {
    const int head = first + i * stride;
    const bool is_query = head < p.num_heads, is_value = head >= p.num_heads + p.num_kv_heads;
    Values<Width> x;
#pragma unroll
    for (int k = 0; k < kPairs; ++k) {
      In::unpack(words[i][k][0], x[k][0]);
      In::unpack(words[i][k][1], x[k][1]);
    }
    const HeadNorm norm(p, is_query, head);
    if (has_norm && !p.is_norm_last) norm.apply<Width>(p, runs, lanes, !is_value, x);
    if (!is_value) angles.rotate(runs, x);
    if (has_norm && p.is_norm_last) norm.apply<Width>(p, runs, lanes, !is_value, x);
    if (is_query) {
      Element* q = static_cast<Element*>(p.q) + (token * p.num_heads + head) * head_dim;
      store<Element, Width>(q, runs, x);
    } else if (is_written && head < all_heads) {
      const int64_t kv_head = head - p.num_heads - (is_value ? p.num_kv_heads : 0);
      const int64_t plane = block * 2 + (is_value ? 1 : 0);
      KvElement* out = static_cast<KvElement*>(p.kv) +
                       ((plane * p.num_kv_heads + kv_head) * p.block_size + offset) * head_dim;
      const float factor = __fdividef(1.0f, is_value ? p.value_scale : p.key_scale);
#pragma unroll
      for (int k = 0; k < kPairs; ++k) {
#pragma unroll
        for (int j = 0; j < Width; ++j) x[k][0][j] *= factor, x[k][1][j] *= factor;
      }
      store<KvElement, Width>(out, runs, x);
    }
  }
}

template <typename Element, typename KvElement>
cudaError_t launch_rope(const RopeParams& p, cudaStream_t stream) {
  const bool is_wide = p.rotary_dim % 16 == 0;  // both halves consist of runs of eight
  const int64_t most = is_wide ? p.head_dim / 16 : min(p.head_dim / 4, int64_t{kWarpSize});
  int lanes = 1;
  while (lanes < most) lanes *= 2;
  const int64_t all_heads = p.num_heads + 2 * p.num_kv_heads;
  const int64_t num_parts = ceil_divide<int64_t>(all_heads, kThreads / lanes * kHeads);
  const dim3 grid(unsigned(p.num_tokens), static_cast<unsigned>(num_parts));
  const auto kernel =
      is_wide ? rope_kernel<Element, KvElement, 8> : rope_kernel<Element, KvElement, 2>;
  return launch_dependent(kernel, grid, dim3(kThreads), 0, stream, p, lanes);
}

template <typename Element>
cudaError_t launch_type(const RopeParams& p, cudaStream_t stream) {
  return p.kv_type == Type::kFloat8 ? launch_rope<Element, fp8>(p, stream)
                                    : launch_rope<Element, Element>(p, stream);
}

}  // namespace

cudaError_t rope_kv_write(const RopeParams& p, cudaStream_t stream) {
  const bool fits = p.head_dim % 16 == 0 && p.head_dim >= 16 && p.head_dim <= 256 &&
                    p.rotary_dim % 4 == 0 && p.rotary_dim >= 0 && p.rotary_dim <= p.head_dim &&
                    p.block_size > 0 && p.num_blocks * p.block_size <= int64_t{UINT32_MAX};
  if (!fits || (p.kv_type != p.type && p.kv_type != Type::kFloat8)) return cudaErrorInvalidValue;
  if (p.num_tokens == 0) return cudaSuccess;
  return p.type == Type::kBfloat16 ? launch_type<bf16>(p, stream) : launch_type<fp16>(p, stream);
}

}  // namespace tgi::cuda
