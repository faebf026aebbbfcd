// What the bindings of packed weights and of the recorded step share: names of formats, checked
// matrices.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>

#include "bindings/checks.h"
#include "cpu/step/packed.h"

namespace tgi {

namespace step = cpu::step;

inline constexpr const char* kFormats[] = {"F32",  "F16",  "BF16", "Q8_0", "Q4_0", "Q4_1",
                                           "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K"};
static_assert(std::size(kFormats) == step::kNumFormats, "one name a format");

inline step::Format format_of(c10::string_view name) {
  for (int i = 0; i < step::kNumFormats; ++i) {
    if (name == kFormats[i]) return static_cast<step::Format>(i);
  }
  TORCH_CHECK(false, "`format` must be a weight format that can be packed, got ",
              std::string(name));
}

inline step::Precision precision_of(c10::string_view name) {
  if (name == "int8") return step::Precision::kInt8;
  if (name == "bfloat16") return step::Precision::kBF16;
  TORCH_CHECK(name == "float32", "`precision` must be int8, bfloat16 or float32, got ",
              std::string(name));
  return step::Precision::kFloat32;
}

inline void check_columns(step::Format format, int64_t columns) {
  const int64_t unit = step::panel_layout(format).header_bytes != 0 ? 256 : step::kBlockColumns;
  TORCH_CHECK(columns > 0 && columns % unit == 0, "`columns` must be a multiple of ", unit,
              ", got ", columns);
}

inline step::PackedMatrix matrix_of(const at::Tensor& data, c10::string_view format_name,
                                    int64_t columns) {
  const step::Format format = format_of(format_name);
  check_columns(format, columns);
  check_tensor(data, "weight", at::kByte, {-1});
  const int64_t strip = 2 * step::panel_bytes(format, columns);
  TORCH_CHECK(data.size(0) > 0 && data.size(0) % strip == 0, "`weight` must be whole strips of ",
              strip, " bytes, got ", data.size(0));
  return {data.const_data_ptr<uint8_t>(), format, data.size(0) / strip * step::kStripRows, columns};
}

}  // namespace tgi
