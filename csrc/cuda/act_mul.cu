// The gated half of the MLP: activation of the gate, times up.
#include "kernels.h"
#include "vec.cuh"

namespace tgi::cuda {
namespace {

constexpr int kThreads = 256;

__device__ __forceinline__ float silu(float x) { return x / (1.0f + expf(-x)); }

// 0.5 x (1 + tanh(u)) = x / (1 + e^(-2u)), u = sqrt(2 / pi) (x + 0.044715 x^3)
__device__ __forceinline__ float gelu_tanh(float x) {
  return x / (1.0f + expf(-1.5957691216057308f * (x + 0.044715f * x * x * x)));
}

template <typename Element>
__global__ void __launch_bounds__(kThreads, 4) act_mul_kernel(ActMulParams p) {
  wait_for_kernel_before();
  start_kernel_after();
  const int64_t vectors = p.intermediate / 8;
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= p.num_tokens * vectors) return;
  const int64_t token = i / vectors, column = i % vectors * 8;
  const Element* row = static_cast<const Element*>(p.gate_up) + token * 2 * p.intermediate;
  float gate[8], up[8];
  load8(row + column, gate);
  load8(row + p.intermediate + column, up);
#pragma unroll
  for (int k = 0; k < 8; ++k) {
    up[k] *= p.activation == MlpActivation::kSilu ? silu(gate[k]) : gelu_tanh(gate[k]);
  }
  store8(static_cast<Element*>(p.out) + token * p.intermediate + column, up);
}

}  // namespace

cudaError_t act_mul(const ActMulParams& p, cudaStream_t stream) {
  if (p.intermediate % 8 != 0) return cudaErrorInvalidValue;
  if (p.num_tokens == 0) return cudaSuccess;
  const auto blocks = unsigned(ceil_divide<int64_t>(p.num_tokens * (p.intermediate / 8), kThreads));
  const auto kernel = p.type == Type::kBfloat16 ? act_mul_kernel<bf16> : act_mul_kernel<fp16>;
  return launch_dependent(kernel, dim3(blocks), dim3(kThreads), 0, stream, p);
}

}  // namespace tgi::cuda
