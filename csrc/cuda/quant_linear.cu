// Products with quantised weights, whose kernels are compiled per type of activations, and
// dequantised weights for products of many rows.
#include "codes.cuh"

namespace tgi::cuda {

template <typename Element>
cudaError_t quant_linear_of(const QuantLinearParams& p, cudaStream_t stream);  // quant_linear.cuh

namespace {

constexpr int kThreads = 128;

// A block's part of a matrix: runs of 8 codes, of rows whose scales are in one sector of 32 bytes.
constexpr int kRows = 8;
constexpr int kRuns = 64;
constexpr int kOwn = kRows * kRuns / kThreads;  // runs of a thread

// A warp writes consecutive runs of 16 bytes, and requests the codes of all its runs first.
template <typename Element, typename Scale, typename Code>
__global__ void __launch_bounds__(kThreads, 8) dequantise_kernel(QuantMatrix m, Element* out) {
  using Word = std::conditional_t<Code::kBits == 4, uint32_t, uint2>;
  const int64_t row_runs = m.num_columns / 8, blocks = ceil_divide<int64_t>(row_runs, kRuns);
  const int64_t row_block = divide_narrow(blockIdx.x, blocks);
  const int warp = int(threadIdx.x) / kWarpSize, lane = int(threadIdx.x) % kWarpSize;
  const int64_t first_row = row_block * kRows + warp;
  const int64_t first_run = (blockIdx.x - row_block * blocks) * kRuns + lane;
  // Of four warps: each has two rows and two warps' runs of both.
  const auto row_of = [&](int i) { return first_row + i % 2 * 4; };
  const auto run_of = [&](int i) { return first_run + i / 2 * kWarpSize; };
  const auto exists = [&](int i) { return row_of(i) < m.num_rows && run_of(i) < row_runs; };
  Word codes[kOwn] = {};
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    if (exists(i)) codes[i] = static_cast<const Word*>(m.codes)[row_of(i) * row_runs + run_of(i)];
  }
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    if (!exists(i)) continue;
    const int64_t place = divide_narrow(run_of(i), m.group / 8) * m.scale_stride + row_of(i);
    const float scale = to_float(static_cast<const Scale*>(m.scales)[place]);
    const float offset =
        m.offsets == nullptr ? 0.0f : to_float(static_cast<const Scale*>(m.offsets)[place]);
    uint4 bytes = {};
    if constexpr (Code::kBits == 4) {
      bytes.x = codes[i];
    } else {
      bytes.x = codes[i].x, bytes.y = codes[i].y;
    }
    float values[8];
    Code::unpack(bytes, 0, kMagic + float(m.zero), values);
#pragma unroll
    for (int k = 0; k < 8; ++k) values[k] = scale * values[k] + offset;
    store8(out + (row_of(i) * row_runs + run_of(i)) * 8, values);
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
  if (!are_codes_valid(p.weight) || (p.is_added && !p.is_wide)) return cudaErrorInvalidValue;
  if (p.num_tokens == 0 || p.weight.num_rows == 0) return cudaSuccess;
  // The kernel's rows, and its steps from tile to tile, have 32 bits.
  if (p.weight.num_rows >= 1 << 30 || p.weight.num_columns > 1 << 18) return cudaErrorInvalidValue;
  return p.type == Type::kBfloat16 ? quant_linear_of<bf16>(p, stream)
                                   : quant_linear_of<fp16>(p, stream);
}

cudaError_t dequantise(const DequantiseParams& p, cudaStream_t stream) {
  if (!are_codes_valid(p.weight)) return cudaErrorInvalidValue;
  if (p.weight.num_rows * p.weight.num_columns == 0) return cudaSuccess;
  const int64_t blocks = ceil_divide<int64_t>(p.weight.num_rows, kRows) *
                         ceil_divide<int64_t>(p.weight.num_columns / 8, kRuns);
  return for_types(p.type, p.weight, [&](auto element, auto scale, auto code) {
    using Element = decltype(element);
    using Code = decltype(code);
    return launch(dequantise_kernel<Element, decltype(scale), Code>, dim3(unsigned(blocks)),
                  dim3(kThreads), 0, stream, p.weight, static_cast<Element*>(p.out));
  });
}

}  // namespace tgi::cuda
