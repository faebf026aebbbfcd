// The attention of a block's query rows, which are the heads of one KV head, to one tile of keys
// and values. The warps share first its tokens, then the head dimensions:
//
//   warp w:  scores of tokens 16 w to 16 w + 15  -> maxima   | barrier
//            their weights                       -> weights  | barrier
//            sums of head dimensions [16 w, 16 w + 16) and so on, over all tokens of the tile
//
// So the sums of all tokens are in one place, and nothing has to be merged between warps. Scores
// are queries (16 rows of mma, of which up to eight may be unused) by keys; sums are values
// transposed by weights transposed, since a lane's scores are just what mma wants as its second
// operand.
#pragma once

#include "attention_tile.cuh"
#include "codes.cuh"

namespace tgi::cuda {

// Rows: 8 or 16, at least the number of query heads per KV head.
template <typename Element, typename KvElement, int HeadDim, int Rows>
struct DecodeTile {
  static constexpr int kWarps = HeadDim <= 128 ? 4 : 2;  // two tiles of 256 are within 99 KB
  static constexpr int kThreads = kWarps * kWarpSize;
  static constexpr int kTokens = 16 * kWarps;
  static constexpr int kHalves = Rows / 8;
  static constexpr int kSteps = HeadDim / 16;                    // of mma, along the head
  static constexpr int kParts = (kSteps + kWarps - 1) / kWarps;  // 16 head dimensions each
  static constexpr bool kIs8Bit = sizeof(KvElement) == 1;
  // E4M3 is exact in float16, and becomes it in one instruction; bfloat16 takes four.
  using Operand = std::conditional_t<kIs8Bit, fp16, Element>;
  using QueryRow = Row<HeadDim>;
  using KvRow = Row<HeadDim* int(sizeof(KvElement)) / 2>;
  static constexpr int kKeyChunks = kTokens * KvRow::kStride;  // of 16 bytes; values follow
  static constexpr int kStageChunks = 2 * kKeyChunks;

  struct Shared {
    uint4 tiles[2 * kStageChunks];
    uint4 queries[2][Rows * QueryRow::kStride];
    uint2 weights[kHalves][kWarps][kWarpSize];  // as mma's second operand
    float maxima[kWarps][Rows];
    float sums[kWarps][Rows];
  };
  static_assert(sizeof(Shared) <= 99 << 10);

  uint32_t queries[kSteps][2 * kHalves];  // as mma's first operand
  float out[kParts][kHalves][4];          // not yet divided: [head dimension, row] as mma's d
  float max[kHalves];                     // of lane / 4 and that + 8, in units of log 2
  float sum[kHalves];                     // over the lane's own columns

  // Returns the place of a chunk of a row of keys or values, from the place of chunk `low` of that
  // row, if low + chunk is low | chunk. This is Row::at in one instruction, and since the place of
  // the stage is within, the compiler keeps no register for each chunk.
  static __device__ __forceinline__ int move_on(int place_of_low, int chunk) {
    return (place_of_low ^ (chunk & 7)) + (chunk & ~7);
  }

  static __device__ __forceinline__ int warp() { return int(threadIdx.x) / kWarpSize; }
  static __device__ __forceinline__ int lane() { return int(threadIdx.x) % kWarpSize; }

  // Widens four 8-bit floats.
  static __device__ __forceinline__ void widen(uint32_t bytes, uint32_t& first, uint32_t& second) {
#if __CUDA_ARCH__ >= 890
    const auto widen_two = [](uint32_t two) {
      const __half2_raw pair = __nv_cvt_fp8x2_to_halfraw2(uint16_t(two), __NV_E4M3);
      return *reinterpret_cast<const uint32_t*>(&pair);
    };
    first = widen_two(bytes);
    second = widen_two(bytes >> 16);
#else
    // Float16 has one more bit of exponent, whose bias is larger by 8. NaN is read as 480.
    const auto widen_two = [&](uint32_t selector) {
      const uint32_t top = pick_bytes(bytes, 0, selector);
      const uint32_t pair = (top & 0x80008000u) | (top >> 1 & 0x3f803f80u);
      return multiply_pairs<fp16>(pair, 0x5c005c00u);  // 2^8
    };
    first = widen_two(0x1404);
    second = widen_two(0x3424);
#endif
  }

