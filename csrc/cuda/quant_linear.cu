// Products with quantised weights: few rows of activations at a time directly from the codes, and
// dequantised weights for products of many rows.
//
// A weight is scale * (code - zero) + offset, with one scale (and offset) per group of columns.
// A warp computes two rows of the output, whose order of summation depends only on the shape: a
// token has the same bits in any batch. Rounding does not depend on the compiler either: fused
// operations are explicit, because the compiler might fuse others for a different tile of tokens.
#include "codes.cuh"
#include "reduce.cuh"

namespace tgi::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kWarpRows = 2;  // of the weight: they share the loads of activations

template <typename Element, typename Scale, typename Code, int Tokens>
__global__ void __launch_bounds__(kThreads, Tokens == 8 ? 3 : 4)
    quant_linear_kernel(QuantLinearParams p) {
  wait_for_previous_kernel();
  allow_next_kernel();
  const int lane = int(threadIdx.x) % kWarpSize;
  // Blocks that share rows are adjacent, so all but the first find the codes in L2.
  const int64_t token_tiles = ceil_divide<int64_t>(p.num_tokens, Tokens);
  const int64_t row_tile = divide_narrow(blockIdx.x, token_tiles);
  const int64_t first_token = (blockIdx.x - row_tile * token_tiles) * Tokens;
  const int64_t first_row = (row_tile * kWarps + threadIdx.x / kWarpSize) * kWarpRows;
  if (first_row >= p.weight.num_rows) return;
  const int64_t columns = p.weight.num_columns, groups = divide_narrow(columns, p.weight.group);
  const float shift = kMagic + float(p.weight.zero);
  const auto* codes = static_cast<const uint8_t*>(p.weight.codes);
  const auto* scales = static_cast<const Scale*>(p.weight.scales);
  const auto* offsets = static_cast<const Scale*>(p.weight.offsets);
  const auto* a = static_cast<const Element*>(p.a);  // [num_tokens, columns]
  float sums[kWarpRows][Tokens];
#pragma unroll
  for (int row = 0; row < kWarpRows; ++row) {
#pragma unroll
    for (int token = 0; token < Tokens; ++token) sums[row][token] = 0;
  }
  for (int64_t column = lane * kStep<Code>; column < columns; column += kWarpSize * kStep<Code>) {
    uint4 bytes[kWarpRows];
#pragma unroll
    for (int row = 0; row < kWarpRows; ++row) {
      const int64_t from = min(first_row + row, p.weight.num_rows - 1);
      bytes[row] =
          *reinterpret_cast<const uint4*>(codes + (from * columns + column) * Code::kBits / 8);
    }
    float products[kWarpRows][Tokens],
        plain[Tokens];  // of this lane's columns; `plain` sums only activations
#pragma unroll
    for (int token = 0; token < Tokens; ++token) {
      plain[token] = 0;
#pragma unroll
      for (int row = 0; row < kWarpRows; ++row) products[row][token] = 0;
    }
#pragma unroll
    for (int i = 0; i < kStep<Code> / 8; ++i) {
      float weights[kWarpRows][8];
#pragma unroll
      for (int row = 0; row < kWarpRows; ++row) Code::unpack(bytes[row], i, shift, weights[row]);
#pragma unroll
      for (int token = 0; token < Tokens; ++token) {
        float values[8];
        load8(a + min(first_token + token, p.num_tokens - 1) * columns + column + 8 * i, values);
#pragma unroll
        for (int k = 0; k < 8; ++k) {
          plain[token] += values[k];
#pragma unroll
          for (int row = 0; row < kWarpRows; ++row)
            products[row][token] = fmaf(weights[row][k], values[k], products[row][token]);
        }
      }
    }
    const int64_t group = divide_narrow(column, p.weight.group);
#pragma unroll
    for (int row = 0; row < kWarpRows; ++row) {
      const int64_t place = min(first_row + row, p.weight.num_rows - 1) * groups + group;
      const float scale = to_float(scales[place]);
      const float offset = offsets == nullptr ? 0.0f : to_float(offsets[place]);
#pragma unroll
      for (int token = 0; token < Tokens; ++token) {
        sums[row][token] += fmaf(scale, products[row][token], offset * plain[token]);
      }
    }
  }
#pragma unroll
  for (int row = 0; row < kWarpRows; ++row) {
#pragma unroll
    for (int token = 0; token < Tokens; ++token) {
      const float sum = warp_reduce(sums[row][token], Add());
      const bool is_mine =
          lane == 0 && first_token + token < p.num_tokens && first_row + row < p.weight.num_rows;
      if (!is_mine) continue;
      const float bias = p.bias == nullptr ? 0.0f : p.bias[first_row + row];
      const int64_t place = (first_token + token) * p.weight.num_rows + first_row + row;
      if (p.is_wide) {
        static_cast<float*>(p.out)[place] = sum + bias;
      } else {
        static_cast<Element*>(p.out)[place] =
            Element{uint16_t(Pair<Element>::pack(sum + bias, 0.0f))};
      }
    }
  }
}

