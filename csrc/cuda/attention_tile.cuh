// Rows of keys and values in shared memory and what is done to scores, shared by decode and prefill
// attention; and prefill's attention of a warp's sixteen query rows to one tile (decode's is in
// attention_decode_tile.cuh). Dao, FlashAttention-2, algorithm 1; mma.cuh describes the layout of
// fragments.
#pragma once

#include <cfloat>
#include <type_traits>

#include "async.cuh"
#include "kernels.h"
#include "mma.cuh"

namespace tgi::cuda {

constexpr int kRows = 16;  // query rows per warp

// A row of HeadDim 16-bit elements in shared memory: chunks of 16 bytes, whose order changes from
// row to row so that ldmatrix accesses each bank once.
template <int HeadDim>
struct Row {
  static constexpr int kChunks = HeadDim / 8;
  static constexpr int kStride = (kChunks + 7) / 8 * 8;
  static __device__ __forceinline__ int at(int row, int chunk) {
    return row * kStride + (chunk ^ (row & 7));
  }
};

// The running softmax of a warp's rows. A lane holds rows l / 4 and l / 4 + 8.
template <int HeadDim>
struct RowState {
  float out[HeadDim / 8][4];  // not yet divided; laid out as mma's d
  float max[2];               // of scores in units of log 2
  float sum[2];               // over the lane's own columns

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < HeadDim / 8; ++i) {
#pragma unroll
      for (int k = 0; k < 4; ++k) out[i][k] = 0;
    }
    max[0] = max[1] = -INFINITY;
    sum[0] = sum[1] = 0;
  }
};

// The position of a head's keys and values in one layer's cache.
template <typename Element, typename KvElement, int HeadDim>
struct Cache {
  static constexpr bool kIsSame = sizeof(KvElement) == 2;
  static constexpr int kCopies = HeadDim * int(sizeof(KvElement)) / 16;  // 16-byte copies per row

  const KvElement* head;  // in block 0
  int64_t block_stride;   // elements
  int64_t value_offset;

  __device__ __forceinline__ Cache(const AttentionParams& p, int64_t kv_head)
      : head(static_cast<const KvElement*>(p.kv) + kv_head * p.block_size * HeadDim),
        block_stride(2 * p.num_kv_heads * p.block_size * HeadDim),
        value_offset(p.num_kv_heads * p.block_size * HeadDim) {}

  // Returns the offset of a token's keys from `head`, in elements; its values follow at
  // `value_offset`.
  __device__ __forceinline__ int64_t row_at(int64_t block, int64_t offset) const {
    return block * block_stride + offset * HeadDim;
  }

  // Starts copying the i-th 16 bytes of the row at `at` (or zeros) to row `row` of a tile. An 8-bit
  // cache is converted synchronously.
  __device__ __forceinline__ void start_copy(uint4* tile, int row, int i, int64_t at,
                                             bool is_valid) const {
    const KvElement* from = head + at + i * (16 / int(sizeof(KvElement)));
    if constexpr (kIsSame) {
      async_copy16(&tile[Row<HeadDim>::at(row, i)], from, is_valid);
    } else {
      const uint4 bytes = is_valid ? *reinterpret_cast<const uint4*>(from) : uint4{0, 0, 0, 0};
      const uint32_t words[4] = {bytes.x, bytes.y, bytes.z, bytes.w};
      uint32_t wide[8];
#pragma unroll
      for (int k = 0; k < 8; ++k) {
        const float2 pair = Pair<fp8>::unpack(uint16_t(words[k / 2] >> (16 * (k % 2))));
        wide[k] = Pair<Element>::pack(pair.x, pair.y);
      }
      tile[Row<HeadDim>::at(row, 2 * i)] = uint4{wide[0], wide[1], wide[2], wide[3]};
      tile[Row<HeadDim>::at(row, 2 * i + 1)] = uint4{wide[4], wide[5], wide[6], wide[7]};
    }
  }
};

