// Checks of arguments from Python; kernels rely on what has passed here. A message names the
// operand, the requirement and the actual value. std::invalid_argument becomes Python's ValueError.
#pragma once

#include <pybind11/numpy.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "bindings/activation.h"

namespace tgi {

namespace py = pybind11;

constexpr int64_t kMaxLayers = 1 << 16;  // per model

// A contiguous numpy array. Arguments of this type are bound with noconvert(), so another dtype is
// a TypeError, and writes go to the caller's own memory.
template <class T>
using Array = py::array_t<T, py::array::c_style>;

template <class... Parts>
void check(bool holds, const Parts&... parts) {
  if (holds) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

// Checks an array's shape; a size of -1 matches any.
template <class T>
void check_shape(const Array<T>& array, const char* name, std::initializer_list<int64_t> shape) {
  bool fits = array.ndim() == static_cast<int64_t>(shape.size());
  int64_t axis = 0;
  for (const int64_t size : shape) {
    fits = fits && (size < 0 || array.shape(axis) == size);
    ++axis;
  }
  if (fits) return;
  std::ostringstream wanted, found;
  for (const int64_t size : shape) wanted << (wanted.tellp() > 0 ? ", " : "") << size;
  for (int64_t i = 0; i < array.ndim(); ++i) found << (i > 0 ? ", " : "") << array.shape(i);
  check(false, "`", name, "` must have shape [", wanted.str(), "] (-1: any), got [", found.str(),
        "]");
}

// Checks that every element is in [0, limit).
template <class Integer>
void check_range(const Integer* values, int64_t count, int64_t limit, const char* name) {
  for (int64_t i = 0; i < count; ++i) {
    check(values[i] >= 0 && values[i] < limit, "`", name, "`[", i, "] must be in [0, ", limit,
          "), got ", values[i]);
  }
}

inline void check_positive(int64_t value, const char* name) {
  check(value > 0, "`", name, "` must be positive, got ", value);
}

// Checks a size that is later multiplied by others without an overflow check.
inline void check_size(int64_t value, const char* name) {
  check_positive(value, name);
  check(value <= INT32_MAX, "`", name, "` must be at most ", INT32_MAX, ", got ", value);
}

// Returns the activation of this name; a gate's has no parameters.
inline MlpActivation check_activation(const std::string& name, bool is_gate) {
  const std::optional<MlpActivation> found = find_activation(name);
  check(found.has_value() && !(is_gate && *found == MlpActivation::kXielu), "`activation` must be ",
        is_gate ? kGatedNames : kActivationNames, ", got ", name);
  return *found;
}

}  // namespace tgi
