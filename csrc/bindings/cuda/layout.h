// Checks of operands, for the bindings only: kernels trust what has passed here. Messages name the
// operand, what it must be and what it is.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <initializer_list>

namespace tgi {

// A contiguous tensor of this dtype and shape, wherever it lies; a size of -1 may be anything.
inline void check_layout(const at::Tensor& tensor, const char* name, c10::ScalarType dtype,
                         std::initializer_list<int64_t> shape) {
  TORCH_CHECK(tensor.scalar_type() == dtype, "`", name, "` must be ", dtype, ", got ",
              tensor.scalar_type());
  bool fits = tensor.dim() == static_cast<int64_t>(shape.size());
  int64_t axis = 0;
  for (const int64_t size : shape) {
    fits = fits && (size < 0 || tensor.size(axis) == size);
    ++axis;
  }
  TORCH_CHECK(fits, "`", name, "` must have shape ", at::IntArrayRef(shape), " (-1: any), got ",
              tensor.sizes());
  TORCH_CHECK(tensor.is_contiguous(), "`", name, "` must be contiguous, got strides ",
              tensor.strides());
}

// The same on the CPU.
inline void check_tensor(const at::Tensor& tensor, const char* name, c10::ScalarType dtype,
                         std::initializer_list<int64_t> shape) {
  TORCH_CHECK(tensor.device().is_cpu(), "`", name, "` must be on the CPU, got ", tensor.device());
  check_layout(tensor, name, dtype, shape);
}

// A layer's part of the KV cache's pool [num_blocks, 2, num_kv_heads, elements of a head's block]:
// contiguous but for the other layers' parts between its blocks.
inline void check_kv(const at::Tensor& kv, int64_t block_elements) {
  TORCH_CHECK(kv.device().is_cpu(), "`kv` must be on the CPU, got ", kv.device());
  TORCH_CHECK(kv.dim() == 4 && kv.size(1) == 2 && kv.size(3) == block_elements,
              "`kv` must have shape [-1, 2, -1, ", block_elements, "] (-1: any), got ", kv.sizes());
  TORCH_CHECK(kv.stride(3) == 1 && kv.stride(2) == kv.size(3) &&
                  kv.stride(1) == kv.size(2) * kv.size(3) && kv.stride(0) >= 2 * kv.stride(1),
              "`kv` must be contiguous in each block, got strides ", kv.strides());
}

// Every element in [0, limit).
template <typename Integer>
void check_range(const Integer* values, int64_t count, int64_t limit, const char* name) {
  for (int64_t i = 0; i < count; ++i) {
    TORCH_CHECK(values[i] >= 0 && values[i] < limit, "`", name, "`[", i, "] must be in [0, ", limit,
                "), got ", values[i]);
  }
}

inline void check_positive(int64_t value, const char* name) {
  TORCH_CHECK(value > 0, "`", name, "` must be positive, got ", value);
}

}  // namespace tgi