constexpr float kLog2E = 1.4426950408889634f;

// Computes 2^x in one instruction; results below the smallest normal number become 0.
__device__ __forceinline__ float exp2_flushed(float x) {
#ifdef __CUDACC__
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(result) : "f"(x));
  return result;
#else
  const float result = exp2f(x);
  return result < FLT_MIN ? 0.0f : result;
#endif
}

// Converts products of queries and keys to scores in units of log 2.
struct Scores {
  float scale;
  float bound;  // of products, if scores have a soft cap: cap / scale; 0: none
  float rate;   // factor of the exponent of 2^x in tanh
  bool has_slopes;
  float slope[2];  // of the lane's two rows; added to products per position

  // The heads of the lane's two rows; an unused row may have any head.
  __device__ __forceinline__ Scores(const AttentionParams& p, int64_t head, int64_t other_head)
      : scale(p.scale * p.key_scale * kLog2E), has_slopes(p.slopes != nullptr) {
    // Not initialisers, because nvcc's host compiler would see those.
    bound = __fdividef(p.soft_cap * kLog2E, scale);
    rate = __fdividef(2.0f * scale, p.soft_cap);
    const float factor = __fdividef(kLog2E, scale);
    slope[0] = has_slopes ? p.slopes[min(head, p.num_heads - 1)] * factor : 0.0f;
    slope[1] = has_slopes ? p.slopes[min(other_head, p.num_heads - 1)] * factor : 0.0f;
  }

  // bound * tanh(product / bound): tanh(x) = 1 - 2 / (1 + e^2x). Gemma Team, Gemma 2, section 2.
  __device__ __forceinline__ float cap(float product) const {
    return bound - __fdividef(2.0f * bound, 1.0f + exp2_flushed(product * rate));
  }
};

// Returns the factor of a row's final sums; 0 for a row that sees no key. A sink has a weight but
// no value (Xiao et al., Efficient Streaming Language Models with Attention Sinks, section 3;
// gpt-oss).
__device__ __forceinline__ float inverse_sum(const AttentionParams& p, int64_t head, float max,
                                             float sum) {
  // if the sink's weight is infinite, the result is 0
  if (p.sinks != nullptr) sum += exp2f(p.sinks[head] * kLog2E - max);
  return sum > 0 ? __fdividef(p.value_scale, sum) : 0.0f;
}

// The keys that a lane's two rows see: those in [first, stop), counted from the tile's first key. A
// row's own position is stop - 1.
struct Visible {
  int first[2];
  int stop[2];
};

