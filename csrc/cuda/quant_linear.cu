// Products with quantised weights, whose kernels are compiled per type of activations, and
// dequantised weights for products of many rows.
#include "codes.cuh"

namespace tgi::cuda {

template <typename Element>
cudaError_t quant_linear_of(const QuantLinearParams& p, cudaStream_t stream);  // quant_linear.cuh

namespace {

constexpr int kThreads = 128;

constexpr int kRuns = 4;  // of 8 codes, per thread

// A warp writes consecutive runs of 16 bytes, and requests the codes of all its runs first.
template <typename Element, typename Scale, typename Code>
__global__ void __launch_bounds__(kThreads, 8) dequantise_kernel(QuantMatrix m, Element* out) {
  using Word = std::conditional_t<Code::kBits == 4, uint32_t, uint2>;
  const int64_t first = int64_t{blockIdx.x} * (kThreads * kRuns) + threadIdx.x;
  const int64_t num_runs = m.num_rows * m.num_columns / 8;
  Word codes[kRuns] = {};
#pragma unroll
  for (int i = 0; i < kRuns; ++i) {
    const int64_t run = first + i * kThreads;
    if (run < num_runs) codes[i] = static_cast<const Word*>(m.codes)[run];
  }
#pragma unroll
  for (int i = 0; i < kRuns; ++i) {
    const int64_t run = first + i * kThreads;
    if (run >= num_runs) break;
    // Groups are contiguous within a row, and rows are contiguous; a group is a whole number of
    // runs.
    const int64_t place = divide_narrow(run, m.group / 8);
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
    store8(out + run * 8, values);
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
  // The kernel counts groups in 32 bits, and finds a column's group by a multiplication.
  const int64_t num_groups = p.weight.num_rows * (p.weight.num_columns / p.weight.group);
  if (num_groups >= int64_t{1} << 31 || p.weight.num_columns > 1 << 20)
    return cudaErrorInvalidValue;
  return p.type == Type::kBfloat16 ? quant_linear_of<bf16>(p, stream)
                                   : quant_linear_of<fp16>(p, stream);
}

cudaError_t dequantise(const DequantiseParams& p, cudaStream_t stream) {
  if (!are_codes_valid(p.weight)) return cudaErrorInvalidValue;
  const int64_t size = p.weight.num_rows * p.weight.num_columns;
  if (size == 0) return cudaSuccess;
  return for_types(p.type, p.weight, [&](auto element, auto scale, auto code) {
    using Element = decltype(element);
    using Code = decltype(code);
    const dim3 grid(unsigned(ceil_divide<int64_t>(size, kThreads * kRuns * 8)));
    return launch(dequantise_kernel<Element, decltype(scale), Code>, grid, dim3(kThreads), 0,
                  stream, p.weight, static_cast<Element*>(p.out));
  });
}

}  // namespace tgi::cuda