  // Begins with a new item, whose queries are in `rows`.
  __device__ __forceinline__ void begin(const uint4* rows) {
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
        const int row = lane() / 4 + 8 * half, column = lane() % 4;
        if constexpr (kIs8Bit) {
          // A lane of ldmatrix receives four adjacent 8-bit keys, so four adjacent elements of the
          // queries have their two places in mma.
          const auto* chunk =
              reinterpret_cast<const uint2*>(&rows[QueryRow::at(row, 2 * k + column / 2)]);
          const uint2 four = chunk[column % 2];
          queries[k][half] = to_operand(four.x);
          queries[k][kHalves + half] = to_operand(four.y);
        } else {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const auto* chunk =
                reinterpret_cast<const uint32_t*>(&rows[QueryRow::at(row, 2 * k + i)]);
            queries[k][i * kHalves + half] = chunk[column];
          }
        }
      }
    }
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
#pragma unroll
        for (int i = 0; i < 4; ++i) out[part][half][i] = 0;
      }
    }
#pragma unroll
    for (int half = 0; half < kHalves; ++half) max[half] = -INFINITY, sum[half] = 0;
  }

  static __device__ __forceinline__ uint32_t to_operand(uint32_t pair) {
    if constexpr (std::is_same_v<Element, Operand>) {
      return pair;
    } else {  // bfloat16 has larger numbers than float16; no query is near them
      const float2 two = Pair<Element>::unpack(pair);
      return Pair<Operand>::pack(fminf(fmaxf(two.x, -65504.0f), 65504.0f),
                                 fminf(fmaxf(two.y, -65504.0f), 65504.0f));
    }
  }

  // Attends to the tile in a stage. The warp's own tokens are visible from `first` to
  // `stop`, counted from its first token; with slopes, the query's own position is `stop` - 1. The
  // sums are stored if the tile is the item's last. All threads must have passed a barrier since
  // the last call.
  __device__ __forceinline__ void attend(Shared& shared, int stage, const Scores& scores, int first,
                                         int stop, bool is_last) {
    float score[2][4] = {};  // of eight tokens each
    multiply_keys(shared.tiles, stage * kStageChunks, score);
    adjust(score, scores, first, stop);
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      float largest = fmaxf(fmaxf(score[0][2 * half], score[0][2 * half + 1]),
                            fmaxf(score[1][2 * half], score[1][2 * half + 1]));
      largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, 1));
      largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, 2));
      if (lane() % 4 == 0)
        shared.maxima[warp()][lane() / 4 + 8 * half] = largest * scores.scale;  // positive
    }
    __syncthreads();  // the maxima are there
    float correction[kHalves];
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      const int row = lane() / 4 + 8 * half;
      float largest = max[half];
#pragma unroll
      for (int i = 0; i < kWarps; ++i) largest = fmaxf(largest, shared.maxima[i][row]);
      const float shift = largest == -INFINITY ? 0.0f : largest;  // nothing visible yet
      correction[half] = exp2_flushed(max[half] - shift);
      max[half] = largest;
      sum[half] *= correction[half];
      uint32_t words[2];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const float a = exp2_flushed(fmaf(score[j][2 * half], scores.scale, -shift));
        const float b = exp2_flushed(fmaf(score[j][2 * half + 1], scores.scale, -shift));
        sum[half] += a + b;
        words[j] = Pair<Operand>::pack(a, b);
      }
      shared.weights[half][warp()][lane()] = uint2{words[0], words[1]};
      if (is_last) {
        float total = sum[half];
        total += __shfl_xor_sync(kAllLanes, total, 1);
        total += __shfl_xor_sync(kAllLanes, total, 2);
        if (lane() % 4 == 0) shared.sums[warp()][row] = total;
      }
    }
    __syncthreads();  // the weights are there
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      // a column of `out` is a row of the scores: the lanes 4 row to 4 row + 3 have its factor
      const float even = __shfl_sync(kAllLanes, correction[half], lane() % 4 * 8);
      const float odd = __shfl_sync(kAllLanes, correction[half], lane() % 4 * 8 + 4);
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        out[part][half][0] *= even, out[part][half][2] *= even;
        out[part][half][1] *= odd, out[part][half][3] *= odd;
      }
    }
    multiply_values(shared, stage * kStageChunks + kKeyChunks);
  }

  __device__ __forceinline__ void multiply_keys(const uint4* tiles, int keys,
                                                float (&score)[2][4]) const {
    float other[2][4] = {};  // of every second step: mma waits for its own sum
    const auto multiply = [&](int k, int j, uint32_t b0, uint32_t b1) {
      uint32_t a[4] = {};
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int half = 0; half < kHalves; ++half) a[2 * i + half] = queries[k][i * kHalves + half];
      }
      mma_m16n8k16<Operand>(k % 2 == 0 ? score[j] : other[j], a, b0, b1);
    };
    const int row = 16 * warp() + lane() / 16 * 8 + lane() % 8, column = lane() / 8 % 2;
    const int place = keys + KvRow::at(row, column);
    uint32_t b[4];
    if constexpr (kIs8Bit) {
#pragma unroll
      for (int k = 0; k < kSteps; k += 2) {
        const bool is_half = k + 1 == kSteps;  // has one chunk
        load_matrix_x4(b, &tiles[move_on(is_half ? keys + KvRow::at(row, 0) : place, k)]);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (i % 2 == 1 && is_half) continue;
          uint32_t first, second;
          widen(b[i], first, second);
          multiply(k + i % 2, i / 2, first, second);
        }
      }
    } else {
#pragma unroll
      for (int k = 0; k < kSteps; ++k) {
        load_matrix_x4(b, &tiles[move_on(place, 2 * k)]);
        multiply(k, 0, b[0], b[1]);
        multiply(k, 1, b[2], b[3]);
      }
    }
