// RMSNorm or LayerNorm of the residual stream or of a product's rows. The result becomes the next
// product's activation, replaces its input, or is added to the residual stream. One block per row,
// with the row in registers.
#include <type_traits>

#include "kernels.h"
#include "reduce.cuh"
#include "vec.cuh"

namespace tgi::cuda {
namespace {

constexpr int kMaxThreads = 1024;
constexpr int kVectors = 2;  // of eight elements, per thread

template <typename Element>
__global__ void __launch_bounds__(kMaxThreads, 1) norm_kernel(NormParams p) {
  allow_next_kernel();
  wait_for_previous_kernel();
  SHARED_ARRAY(float, scratch, kMaxThreads / kWarpSize);
  const int64_t row = blockIdx.x;
  const int64_t from =
      p.rows == nullptr ? row : min(max(int64_t{p.rows[row]}, int64_t{0}), p.num_tokens - 1);
  const float* x = p.x + from * p.hidden;  // [hidden]
  float values[kVectors][8] = {};
  float sum = 0, squares = 0, mean = 0;
#pragma unroll
  for (int k = 0; k < kVectors; ++k) {
    const int64_t column = (int64_t{k} * blockDim.x + threadIdx.x) * 8;
    if (column >= p.hidden) continue;
    load8(x + column, values[k]);
#pragma unroll
    for (int i = 0; i < 8; ++i) sum += values[k][i];
  }
  if (p.bias != nullptr) mean = __fdividef(block_reduce(sum, Add(), scratch), float(p.hidden));
#pragma unroll
  for (int k = 0; k < kVectors; ++k) {
    const int64_t column = (int64_t{k} * blockDim.x + threadIdx.x) * 8;
    if (column >= p.hidden) continue;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      values[k][i] -= mean;
      squares += values[k][i] * values[k][i];
    }
  }
  squares = block_reduce(squares, Add(), scratch);
  const float inverse = rsqrtf(__fdividef(squares, float(p.hidden)) + p.eps);
  Element* out = static_cast<Element*>(p.out) + row * p.hidden;  // [hidden]
#pragma unroll
  for (int k = 0; k < kVectors; ++k) {
    const int64_t column = (int64_t{k} * blockDim.x + threadIdx.x) * 8;
    if (column >= p.hidden) continue;
    float other[8];
    load8(p.weight + column, other);
#pragma unroll
    for (int i = 0; i < 8; ++i) values[k][i] *= inverse * other[i];
    if (p.bias != nullptr) {
      load8(p.bias + column, other);
#pragma unroll
      for (int i = 0; i < 8; ++i) values[k][i] += other[i];
    }
    if constexpr (std::is_same<Element, float>::value) {
      if (p.is_added) {
        load8(out + column, other);
#pragma unroll
        for (int i = 0; i < 8; ++i) values[k][i] = other[i] + p.factor * values[k][i];
      }
    }
    store8(out + column, values[k]);
  }
}

}  // namespace

cudaError_t norm(const NormParams& p, cudaStream_t stream) {
  const bool fits = p.hidden % 8 == 0 && p.hidden >= 8 && p.hidden <= kMaxHidden &&
                    (p.is_wide || !p.is_added) && (p.num_tokens > 0 || p.num_rows == 0);
  if (!fits) return cudaErrorInvalidValue;
  if (p.num_rows == 0) return cudaSuccess;
  const auto threads =
      unsigned(ceil_divide<int64_t>(p.hidden, 8 * kVectors * kWarpSize) * kWarpSize);
  const auto kernel = p.is_wide                   ? norm_kernel<float>
                      : p.type == Type::kBfloat16 ? norm_kernel<bf16>
                                                  : norm_kernel<fp16>;
  return launch_dependent(kernel, dim3(unsigned(p.num_rows)), dim3(threads), 0, stream, p);
}

}  // namespace tgi::cuda
