// Products with quantised weights, directly from the codes, for tens of tokens at most.
//
// A weight is scale * (code - zero) + offset, with one scale (and offset) per group of columns. Its
// code minus the zero point is exact in 16 bits, so tensor cores multiply codes, and the scale is
// applied in float32 to the sum over a group. The offset is applied to the sum of the activations,
// which is the product with a row of ones.
//
// The lower bound is the size of codes and scales over the memory bandwidth: 28672 x 4096 codes of
// 4 bits are 59 MB and 15 us at 4 TB/s, less time than L2 takes to deliver 8 tokens to each 16
// rows. A block therefore has many rows, and its warps share the activations in shared memory: each
// computes some rows, over a part of the columns. The sums of the parts are added in their order.
// It and the order of all additions depend only on the shape of the weights: a token has the same
// bits in any batch. Rounding does not depend on the compiler either: fused operations are
// explicit.
//
// As in linear.cu, rows of weights are the 16-row operand of mma and tokens the 8-wide one, and
// both have their columns in the same order in registers, not that of mma's layout. Lane l takes
// word l % 4 of 16 bytes of a row's codes, which lie in one group:
//
//   4 bits: codes 0 to 7 of the word as pairs (0, 4) (1, 5) | (2, 6) (3, 7): two mma
//   8 bits: codes 0 to 3 as pairs (0, 1) (2, 3): one mma
#pragma once

#include "async.cuh"
#include "codes.cuh"
#include "mma.cuh"

namespace tgi::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kPieces = 4;           // of a step: 16 bytes of each row's codes
constexpr int kMaxBytes = 99 << 10;  // of shared memory: what sm_86, 89 and 120 have per block
constexpr int kMaxStages = 6;

// How a block's warps divide its work. Matrices of many rows have tall blocks, which read fewer
// activations; those of fewer rows, flat ones, of which there are enough for all multiprocessors.
struct Tall {
  static constexpr int kParts = 2;     // of the columns
  static constexpr int kRowTiles = 2;  // of 16 rows, per warp
};
struct Flat {
  static constexpr int kParts = 4;
  static constexpr int kRowTiles = 1;
};
constexpr int64_t kMinTallRows = 8192;

// A block's part of the output and its queue. A stage has codes, [warp][row tile,
// half][row][piece], then activations, [part][piece][token] of 16 bytes' columns of codes.
template <typename Code, typename Shape, int Tokens>
struct Tile {
  static constexpr int kParts = Shape::kParts;
  static constexpr int kRowTiles = Shape::kRowTiles;
  static constexpr int kRowWarps = kWarps / kParts;
  static constexpr int kWarpRows = 16 * kRowTiles;
  static constexpr int kRows = kRowWarps * kWarpRows;
  static constexpr int kTokens = Tokens;
  static constexpr int kTokenTiles = Tokens / 8;
  static constexpr int kPieceColumns = kStep<Code>;
  static constexpr int kStepColumns = kPieces * kPieceColumns;
  // Its sums leave no registers for offsets ahead of their steps, which are long enough to wait
  // for.
  static constexpr bool kIsLarge = kRowTiles * kTokenTiles == 8;
  static constexpr int kChunks = kPieceColumns / 8;  // of 16 bytes of a piece's activations
  static constexpr int kWarpSlots = 64 * kRowTiles;  // of 16 bytes
  static constexpr int kCodeSlots = kWarps * kWarpSlots;
  static constexpr int kPieceSlots = Tokens * kChunks;
  static constexpr int kPartSlots = kPieces * kPieceSlots;
  static constexpr int kValueSlots = kParts * kPartSlots;
  static constexpr int kSlots = kCodeSlots + kValueSlots;
  static constexpr int kPlainSums = kParts * kPieces * Tokens;  // of a step's activations
  static constexpr int kPlainBytes = 2 * kPlainSums * 4;
  static constexpr int kMost = (kMaxBytes - kPlainBytes) / (kSlots * 16);
  static constexpr int kStages = kMost < kMaxStages ? kMost : kMaxStages;
  // Pieces of a step multiplied without a branch. Of large tiles the compiler would load ahead more
  // of them than registers hold.
  template <int Run>
  static constexpr int kUnrolled =
      kRowTiles * kTokenTiles < (Run == 1 ? 4 : 8) ? kPieces : 2 / kRowTiles;
  static constexpr int kQueueBytes = kStages * kSlots * 16;
  static constexpr int kBytes = kQueueBytes + kPlainBytes;
  static constexpr int kSumStride = kRows + 4;  // lanes that write sums access each bank once
  static_assert(kStages >= 2 && kParts * Tokens * kSumStride * 4 <= kQueueBytes);
};