#pragma unroll
    for (int j = 0; j < 2; ++j) {
#pragma unroll
      for (int i = 0; i < 2 * kHalves; ++i) score[j][i] += other[j][i];
    }
  }

  // Applies the cap, the slopes and the mask to products.
  static __device__ __forceinline__ void adjust(float (&score)[2][4], const Scores& scores,
                                                int first, int stop) {
    const auto for_each = [&](const auto& body) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
#pragma unroll
        for (int i = 0; i < 2 * kHalves; ++i)
          body(score[j][i], i / 2, 8 * j + lane() % 4 * 2 + i % 2);
      }
    };
    if (scores.bound != 0) for_each([&](float& x, int, int) { x = scores.cap(x); });
    if (scores.has_slopes) {  // Press et al., Train Short, Test Long, section 3
      for_each(
          [&](float& x, int half, int key) { x += scores.slope[half] * float(key - (stop - 1)); });
    }
    if (first > 0 || stop < 16) {  // most tiles hide nothing
      for_each([&](float& x, int, int key) {
        if (key < first || key >= stop) x = -INFINITY;
      });
    }
  }

  __device__ __forceinline__ void multiply_values(const Shared& shared, int values) {
    uint32_t a[2][4];
    const auto multiply = [&](int part, int step, const uint32_t (&a)[4]) {
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
        const uint2 b = shared.weights[half][step][lane()];
        mma_m16n8k16<Operand>(out[part][half], a, b.x, b.y);
      }
    };
    const int place =
        values + (kIs8Bit ? KvRow::at(lane(), warp())
                          : KvRow::at(lane() / 16 * 8 + lane() % 8, 2 * warp() + lane() / 8 % 2));
#pragma unroll
    for (int step = 0; step < kWarps; step += 2) {  // of 16 tokens
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        if (kSteps % kWarps != 0 && part * kWarps + warp() >= kSteps) continue;
        const uint4* at = &shared.tiles[move_on(place, (kIs8Bit ? 1 : 2) * part * kWarps) +
                                        16 * step * KvRow::kStride];
        if constexpr (kIs8Bit) {
          uint32_t bytes[4];  // of two tokens and two head dimensions
          load_matrix_x4_transposed(bytes, at);
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const uint32_t by_dimension = pick_bytes(bytes[i], 0, 0x3120);
            widen(by_dimension, a[i / 2][i % 2 * 2], a[i / 2][i % 2 * 2 + 1]);
          }
        } else {
          load_matrix_x4_transposed(a[0], at);
          load_matrix_x4_transposed(a[1], at + 16 * KvRow::kStride);
        }
        multiply(part, step, a[0]);
        multiply(part, step + 1, a[1]);
      }
    }
  }

  // Calls store(row, head dimension, sum) for the sums of the warp's head dimensions.
  template <typename Store>
  __device__ __forceinline__ void for_each_sum(const Store& store) const {
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      const int at = part * kWarps + warp();
      if (kSteps % kWarps != 0 && at >= kSteps) continue;
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int within = kIs8Bit ? lane() / 4 * 2 + i / 2 : lane() / 4 + i / 2 * 8;
          store(8 * half + lane() % 4 * 2 + i % 2, 16 * at + within, out[part][half][i]);
        }
      }
    }
  }
};

}  // namespace tgi::cuda