template <typename Element, typename Scale, typename Code>
__global__ void __launch_bounds__(kThreads, 8) dequantise_kernel(QuantMatrix m, Element* out) {
  const int64_t step = int64_t{blockIdx.x} * kThreads + threadIdx.x, first = step * kStep<Code>;
  if (first >= m.num_rows * m.num_columns) return;
  const uint4 bytes = *reinterpret_cast<const uint4*>(static_cast<const uint8_t*>(m.codes) +
                                                      first * Code::kBits / 8);
  // Groups are contiguous within a row, and rows are contiguous; a group is a whole number of
  // steps.
  const int64_t place = divide_narrow(step, m.group / kStep<Code>);
  const float scale = to_float(static_cast<const Scale*>(m.scales)[place]);
  const float offset =
      m.offsets == nullptr ? 0.0f : to_float(static_cast<const Scale*>(m.offsets)[place]);
#pragma unroll
  for (int i = 0; i < kStep<Code> / 8; ++i) {
    float values[8];
    Code::unpack(bytes, i, kMagic + float(m.zero), values);
#pragma unroll
    for (int k = 0; k < 8; ++k) values[k] = scale * values[k] + offset;
    store8(out + first + 8 * i, values);
  }
}

// Calls body with the types of the elements, the scales and the codes.
template <typename Body>
cudaError_t for_types(Type type, const QuantMatrix& m, const Body& body) {
  return for_codes(m, [&](auto scale, auto code) {
    return type == Type::kBfloat16 ? body(bf16(), scale, code) : body(fp16(), scale, code);
  });
}

}  // namespace

cudaError_t quant_linear(const QuantLinearParams& p, cudaStream_t stream) {
  if (!are_codes_valid(p.weight)) return cudaErrorInvalidValue;
  if (p.num_tokens == 0 || p.weight.num_rows == 0) return cudaSuccess;
  const int64_t row_tiles = ceil_divide<int64_t>(p.weight.num_rows, kWarps * kWarpRows);
  return for_types(p.type, p.weight, [&](auto element, auto scale, auto code) {
    using Element = decltype(element);
    using Scale = decltype(scale);
    using Code = decltype(code);
    const auto kernel = p.num_tokens == 1   ? quant_linear_kernel<Element, Scale, Code, 1>
                        : p.num_tokens <= 4 ? quant_linear_kernel<Element, Scale, Code, 4>
                                            : quant_linear_kernel<Element, Scale, Code, 8>;
    const int64_t token_tiles = p.num_tokens <= 4 ? 1 : ceil_divide<int64_t>(p.num_tokens, 8);
    const dim3 grid(unsigned(row_tiles * token_tiles));
    return launch_dependent(kernel, grid, dim3(kThreads), 0, stream, p);
  });
}

cudaError_t dequantise(const DequantiseParams& p, cudaStream_t stream) {
  if (!are_codes_valid(p.weight)) return cudaErrorInvalidValue;
  const int64_t size = p.weight.num_rows * p.weight.num_columns;
  if (size == 0) return cudaSuccess;
  return for_types(p.type, p.weight, [&](auto element, auto scale, auto code) {
    using Element = decltype(element);
    using Code = decltype(code);
    const dim3 grid(unsigned(ceil_divide<int64_t>(size, kThreads * kStep<Code>)));
    return launch(dequantise_kernel<Element, decltype(scale), Code>, grid, dim3(kThreads), 0,
                  stream, p.weight, static_cast<Element*>(p.out));
  });
}

}  // namespace tgi::cuda