// Sums of a warp, laid out as mma's d.
template <typename T>
struct Sums {
  float at[T::kRowTiles][T::kTokenTiles][4];
};

// The scales or the offsets of the next four groups of a row: as many steps as pieces have the same
// group (Run). A lane has those of group lane % 4 and rows l / 4 + 8 i, as stored: a conversion
// next to the load would wait for it. One load per step would reach as many cache lines for a
// quarter of the use, and a step would be too short for its latency.
template <typename T, int Run>
struct Groups {
  uint32_t at[2 * T::kRowTiles];

  // Returns those of a piece of a step.
  template <typename Code>
  __device__ __forceinline__ float get(const QuantMatrix& m, int i, int step, int piece) const {
    const int from =
        (int(threadIdx.x) % kWarpSize & ~3) | (step % Run * (kPieces / Run) + piece / Run);
    const uint32_t bits = __shfl_sync(0xffffffffu, at[i], from);
    if constexpr (std::is_same_v<Code, E2M1>) return to_float(e8m0{uint8_t(bits)});
    return m.has_wide_scales ? __uint_as_float(bits) : to_float(fp16{uint16_t(bits)});
  }
};

// A thread's copies of a block's operands, step by step.
template <typename Element, typename Code, typename T, int Run>
class Source {
 public:
  __device__ __forceinline__ Source(const QuantLinearParams& p, int64_t first_row,
                                    int64_t first_token, uint4* queue)
      : m_(p.weight), end_byte_(int(m_.num_columns) * Code::kBits / 8) {
    const auto thread = int(threadIdx.x);
    const int warp = thread / kWarpSize, lane = thread % kWarpSize, part = warp % T::kParts;
    const int64_t row = first_row + warp / T::kParts * T::kWarpRows + lane / 4;
    rows_left_ = int(m_.num_rows - row);
    byte_ = (part * kPieces + lane % 4) * 16;
    codes_ = static_cast<const uint8_t*>(m_.codes) + row * end_byte_ + byte_;
    // Within 8 rows, slots are permuted so that both these writes and ldmatrix access each bank
    // once.
    code_out_ = queue + warp * T::kWarpSlots + lane / 4 * 4 + (lane % 4 ^ lane / 8);
    const int token = thread % T::kPieceSlots / T::kChunks;
    const int column = thread / T::kPieceSlots * T::kPieceColumns + thread % T::kChunks * 8;
    values_ = static_cast<const Element*>(p.a) + (first_token + token) * m_.num_columns + column;
    columns_left_ = first_token + token < p.num_tokens ? int(m_.num_columns) - column : 0;
    value_out_ = queue + T::kCodeSlots + thread;
    // A piece's group is found by multiplication: exact for fewer than 2^16 pieces per row.
    const uint32_t pieces = uint32_t(m_.group) / T::kPieceColumns;
    reciprocal_ = pieces == 1 ? 0 : 0xffffffffu / pieces + 1;
    num_groups_ = int(divide_narrow(m_.num_columns, m_.group));
    first_place_ = int(row) * num_groups_;
  }

  __device__ __forceinline__ int num_steps() const {
    return ceil_divide(end_byte_, T::kParts * kPieces * 16);
  }

  // Copies 16 bytes of each row of the next step to a stage.
  __device__ __forceinline__ void copy_codes(int stage) {
#pragma unroll
    for (int k = 0; k < 2 * T::kRowTiles; ++k) {
      async_copy16(code_out_ + stage * T::kSlots + k * kWarpSize,
                   codes_ + int64_t{k} * 8 * end_byte_, byte_ < end_byte_ && k * 8 < rows_left_);
    }
    codes_ += T::kParts * kPieces * 16;
    byte_ += T::kParts * kPieces * 16;
  }

