// Products with quantised weights, directly from the codes, for tens of tokens at most.
//
// A weight is scale * (code - zero) + offset, with one scale (and offset) per group of columns. A
// code is exact in 16 bits, so tensor cores multiply codes, and the scale is applied in float32 to
// the sum over a group. Offsets, and what operands have in addition to the code minus the zero
// point, are applied to the sum of the activations, which is the product with a row of ones.
//
// The lower bound is the size of codes and scales over the memory bandwidth: 28672 x 4096 codes of
// 4 bits are 59 MB and 15 us at 4 TB/s. At that rate a multiprocessor has 260 cycles for 16 rows of
// 128 columns on each of its schedulers, and reading the activations again for each of them would
// take L2 longer. So a warp keeps the activations of its columns in registers:
//
//             chunk 0: 8 parts             chunk 1
//           +----+----+-  -+----+   +----+----+-  -+----+
//   tile 0  | w0 | w1 | .. | w7 |   | w0 | w1 | .. | w7 |     a box is a visit: 16 rows by the
//   tile 1  | w0 | w1 | .. | w7 |   | w0 | w1 | .. | w7 |     columns of 64 bytes
//           +----+----+-  -+----+   +----+----+-  -+----+
//
// For each chunk it loads them, and visits all tiles of rows of its block. Sums are in shared
// memory, where only one lane reads and writes each; they are added over the parts when all chunks
// are done. If they do not fit, the block makes several passes over its tiles. Blocks stay on their
// multiprocessor, and warps meet at no barrier within a pass.
//
// The order of all additions depends only on the shape of the weights: a token has the same bits in
// any batch. Rounding does not depend on the compiler either: fused operations are explicit.
//
// As in linear.cu, rows of weights are the 16-row operand of mma and tokens the 8-wide one, and
// both have their columns in the same order in registers, not that of mma's layout. Lane l takes
// word l % 4 of 16 bytes of a row's codes, which lie in one group, and the activations of the same
// columns, as they are in memory: two mma for 8 codes of 4 bits, one for 4 codes of 8 bits.
#pragma once

#include "mma.cuh"
#include "quant_linear_queue.cuh"

namespace tgi::cuda {
namespace {

// A warp's activations of a chunk, and what was loaded of the next chunk's.
template <typename Element, typename S>
class Values {
 public:
  // Whether registers suffice for loading a chunk's activations while those of the chunk before
  // are used.
  static constexpr bool kLoadsAhead =
      S::kTokenTiles == 1 || (S::kTokenTiles == 2 && !(S::kWords == 4 && S::kHasTail));

  __device__ __forceinline__ explicit Values(const QuantLinearParams& p) : p_(p) {}

  // Loads a chunk's activations, which `take` makes operands; zeros past the last token or column.
  __device__ __forceinline__ void load(int chunk) {
    const uint32_t thread = late(threadIdx.x);
    const auto lane = int(thread % kWarpSize);
    const int column = (chunk * kParts + int(thread / kWarpSize)) * S::kColumns;
    const int token = int(late(blockIdx.x)) * S::kTokens + lane / 4;
    const auto* from = static_cast<const Element*>(p_.a) + int64_t{token} * p_.weight.num_columns +
                       column + lane % 4 * 2 * S::kWords;
#pragma unroll
    for (int j = 0; j < S::kTokenTiles; ++j, from += 8 * p_.weight.num_columns) {
#pragma unroll
      for (int piece = 0; piece < kPieces; ++piece) {
        const bool exists =
            token + j * 8 < p_.num_tokens &&
            (!S::kHasTail || column + piece * S::kPieceColumns < p_.weight.num_columns);
        uint32_t (&out)[S::kWords] = loaded_[piece][j];
        const void* piece_from = from + piece * S::kPieceColumns;
        if constexpr (S::kWords == 4) {
          const uint4 words = exists ? *static_cast<const uint4*>(piece_from) : uint4{};
          out[0] = words.x, out[1] = words.y, out[2] = words.z, out[3] = words.w;
        } else {
          const uint2 words = exists ? *static_cast<const uint2*>(piece_from) : uint2{};
          out[0] = words.x, out[1] = words.y;
        }
      }
    }
  }

