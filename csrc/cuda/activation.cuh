// The activation functions of MLPs.
#pragma once

#include "kernels.h"
#include "launch.cuh"

namespace tgi::cuda {

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

__device__ __forceinline__ float activate(float x, MlpActivation activation, float above,
                                          float below) {
  switch (activation) {
    case MlpActivation::kSilu:
      return silu(x);
    case MlpActivation::kGeluTanh:
      return gelu_tanh(x);
    case MlpActivation::kGelu:
      return gelu(x);
    case MlpActivation::kXielu:
      return xielu(x, above, below);
    case MlpActivation::kReluSquared:
      return x > 0 ? x * x : 0.0f;
    default:
      return fmaxf(x, 0.0f);
  }
}

}  // namespace tgi::cuda
