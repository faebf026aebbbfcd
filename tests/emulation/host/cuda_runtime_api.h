// What csrc/cuda/kernels.h takes from CUDA, for bindings that are compiled without it.
#pragma once

using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0;
