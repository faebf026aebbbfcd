// An operand check that needs no device; kernels rely on what has passed here. A message names the
// operand, the requirement and the actual value.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <initializer_list>

namespace tgi::cuda {

// Checks for a contiguous tensor of this dtype and shape, on any device; a size of -1 matches any.
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

}  // namespace tgi::cuda
