// What the bindings of packed weights and of the recorded step share: names of formats, checked
// matrices.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>

#include "bindings/checks.h"
#include "cpu/step/packed.h"

namespace tgi {

namespace step = cpu::step;

inline step::Format format_of(c10::string_view name) {
  step::Format format;
  TORCH_CHECK(step::find_format({name.data(), name.size()}, &format),
              "`format` must be a weight format, got ", std::string(name));
  return format;
}

// One that the CPU has panels of.
inline step::Format packed_format_of(c10::string_view name) {
  const step::Format format = format_of(name);
  TORCH_CHECK(step::format_info(format).has_kernel,
              "`format` must be a weight format that can be packed, got ", std::string(name));
  return format;
}

inline step::Precision precision_of(c10::string_view name) {
  if (name == "int8") return step::Precision::kInt8;
  if (name == "bfloat16") return step::Precision::kBF16;
  TORCH_CHECK(name == "float32", "`precision` must be int8, bfloat16 or float32, got ",
              std::string(name));
  return step::Precision::kFloat32;
}

inline void check_columns(step::Format format, int64_t columns) {
  const int64_t unit = step::format_info(format).block_columns;
  TORCH_CHECK(columns > 0 && columns % unit == 0, "`columns` must be a multiple of ", unit,
              ", got ", columns);
}

// `columns` may be without their padding.
inline step::PackedMatrix matrix_of(const at::Tensor& data, c10::string_view format_name,
                                    int64_t columns) {
  const step::Format format = packed_format_of(format_name);
  check_columns(format, columns);
  check_tensor(data, "weight", at::kByte, {-1});
  const int64_t strip = 2 * step::panel_bytes(format, columns);
  TORCH_CHECK(data.size(0) > 0 && data.size(0) % strip == 0, "`weight` must be whole strips of ",
              strip, " bytes, got ", data.size(0));
  return {data.const_data_ptr<uint8_t>(), format, data.size(0) / strip * step::kStripRows,
          step::padded_columns(columns)};
}

}  // namespace tgi