// Attends from the warp's rows `queries` [16] to `Keys` keys and values.
template <typename Element, int HeadDim, int Keys>
__device__ __forceinline__ void attend(RowState<HeadDim>& state, const uint4* queries,
                                       const uint4* keys, const uint4* values, const Scores& scores,
                                       bool is_all_visible, const Visible& visible) {
  using Tile = Row<HeadDim>;
  const int lane = int(threadIdx.x) % kWarpSize;
  float score[Keys / 8][4];
#pragma unroll
  for (int j = 0; j < Keys / 8; ++j) score[j][0] = score[j][1] = score[j][2] = score[j][3] = 0;
#pragma unroll(HeadDim <= 128 ? HeadDim / 16 : 2)  // 256: the sums leave no registers for addresses
  for (int k = 0; k < HeadDim / 16; ++k) {
    uint32_t a[4];
    load_matrix_x4(a, &queries[Tile::at(lane % 16, 2 * k + lane / 16)]);
#pragma unroll
    for (int j = 0; j < Keys / 16; ++j) {
      uint32_t b[4];
      load_matrix_x4(b, &keys[Tile::at(j * 16 + lane / 16 * 8 + lane % 8, 2 * k + lane / 8 % 2)]);
      mma_m16n8k16<Element>(score[2 * j], a, b[0], b[1]);
      mma_m16n8k16<Element>(score[2 * j + 1], a, b[2], b[3]);
    }
  }
  if (scores.bound != 0) {
#pragma unroll
    for (int j = 0; j < Keys / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) score[j][i] = scores.cap(score[j][i]);
    }
  }
  if (scores.has_slopes) {  // Press et al., Train Short, Test Long, section 3
#pragma unroll
    for (int j = 0; j < Keys / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int distance = j * 8 + lane % 4 * 2 + i % 2 - (visible.stop[i / 2] - 1);
        score[j][i] += scores.slope[i / 2] * float(distance);
      }
    }
  }
  if (!is_all_visible) {  // most tiles hide nothing and skip the comparisons
#pragma unroll
    for (int j = 0; j < Keys / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int key = j * 8 + lane % 4 * 2 + i % 2;
        if (key < visible.first[i / 2] || key >= visible.stop[i / 2]) score[j][i] = -INFINITY;
      }
    }
  }
  float correction[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float largest = -INFINITY;
#pragma unroll
    for (int j = 0; j < Keys / 8; ++j) {
#pragma unroll
      for (int i = 2 * half; i < 2 * half + 2; ++i) largest = fmaxf(largest, score[j][i]);
    }
    largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, 1));
    largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, 2));
    largest = fmaxf(state.max[half], largest * scores.scale);   // scales are positive
    const float shift = largest == -INFINITY ? 0.0f : largest;  // nothing visible yet
    correction[half] = exp2_flushed(state.max[half] - shift);
    state.max[half] = largest;
    float sum = state.sum[half] * correction[half];
#pragma unroll
    for (int j = 0; j < Keys / 8; ++j) {
#pragma unroll
      for (int i = 2 * half; i < 2 * half + 2; ++i) {
        score[j][i] = exp2_flushed(fmaf(score[j][i], scores.scale, -shift));
        sum += score[j][i];
      }
    }
    state.sum[half] = sum;
  }
#pragma unroll
  for (int i = 0; i < HeadDim / 8; ++i) {
#pragma unroll
    for (int k = 0; k < 4; ++k) state.out[i][k] *= correction[k / 2];
  }
#pragma unroll
  for (int j = 0; j < Keys / 16; ++j) {
    const uint32_t a[4] = {Pair<Element>::pack(score[2 * j][0], score[2 * j][1]),
                           Pair<Element>::pack(score[2 * j][2], score[2 * j][3]),
                           Pair<Element>::pack(score[2 * j + 1][0], score[2 * j + 1][1]),
                           Pair<Element>::pack(score[2 * j + 1][2], score[2 * j + 1][3])};
#pragma unroll
    for (int d = 0; d < HeadDim / 16; ++d) {
      uint32_t b[4];
      load_matrix_x4_transposed(
          b, &values[Tile::at(j * 16 + lane / 8 % 2 * 8 + lane % 8, 2 * d + lane / 16)]);
      mma_m16n8k16<Element>(state.out[2 * d], a, b[0], b[1]);
      mma_m16n8k16<Element>(state.out[2 * d + 1], a, b[2], b[3]);
    }
  }
}

// Adds up the sums of the lanes that share a row.
template <int HeadDim>
__device__ __forceinline__ void finish_sums(RowState<HeadDim>& state) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    state.sum[half] += __shfl_xor_sync(kAllLanes, state.sum[half], 1);
    state.sum[half] += __shfl_xor_sync(kAllLanes, state.sum[half], 2);
  }
}

// Calls body with the head size as a constant; returns cudaErrorInvalidValue if there is no such
// kernel.
template <typename Body>
cudaError_t for_head_dim(int64_t head_dim, const Body& body) {
  switch (head_dim) {
    case 64:
      return body(std::integral_constant<int, 64>());
    case 80:
      return body(std::integral_constant<int, 80>());
    case 96:
      return body(std::integral_constant<int, 96>());
    case 128:
      return body(std::integral_constant<int, 128>());
    case 256:
      return body(std::integral_constant<int, 256>());
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace tgi::cuda