  // Copies activations of the next step to a stage.
  __device__ __forceinline__ void copy_values(int stage) {
    constexpr int kColumns = kThreads / T::kPieceSlots * T::kPieceColumns;
    static_assert(kThreads % T::kPieceSlots == 0);
#pragma unroll
    for (int k = 0; k < ceil_divide(T::kValueSlots, kThreads); ++k) {
      if (T::kValueSlots < kThreads && int(threadIdx.x) >= T::kValueSlots) break;
      async_copy16(value_out_ + stage * T::kSlots + k * kThreads, values_ + k * kColumns,
                   k * kColumns < columns_left_);
    }
    values_ += T::kParts * T::kStepColumns;
    columns_left_ -= T::kParts * T::kStepColumns;
  }

  // Loads the scales of Run steps from this one on. Past the end they are those of the last group.
  __device__ __forceinline__ void load_scales(int step, Groups<T, Run>& out) const {
    load_groups(m_.scales, place_of(step), out);
  }

  // The same for offsets.
  __device__ __forceinline__ void load_offsets(int step, Groups<T, Run>& out) const {
    load_groups(m_.offsets, place_of(step), out);
  }

 private:
  // Returns the place of the group that a lane loads of Run steps.
  __device__ __forceinline__ int place_of(int step) const {
    constexpr int kStepGroups = kPieces / Run;
    const int lane = int(threadIdx.x) % kWarpSize, part = int(threadIdx.x) / kWarpSize % T::kParts;
    const int own_step = step + lane % 4 / kStepGroups;
    const int piece = (own_step * T::kParts + part) * kPieces + lane % kStepGroups * Run;
    const int group = reciprocal_ == 0 ? piece : int(__umulhi(uint32_t(piece), reciprocal_));
    return first_place_ + min(group, num_groups_ - 1);
  }

  __device__ __forceinline__ void load_groups(const void* from, int place,
                                              Groups<T, Run>& out) const {
    if constexpr (std::is_same_v<Code, E2M1>) {
      load_groups_of(static_cast<const uint8_t*>(from), place, out);
    } else if (m_.has_wide_scales) {
      load_groups_of(static_cast<const uint32_t*>(from), place, out);
    } else {
      load_groups_of(static_cast<const uint16_t*>(from), place, out);
    }
  }

  template <typename Bits>
  __device__ __forceinline__ void load_groups_of(const Bits* from, int place,
                                                 Groups<T, Run>& out) const {
#pragma unroll
    for (int k = 0; k < 2 * T::kRowTiles; ++k) {
      out.at[k] = k * 8 < rows_left_ ? from[int64_t{place} + k * 8 * num_groups_] : 0;
    }
  }

  const QuantMatrix& m_;
  const uint8_t* codes_;
  const Element* values_;
  uint4 *code_out_, *value_out_;
  int end_byte_, byte_;  // of a row's codes
  int columns_left_, rows_left_;
  int num_groups_, first_place_;
  uint32_t reciprocal_;
};

// Reads a token tile's activations of a piece in the order of the codes' pairs.
template <typename T>
__device__ __forceinline__ void read_values(const uint4* piece, int token_tile,
                                            uint32_t (&out)[T::kChunks]) {
  const int place = token_tile * kWarpSize + int(threadIdx.x) % kWarpSize;
  if constexpr (T::kChunks == 4) {
    const uint4 words = piece[place];
    out[0] = pick_bytes(words.x, words.z, 0x5410u), out[1] = pick_bytes(words.x, words.z, 0x7632u);
    out[2] = pick_bytes(words.y, words.w, 0x5410u), out[3] = pick_bytes(words.y, words.w, 0x7632u);
  } else {
    const uint2 words = reinterpret_cast<const uint2*>(piece)[place];
    out[0] = words.x, out[1] = words.y;
  }
}

