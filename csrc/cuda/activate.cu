// The activation between the products of an MLP: f(gate) * up, or only f(x) without a gate.
#include "kernels.h"
#include "vec.cuh"

namespace tgi::cuda {
namespace {

constexpr int kThreads = 256;

// x / (1 + e^-x)
__device__ __forceinline__ float silu(float x) { return __fdividef(x, 1.0f + expf(-x)); }

// 0.5 x (1 + tanh(u)) = x / (1 + e^(-2u)), u = sqrt(2 / pi) (x + 0.044715 x^3)
__device__ __forceinline__ float gelu_tanh(float x) {
  return __fdividef(x, 1.0f + expf(-1.5957691216057308f * (x + 0.044715f * x * x * x)));
}

__device__ __forceinline__ float gelu(float x) {
  return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f));
}

// Huang and Schlag, Deriving Activation Functions Using Integration, arXiv 2411.13010.
__device__ __forceinline__ float xielu(float x, float above, float below) {
  const float grown = x > 0 ? above * x * x : below * (expm1f(x) - x);
  return grown + 0.5f * x;
}

__device__ __forceinline__ float activate(float x, const ActivateParams& p) {
  switch (p.activation) {
    case MlpActivation::kSilu:
      return silu(x);
    case MlpActivation::kGeluTanh:
      return gelu_tanh(x);
    case MlpActivation::kGelu:
      return gelu(x);
    case MlpActivation::kXielu:
      return xielu(x, p.above, p.below);
    case MlpActivation::kReluSquared:
      return x > 0 ? x * x : 0.0f;
    default:
      return fmaxf(x, 0.0f);
  }
}

template <typename Element>
__global__ void __launch_bounds__(kThreads, 4) activate_kernel(ActivateParams p) {
  wait_for_previous_kernel();
  allow_next_kernel();
  const int64_t token = blockIdx.x;
  const int64_t column = int64_t{(blockIdx.y * kThreads + threadIdx.x) * 8};
  if (column >= p.intermediate) return;
  const Element* row =
      static_cast<const Element*>(p.x) + token * (p.is_gated ? 2 : 1) * p.intermediate;
  float x[8], up[8] = {1, 1, 1, 1, 1, 1, 1, 1};
  load8(row + column, x);
  if (p.is_gated) load8(row + p.intermediate + column, up);
#pragma unroll
  for (int k = 0; k < 8; ++k) up[k] *= activate(x[k], p);
  store8(static_cast<Element*>(p.out) + token * p.intermediate + column, up);
}

}  // namespace

cudaError_t activate(const ActivateParams& p, cudaStream_t stream) {
  if (p.intermediate % 8 != 0) return cudaErrorInvalidValue;
  if (p.num_tokens == 0) return cudaSuccess;
  const dim3 grid(unsigned(p.num_tokens),
                  unsigned(ceil_divide<int64_t>(p.intermediate / 8, kThreads)));
  const auto kernel = p.type == Type::kBfloat16 ? activate_kernel<bf16> : activate_kernel<fp16>;
  return launch_dependent(kernel, grid, dim3(kThreads), 0, stream, p);
}

}  // namespace tgi::cuda