  // Makes the loaded chunk the current one.
  __device__ __forceinline__ void take() {
#pragma unroll
    for (int i = 0; i < kPieces * S::kTokenTiles * S::kWords; ++i) {
      const int piece = i / (S::kTokenTiles * S::kWords), j = i / S::kWords % S::kTokenTiles;
      at[piece][j][i % S::kWords] = loaded_[piece][j][i % S::kWords];
    }
  }

  uint32_t at[kPieces][S::kTokenTiles][S::kWords];

 private:
  const QuantLinearParams& p_;
  uint32_t loaded_[kPieces][S::kTokenTiles][S::kWords];
};

// Writes the sums of a chunk's activations over each group, [group][token]: the product with rows
// of ones.
template <typename Element, typename S>
__device__ __forceinline__ void sum_values(const Values<Element, S>& values, float* out) {
  constexpr uint32_t kOne = std::is_same_v<Element, bf16> ? 0x3f803f80u : 0x3c003c00u;
  constexpr uint32_t kOnes[4] = {kOne, kOne, kOne, kOne};
  const int lane = int(threadIdx.x) % kWarpSize;
  __syncwarp();  // none reads those of the chunk before
#pragma unroll
  for (int group = 0; group < S::kGroups; ++group) {
#pragma unroll
    for (int j = 0; j < S::kTokenTiles; ++j) {
      float sums[4] = {};
#pragma unroll
      for (int piece = group * S::kRun; piece < (group + 1) * S::kRun; ++piece) {
#pragma unroll
        for (int k = 0; k < S::kWords; k += 2) {
          mma_m16n8k16<Element>(sums, kOnes, values.at[piece][j][k], values.at[piece][j][k + 1]);
        }
      }
      if (lane < 4) {  // they have row 0 of d, and all rows are the same
        *reinterpret_cast<float2*>(out + group * S::kTokens + j * 8 + lane * 2) =
            float2{sums[0], sums[1]};
      }
    }
  }
}

// Multiplies a visit's codes and adds to the lane's sums of the tile.
template <typename Element, typename S>
__device__ __forceinline__ void visit(const uint4* stage, uint32_t shift, float base,
                                      const float* plain, bool has_offsets,
                                      const Values<Element, S>& values, float4* sums) {
  using Code = typename S::Code;
  constexpr bool kHasBase = Code::template kHasBase<Element>;
  const int lane = int(threadIdx.x) % kWarpSize;
  const int row = lane % 8, half = lane / 8 % 2, ahead = lane / 16;
  const uint4* codes = stage + half * kWarpSize + row * 4;
  float totals[S::kTokenTiles][4], products[S::kTokenTiles][4] = {};
  uint32_t words[4];  // [piece][half]
#pragma unroll
  for (int piece = 0; piece < kPieces; ++piece) {
    if (piece % 2 == 0) load_matrix_x4(words, codes + (ahead ^ row / 2 ^ piece));
    uint32_t weights[2][S::kWords];
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      Code::template operands<Element>(words[piece % 2 * 2 + k], shift, weights[k]);
    }
#pragma unroll
    for (int j = 0; j < S::kTokenTiles; ++j) {
#pragma unroll
      for (int k = 0; k < S::kWords; k += 2) {
        const uint32_t a[4] = {weights[0][k], weights[1][k], weights[0][k + 1], weights[1][k + 1]};
        mma_m16n8k16<Element>(products[j], a, values.at[piece][j][k], values.at[piece][j][k + 1]);
      }
    }
    if ((piece + 1) % S::kRun != 0) continue;
    const uint4* group = stage + S::kCodeSlots + piece / S::kRun * S::kGroupSlots;
    const float2 scale = read_scales<typename S::Scale>(group);
#pragma unroll
    for (int j = 0; j < S::kTokenTiles; ++j) {
      if (piece + 1 == S::kRun) {
        const float4 four = sums[j * kWarpSize];
        totals[j][0] = four.x, totals[j][1] = four.y, totals[j][2] = four.z, totals[j][3] = four.w;
      }
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        totals[j][k] = fmaf(k < 2 ? scale.x : scale.y, products[j][k], totals[j][k]);
        products[j][k] = 0;
      }
    }
    if (!kHasBase && !has_offsets) continue;
    float2 offset = {};
    if (has_offsets) offset = read_scales<typename S::Scale>(group + S::kScaleSlots);
    if constexpr (kHasBase) {
      offset.x = fmaf(-base, scale.x, offset.x), offset.y = fmaf(-base, scale.y, offset.y);
    }
#pragma unroll
    for (int j = 0; j < S::kTokenTiles; ++j) {
      const float2 two = *reinterpret_cast<const float2*>(plain + piece / S::kRun * S::kTokens +
                                                          j * 8 + lane % 4 * 2);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        totals[j][k] = fmaf(k < 2 ? offset.x : offset.y, k % 2 == 0 ? two.x : two.y, totals[j][k]);
      }
    }
  }