// Writes the sums of a step's activations over each group, [last piece][token], of this warp's
// token tiles. They are the product with rows of ones.
template <typename Element, typename T, int Run>
__device__ __forceinline__ void sum_values(const uint4* values, float* out) {
  constexpr uint32_t kOne = std::is_same_v<Element, bf16> ? 0x3f803f80u : 0x3c003c00u;
  constexpr uint32_t kOnes[4] = {kOne, kOne, kOne, kOne};
  const int lane = int(threadIdx.x) % kWarpSize;
  for (int j = int(threadIdx.x) / kWarpSize / T::kParts; j < T::kTokenTiles; j += T::kRowWarps) {
    float sums[4] = {};
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
      const uint4* from = values + piece * T::kPieceSlots;
      if constexpr (T::kChunks == 4) {
        const uint4 words = from[j * kWarpSize + lane];
        mma_m16n8k16<Element>(sums, kOnes, words.x, words.y);
        mma_m16n8k16<Element>(sums, kOnes, words.z, words.w);
      } else {
        const uint2 words = reinterpret_cast<const uint2*>(from)[j * kWarpSize + lane];
        mma_m16n8k16<Element>(sums, kOnes, words.x, words.y);
      }
      if ((piece + 1) % Run != 0) continue;
      if (lane < 4) {  // they have row 0 of d, and all rows are the same
        *reinterpret_cast<float2*>(out + piece * T::kTokens + j * 8 + lane * 2) =
            float2{sums[0], sums[1]};
      }
#pragma unroll
      for (float& sum : sums) sum = 0;
    }
  }
}

// Multiplies a step. Run: pieces of one group, after which its scale is applied.
template <typename Element, typename Code, typename T, int Run>
__device__ __forceinline__ void multiply(const uint4* stage, const uint4* values,
                                         const QuantMatrix& m, uint32_t shift,
                                         const Groups<T, Run>& scales, int step, Sums<T>& sums) {
  constexpr int kHalves = 2 * T::kRowTiles;  // of 8 rows
  constexpr int kLoaded = 4 / kHalves;       // pieces per ldmatrix
  const int warp = int(threadIdx.x) / kWarpSize, lane = int(threadIdx.x) % kWarpSize;
  const int row = lane % 8, half = lane / 8 % kHalves, ahead = lane / 8 / kHalves;
  const uint4* codes = stage + warp * T::kWarpSlots + half * kWarpSize + row * 4;
  Sums<T> products = {};
  uint32_t words[4];  // [piece][half]
#pragma unroll(T::template kUnrolled<Run>)
  for (int piece = 0; piece < kPieces; ++piece) {
    if (piece % kLoaded == 0) load_matrix_x4(words, codes + (ahead ^ row / 2 ^ piece));
    uint32_t weights[kHalves][T::kChunks];
#pragma unroll
    for (int k = 0; k < kHalves; ++k) {
      Code::template operands<Element>(words[piece % kLoaded * kHalves + k], shift, weights[k]);
    }
#pragma unroll
    for (int j = 0; j < T::kTokenTiles; ++j) {
      uint32_t b[T::kChunks];
      read_values<T>(values + piece * T::kPieceSlots, j, b);
#pragma unroll
      for (int k = 0; k < T::kChunks; k += 2) {
#pragma unroll
        for (int i = 0; i < T::kRowTiles; ++i) {
          const uint32_t a[4] = {weights[2 * i][k], weights[2 * i + 1][k], weights[2 * i][k + 1],
                                 weights[2 * i + 1][k + 1]};
          mma_m16n8k16<Element>(products.at[i][j], a, b[k], b[k + 1]);
        }
      }
    }
    if ((piece + 1) % Run != 0) continue;
#pragma unroll
    for (int k = 0; k < kHalves; ++k) {
      const float scale = scales.template get<Code>(m, k, step, piece);
#pragma unroll
      for (int j = 0; j < T::kTokenTiles; ++j) {
#pragma unroll
        for (int i = k % 2 * 2; i < k % 2 * 2 + 2; ++i) {
          float& sum = sums.at[k / 2][j][i];
          sum = fmaf(scale, products.at[k / 2][j][i], sum);
          products.at[k / 2][j][i] = 0;
        }
      }
    }
  }
}

