// Float32 tensors owned by the caller, as numpy views: the operands of operators that are called
// directly.
#pragma once

#include <cstdint>

#include "bindings/checks.h"
#include "cpu/memory.h"

namespace tgi {

// Accepts any strides. Arguments of this type are bound with noconvert().
using FloatArray = py::array_t<float, 0>;

constexpr int64_t kFloatBytes = sizeof(float);

// Returns the distance between elements along an axis, in floats.
inline int64_t float_stride(const FloatArray& array, int64_t axis, const char* name) {
  const int64_t bytes = array.strides(axis);
  check(bytes % kFloatBytes == 0, "`", name, "` must be aligned to its elements");
  return bytes / kFloatBytes;
}

// Checks the number of axes, and that the elements of the last axis are adjacent.
inline void check_rows_of(const FloatArray& array, int64_t num_axes, const char* name) {
  check(array.ndim() == num_axes, "`", name, "` must have ", num_axes, " axes, got ", array.ndim());
  check(array.size() == 0 || array.shape(num_axes - 1) == 1 ||
            array.strides(num_axes - 1) == kFloatBytes,
        "`", name, "` must have the elements of its last axis side by side");
}

inline void check_out(const FloatArray& out, int64_t num_rows, int64_t columns) {
  check(out.ndim() == 2 && out.shape(0) == num_rows && out.shape(1) == columns &&
            (out.flags() & py::array::c_style) != 0,
        "`out` must be contiguous [", num_rows, ", ", columns, "]");
}

// Memory for one call at a time: it grows and is reused by the next call.
class Workspace {
 public:
  uint8_t* reserve(int64_t bytes) {
    if (bytes > size_) {
      memory_ = cpu::allocate(bytes);
      size_ = bytes;
    }
    return memory_.get();
  }

 private:
  cpu::Memory memory_;
  int64_t size_ = 0;
};

}  // namespace tgi