#pragma unroll
  for (int j = 0; j < S::kTokenTiles; ++j) {
    sums[j * kWarpSize] = float4{totals[j][0], totals[j][1], totals[j][2], totals[j][3]};
  }
}

// Adds the parts' sums of a pass in their order and writes the output.
template <typename Element, typename S>
__device__ __forceinline__ void store(const QuantLinearParams& p, const Tiles& tiles, int first,
                                      int count, int first_token, const float4* sums) {
  for (int i = int(threadIdx.x); i < count * S::kTokenTiles * kWarpSize; i += kThreads) {
    const int lane = i % kWarpSize, j = i / kWarpSize % S::kTokenTiles;
    const int tile = i / (kWarpSize * S::kTokenTiles);
    const float4* from = sums + tile * S::kTileSums + j * kWarpSize + lane;
    float total[4] = {};
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      const float4 four = from[part * S::kTokenTiles * kWarpSize];
      total[0] += four.x, total[1] += four.y, total[2] += four.z, total[3] += four.w;
    }
    const int64_t tile_row = int64_t{tiles.first + (first + tile) * tiles.stride} * kTileRows;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int64_t row = tile_row + lane / 4 * 2 + k / 2;
      const int64_t token = first_token + j * 8 + lane % 4 * 2 + k % 2;
      if (token >= p.num_tokens || row >= p.weight.num_rows) continue;
      const float sum = p.bias == nullptr ? total[k] : total[k] + p.bias[row];
      const int64_t place = token * p.weight.num_rows + row;
      if (p.is_wide) {
        float* out = static_cast<float*>(p.out) + place;
        *out = p.is_added ? *out + sum : sum;
      } else {
        static_cast<Element*>(p.out)[place] = Element{uint16_t(Pair<Element>::pack(sum, 0.0f))};
      }
    }
  }
}

template <typename Element, typename Code, typename Scale, int Tokens, int Run>
__global__ void __launch_bounds__(kThreads, 2)
    quant_linear_kernel(QuantLinearParams p, int stride, int per_pass) {
  using S = Shape<Code, Scale, Tokens, Run>;
  DYNAMIC_SHARED(uint4, shared);  // [warp]'s queues; sums of activations; sums of the tiles
  const int part = int(threadIdx.x) / kWarpSize;
  // Blocks that share rows are adjacent, so all but the first find the codes in L2.
  const int first_token = int(blockIdx.x) * Tokens, first_tile = int(blockIdx.y);
  const auto num_tiles = int(ceil_divide<int64_t>(p.weight.num_rows, kTileRows));
  const Tiles tiles = {first_tile, stride,
                       int(divide_narrow(num_tiles - first_tile - 1, stride)) + 1, per_pass};
  uint4* queue = shared + part * S::kWarpSlots;
  auto* plain = reinterpret_cast<float*>(shared + kParts * S::kWarpSlots) + part * S::kPlainSums;
  auto* sums = reinterpret_cast<float4*>(shared) + S::kFixedBytes / 16;
  const auto own_sums = [&] {
    const uint32_t thread = late(threadIdx.x);
    return sums + thread / kWarpSize * S::kTokenTiles * kWarpSize + thread % kWarpSize;
  };
  const bool has_offsets = Code::kHasOffsets && p.weight.offsets != nullptr;
  constexpr bool kHasBase = Code::template kHasBase<Element>;
  const uint32_t shift = Code::template shift<Element>(p.weight.zero);
  const float base = Code::template base<Element>(p.weight.zero);
  allow_next_kernel();
  // Weights are never written, so their first copies start before the previous kernel has ended.
  Source<S> source(p.weight, tiles, queue);
#pragma unroll
  for (int i = 0; i < S::kStages - 1; ++i) source.copy(i * S::kStageBytes);
  wait_for_previous_kernel();
  const int num_chunks = Source<S>::num_chunks(p.weight, part);
  Values<Element, S> values(p);
  if (num_chunks > 0) values.load(0);
  constexpr int kEnd = S::kStages * S::kStageBytes;
  int stage = 0;
  for (int first = 0; first < tiles.count; first += per_pass) {
    const int count = min(per_pass, tiles.count - first);
    for (int i = 0; i < count; ++i) {
#pragma unroll
      for (int j = 0; j < S::kTokenTiles; ++j) {
        own_sums()[i * S::kTileSums + j * kWarpSize] = float4{};
      }
    }
    for (int chunk = 0; chunk < num_chunks; ++chunk) {
      values.take();
      const auto load_next = [&] {
        const bool ends_pass = chunk + 1 == num_chunks;
        if (!ends_pass || first + per_pass < tiles.count) values.load(ends_pass ? 0 : chunk + 1);
      };
      if (values.kLoadsAhead) load_next();
      if (has_offsets || kHasBase) sum_values<Element, S>(values, plain);
      float4* tile_sums = own_sums();
      for (int left = count; left > 0; --left, tile_sums += S::kTileSums) {
        async_wait<S::kStages - 2>();
        __syncwarp();  // all see the stage, and none reads the one that is overwritten
        source.copy((stage == 0 ? kEnd : stage) - S::kStageBytes);
        const auto* from = reinterpret_cast<const uint8_t*>(queue) + stage;
        visit<Element, S>(reinterpret_cast<const uint4*>(from), shift, base, plain, has_offsets,
                          values, tile_sums);
        stage = stage + S::kStageBytes == kEnd ? 0 : stage + S::kStageBytes;
      }
      if (!values.kLoadsAhead) load_next();
    }
    __syncthreads();
    store<Element, S>(p, tiles, first, count, first_token, sums);
    if (first + per_pass < tiles.count) __syncthreads();  // the sums are read
  }
  async_wait<0>();  // the last copies have no visit
}