// Adds offsets times the sums of a step's activations.
template <typename Code, typename T, int Run>
__device__ __forceinline__ void add_offsets(const float* plain, const QuantMatrix& m,
                                            const Groups<T, Run>& offsets, int step,
                                            Sums<T>& sums) {
  const int lane = int(threadIdx.x) % kWarpSize;
#pragma unroll
  for (int piece = Run - 1; piece < kPieces; piece += Run) {
    float offset[2 * T::kRowTiles];
#pragma unroll
    for (int k = 0; k < 2 * T::kRowTiles; ++k)
      offset[k] = offsets.template get<Code>(m, k, step, piece);
#pragma unroll
    for (int j = 0; j < T::kTokenTiles; ++j) {
      const float2 two =
          *reinterpret_cast<const float2*>(plain + piece * T::kTokens + j * 8 + lane % 4 * 2);
#pragma unroll
      for (int k = 0; k < 2 * T::kRowTiles; ++k) {
        float* sum = &sums.at[k / 2][j][k % 2 * 2];
        sum[0] = fmaf(offset[k], two.x, sum[0]);
        sum[1] = fmaf(offset[k], two.y, sum[1]);
      }
    }
  }
}

// Computes a block's part of the sums. When it returns, no thread reads the queue any more.
template <typename Element, typename Code, typename T, int Run>
__device__ __forceinline__ void multiply_columns(const QuantLinearParams& p, int64_t first_row,
                                                 int64_t first_token, uint4* queue, Sums<T>& sums) {
  Source<Element, Code, T, Run> source(p, first_row, first_token, queue);
  const int num_steps = source.num_steps();
  const uint32_t shift = Code::template shift<Element>(p.weight.zero);
  const bool has_offsets = Code::kHasOffsets && p.weight.offsets != nullptr;
  const int part = int(threadIdx.x) / kWarpSize % T::kParts;
  auto* plain =
      reinterpret_cast<float*>(queue + T::kStages * T::kSlots) + part * (kPieces * T::kTokens);
  const auto plain_of = [&](int step) { return plain + step % 2 * T::kPlainSums; };
  Groups<T, Run> scales, offsets = {}, next_scales, next_offsets = {};
  allow_next_kernel();
  // Weights are never written, so their first copies start before the previous kernel has ended.
#pragma unroll
  for (int i = 0; i < T::kStages - 1; ++i) {
    if (i < num_steps) source.copy_codes(i);
  }
  source.load_scales(0, next_scales);
  if (has_offsets && !T::kIsLarge) source.load_offsets(0, next_offsets);
  wait_for_previous_kernel();
#pragma unroll
  for (int i = 0; i < T::kStages - 1; ++i) {
    if (i < num_steps) source.copy_values(i);
    async_commit();
  }
  int stage = 0;
  for (int i = 0; i < num_steps; ++i) {
    async_wait<T::kStages - 2>();
    __syncthreads();  // all see the stage, and none reads the one that is overwritten
    if (i + T::kStages - 1 < num_steps) {
      const int free_stage = stage == 0 ? T::kStages - 1 : stage - 1;
      source.copy_codes(free_stage);
      source.copy_values(free_stage);
    }
    async_commit();
    if (has_offsets && i > 0)
      add_offsets<Code, T, Run>(plain_of(i - 1), p.weight, offsets, i - 1, sums);
    if (i % Run == 0) {
      scales = next_scales;
      source.load_scales(i + Run, next_scales);
      if (has_offsets && T::kIsLarge) {
        source.load_offsets(i, offsets);
      } else if (has_offsets) {
        offsets = next_offsets;
        source.load_offsets(i + Run, next_offsets);
      }
    }
    const uint4* values = queue + stage * T::kSlots + T::kCodeSlots + part * T::kPartSlots;
    if (has_offsets) sum_values<Element, T, Run>(values, plain_of(i));
    multiply<Element, Code, T, Run>(queue + stage * T::kSlots, values, p.weight, shift, scales, i,
                                    sums);
    stage = stage + 1 == T::kStages ? 0 : stage + 1;
  }
  async_wait<0>();
  __syncthreads();
  if (has_offsets)
    add_offsets<Code, T, Run>(plain_of(num_steps - 1), p.weight, offsets, num_steps - 1, sums);
}

