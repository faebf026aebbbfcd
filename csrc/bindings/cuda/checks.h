// Checks of the CUDA operators' operands, and launches on the current stream. Data on the device is
// not checked: kernels clamp ids and lengths.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <initializer_list>

#include "bindings/cuda/layout.h"
#include "cuda/kernels.h"

namespace tgi::cuda {

// Checks for a contiguous tensor on a CUDA device, 16-byte aligned, with the layout that
// check_layout requires.
inline void check_tensor(const at::Tensor& tensor, const char* name, c10::ScalarType dtype,
                         std::initializer_list<int64_t> shape) {
  TORCH_CHECK(tensor.device().is_cuda(), "`", name, "` must be on a CUDA device, got ",
              tensor.device());
  check_layout(tensor, name, dtype, shape);
  // Numbers, codes and work memory are read in vectors of 16 bytes; lists of ids are read one by
  // one and may be slices.
  const bool is_read_in_vectors = tensor.is_floating_point() || tensor.scalar_type() == at::kByte;
  TORCH_CHECK(!is_read_in_vectors || reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0,
              "`", name, "` must begin at a multiple of 16 bytes");
}

// Returns the type of activations, queries and weights.
inline Type check_type(const at::Tensor& tensor, const char* name) {
  TORCH_CHECK(tensor.scalar_type() == at::kBFloat16 || tensor.scalar_type() == at::kHalf, "`", name,
              "` must be bfloat16 or float16, got ", tensor.scalar_type());
  return tensor.scalar_type() == at::kBFloat16 ? Type::kBfloat16 : Type::kFloat16;
}

// Returns the type of the cache: the queries' type, or 8 bits.
inline Type check_kv_type(const at::Tensor& kv, const at::Tensor& q) {
  if (kv.scalar_type() == at::kFloat8_e4m3fn) return Type::kFloat8;
  TORCH_CHECK(kv.scalar_type() == q.scalar_type(), "`kv` must be ", q.scalar_type(),
              " or float8_e4m3fn, got ", kv.scalar_type());
  return check_type(kv, "kv");
}

// Returns the optional tensor's data, or null.
template <typename T>
const T* data_or_null(const std::optional<at::Tensor>& tensor) {
  return tensor ? tensor->const_data_ptr<T>() : nullptr;
}

// Calls launcher(params, stream) on the tensor's device and its current stream.
template <typename Params>
void run(cudaError_t (*launcher)(const Params&, cudaStream_t), const Params& params,
         const at::Tensor& on) {
  const c10::cuda::CUDAGuard guard(on.device());
  C10_CUDA_CHECK(launcher(params, c10::cuda::getCurrentCUDAStream().stream()));
}

}  // namespace tgi::cuda