template <typename Element, typename Code, typename Scale, int Tokens, int Run>
cudaError_t launch_kernel(const QuantLinearParams& p, cudaStream_t stream) {
  using S = Shape<Code, Scale, Tokens, Run>;
  const int blocks = shared_bytes_of_block(2) >= S::kFixedBytes + S::kTileBytes ? 2 : 1;
  const int room = (shared_bytes_of_block(blocks) - S::kFixedBytes) / S::kTileBytes;
  if (room < 1) return cudaErrorInvalidValue;
  const int64_t token_tiles = ceil_divide<int64_t>(p.num_tokens, Tokens);
  const int64_t num_tiles = ceil_divide<int64_t>(p.weight.num_rows, kTileRows);
  // With many tiles of tokens, blocks that wait for a place leave fewer of them empty at the end.
  const int64_t waves = token_tiles <= 32 ? 1 : 4;
  const int64_t wanted = waves * blocks * num_multiprocessors() / token_tiles;
  const int64_t stride = wanted < 1 ? 1 : wanted < num_tiles ? wanted : num_tiles;
  const int64_t most = ceil_divide(num_tiles, stride);  // tiles of a block
  const int64_t per_pass = ceil_divide(most, ceil_divide<int64_t>(most, room));
  return launch_dependent(quant_linear_kernel<Element, Code, Scale, Tokens, Run>,
                          dim3(unsigned(token_tiles), unsigned(stride)), dim3(kThreads),
                          S::kFixedBytes + per_pass * S::kTileBytes, stream, p, int(stride),
                          int(per_pass));
}

template <typename Element, typename Code, typename Scale, int Run>
cudaError_t launch_tile(const QuantLinearParams& p, cudaStream_t stream) {
  if (p.num_tokens <= 8) return launch_kernel<Element, Code, Scale, 8, Run>(p, stream);
  if constexpr (Run > 1) {  // with a scale for every piece, registers do not suffice
    if (p.num_tokens > 16) return launch_kernel<Element, Code, Scale, 32, Run>(p, stream);
  }
  return launch_kernel<Element, Code, Scale, 16, Run>(p, stream);
}

}  // namespace

template <typename Element>
cudaError_t quant_linear_of(const QuantLinearParams& p, cudaStream_t stream) {
  return for_codes(p.weight, [&](auto scale, auto code) {
    using Code = decltype(code);
    using Scale = decltype(scale);
    return p.weight.group % (Code::kLongRun * kStep<Code>) == 0
               ? launch_tile<Element, Code, Scale, Code::kLongRun>(p, stream)
               : launch_tile<Element, Code, Scale, 1>(p, stream);
  });
}

}  // namespace tgi::cuda