// Writes the warp's sums to shared memory: [part][token][row].
template <typename T, int Tokens>
__device__ __forceinline__ void store_sums(const Sums<T>& sums, float* shared) {
  const int warp = int(threadIdx.x) / kWarpSize, lane = int(threadIdx.x) % kWarpSize;
  const int part = warp % T::kParts, first = warp / T::kParts * T::kWarpRows;
#pragma unroll
  for (int i = 0; i < T::kRowTiles; ++i) {
#pragma unroll
    for (int j = 0; j < T::kTokenTiles; ++j) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int row = first + i * 16 + lane / 4 + k / 2 * 8, token = j * 8 + lane % 4 * 2 + k % 2;
        shared[(part * Tokens + token) * T::kSumStride + row] = sums.at[i][j][k];
      }
    }
  }
}

template <typename Element, typename Code, typename Shape, int Tokens, int Run>
__global__ void __launch_bounds__(kThreads, 2) quant_linear_kernel(QuantLinearParams p) {
  using T = Tile<Code, Shape, Tokens>;
  DYNAMIC_SHARED(uint4, queue);  // stages; then the sums
  // Blocks that share rows are adjacent, so all but the first find the codes in L2.
  const int64_t token_tiles = ceil_divide<int64_t>(p.num_tokens, Tokens);
  const int64_t row_tile = divide_narrow(blockIdx.x, token_tiles);
  const int64_t first_token = (blockIdx.x - row_tile * token_tiles) * Tokens;
  const int64_t first_row = row_tile * T::kRows;
  Sums<T> sums = {};
  multiply_columns<Element, Code, T, Run>(p, first_row, first_token, queue, sums);
  auto* shared = reinterpret_cast<float*>(queue);
  store_sums<T, Tokens>(sums, shared);
  __syncthreads();
  for (int i = int(threadIdx.x); i < Tokens * T::kRows; i += kThreads) {
    const int64_t token = first_token + i / T::kRows, row = first_row + i % T::kRows;
    if (token >= p.num_tokens || row >= p.weight.num_rows) continue;
    float sum = 0;
#pragma unroll
    for (int part = 0; part < T::kParts; ++part) {
      sum += shared[(part * Tokens + i / T::kRows) * T::kSumStride + i % T::kRows];
    }
    if (p.bias != nullptr) sum += p.bias[row];
    const int64_t place = token * p.weight.num_rows + row;
    if (p.is_wide) {
      static_cast<float*>(p.out)[place] = sum;
    } else {
      static_cast<Element*>(p.out)[place] = Element{uint16_t(Pair<Element>::pack(sum, 0.0f))};
    }
  }
}

template <typename Element, typename Code, typename Shape, int Tokens>
cudaError_t launch_tile(const QuantLinearParams& p, cudaStream_t stream) {
  using T = Tile<Code, Shape, Tokens>;
  const bool is_long = p.weight.group % (Code::kLongRun * T::kPieceColumns) == 0;
  const auto kernel = is_long ? quant_linear_kernel<Element, Code, Shape, Tokens, Code::kLongRun>
                              : quant_linear_kernel<Element, Code, Shape, Tokens, 1>;
  const int64_t blocks = ceil_divide<int64_t>(p.weight.num_rows, T::kRows) *
                         ceil_divide<int64_t>(p.num_tokens, Tokens);
  return launch_dependent(kernel, dim3(unsigned(blocks)), dim3(kThreads), T::kBytes, stream, p);
}

template <typename Element, typename Code, typename Shape>
cudaError_t launch_shape(const QuantLinearParams& p, cudaStream_t stream) {
  if (p.num_tokens <= 8) return launch_tile<Element, Code, Shape, 8>(p, stream);
  if (p.num_tokens <= 16) return launch_tile<Element, Code, Shape, 16>(p, stream);
  return launch_tile<Element, Code, Shape, 32>(p, stream);
}

}  // namespace

template <typename Element>
cudaError_t quant_linear_of(const QuantLinearParams& p, cudaStream_t stream) {
  const auto with_code = [&](auto code) {
    using Code = decltype(code);
    return p.weight.num_rows >= kMinTallRows ? launch_shape<Element, Code, Tall>(p, stream)
                                             : launch_shape<Element, Code, Flat>(p, stream);
  };
  if (p.weight.bits == 4) {
    return p.weight.has_float_codes ? with_code(E2M1()) : with_code(Integers<4>());
  }
  return p.weight.has_float_codes ? with_code(Floats()) : with_code(Integers<8>());
}

}  // namespace tgi::cuda
