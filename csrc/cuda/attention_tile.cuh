// What decode and prefill attention share: tiles of keys and values in shared memory, and sixteen
// query rows of a warp attending to one. Dao, FlashAttention-2, algorithm 1; the layout of
// fragments is in mma.cuh.
#pragma once

#include <cfloat>
#include <type_traits>

#include "async.cuh"
#include "kernels.h"
#include "mma.cuh"

namespace tgi::cuda {

constexpr int kRows = 16;  // of queries a warp

// A row of HeadDim 16-bit elements in shared memory: chunks of 16 bytes, whose order changes from
// row to row so that ldmatrix meets each bank once.
template <int HeadDim>
struct Row {
  static constexpr int kChunks = HeadDim / 8;
  static constexpr int kStride = (kChunks + 7) / 8 * 8;
  static __device__ __forceinline__ int at(int row, int chunk) {
    return row * kStride + (chunk ^ (row & 7));
  }
};

// The softmax of a warp's rows so far. A lane holds rows l / 4 and l / 4 + 8.
template <int HeadDim>
struct RowState {
  float out[HeadDim / 8][4];  // not yet divided; as mma's d
  float max[2];               // of scores in units of log 2
  float sum[2];               // of the lane's own columns

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

// Where one layer's cache has a head's keys and values.
template <typename Element, typename KvElement, int HeadDim>
struct Cache {
  static constexpr bool kIsSame = sizeof(KvElement) == 2;
  static constexpr int kCopies = HeadDim * int(sizeof(KvElement)) / 16;  // of 16 bytes a row

  const KvElement* head;  // of block 0
  int64_t block_stride;   // elements
  int64_t value_offset;

  __device__ __forceinline__ Cache(const AttentionParams& p, int64_t kv_head)
      : head(static_cast<const KvElement*>(p.kv) + kv_head * p.block_size * HeadDim),
        block_stride(2 * p.num_kv_heads * p.block_size * HeadDim),
        value_offset(p.num_kv_heads * p.block_size * HeadDim) {}

  // Where the keys of a token lie, in elements from `head`; its values are `value_offset` behind.
  __device__ __forceinline__ int64_t row_at(int64_t block, int64_t offset) const {
    return block * block_stride + offset * HeadDim;
  }

  // Starts to bring the i-th 16 bytes of the row at `at` (or zeros) into row `row` of a tile. A
  // cache of 8 bits is converted on the way, at once.
  __device__ __forceinline__ void bring(uint4* tile, int row, int i, int64_t at,
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

// 2^x in one instruction; what is less than the least normal number becomes 0.
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

// How products of queries and keys become scores in units of log 2.
struct Scores {
  float scale;
  float bound;  // of products, where scores have a soft cap: cap / scale; 0: none
  float rate;   // of 2^x in tanh
  bool has_slopes;
  float slope[2];  // of the lane's two rows; products grow by it with every position

  // The heads of the lane's two rows; a row that is nobody's may have any.
  __device__ __forceinline__ Scores(const AttentionParams& p, int64_t head, int64_t other_head)
      : scale(p.scale * p.key_scale * kLog2E), has_slopes(p.slopes != nullptr) {
    // Not as initialisers, which nvcc's host compiler sees.
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

// What a row's sums are multiplied by in the end. A sink has a weight and no value (Xiao et al.,
// Efficient Streaming Language Models with Attention Sinks, section 3; gpt-oss).
__device__ __forceinline__ float inverse_sum(const AttentionParams& p, int64_t head, float max,
                                             float sum) {
  if (p.sinks != nullptr) sum += exp2f(p.sinks[head] * kLog2E - max);  // infinite: nothing is left
  return __fdividef(p.value_scale, sum);
}

// Keys that a lane's two rows see: those in [first, stop), counted from the tile's first. A row's
// own position is the last of them.
struct Visible {
  int first[2];
  int stop[2];
};

// The warp's rows `queries` [16] attend to Keys keys and values.
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
  if (!is_all_visible) {  // of most tiles nothing is hidden: these are spared the comparisons
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
    largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 1));
    largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 2));
    largest = fmaxf(state.max[half], largest * scores.scale);   // scales are positive
    const float shift = largest == -INFINITY ? 0.0f : largest;  // nothing seen yet
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

// The sums of the lanes that share a row.
template <int HeadDim>
__device__ __forceinline__ void finish_sums(RowState<HeadDim>& state) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    state.sum[half] += __shfl_xor_sync(0xffffffffu, state.sum[half], 1);
    state.sum[half] += __shfl_xor_sync(0xffffffffu, state.sum[half], 2);
  }
}

// Calls body with the head size as a constant; false: there is no such kernel.
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
