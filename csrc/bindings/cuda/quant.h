// Checks of quantised weights on CUDA.
#pragma once

#include <optional>

#include "bindings/cuda/checks.h"

namespace tgi::cuda {

inline QuantMatrix make_matrix(const at::Tensor& codes, const at::Tensor& scales,
                               const std::optional<at::Tensor>& offsets, int64_t bits,
                               int64_t zero) {
  TORCH_CHECK(bits == 4 || bits == 8, "`bits` must be 4 or 8, got ", bits);
  TORCH_CHECK(zero >= 0 && zero <= 128, "`zero` must be in [0, 128], got ", zero);
  const bool is_exponent = scales.scalar_type() == at::kByte;
  TORCH_CHECK(
      is_exponent || scales.scalar_type() == at::kFloat || scales.scalar_type() == at::kHalf,
      "`scales` must be float32, float16 or uint8 (exponents), got ", scales.scalar_type());
  TORCH_CHECK(!is_exponent || (bits == 4 && zero == 0 && !offsets),
              "codes with exponents as scales are E2M1: 4 bits, no zero and no offsets");
  const bool is_float = codes.scalar_type() == at::kFloat8_e4m3fn;
  check_tensor(codes, "codes", is_float ? at::kFloat8_e4m3fn : at::kByte, {-1, -1});
  TORCH_CHECK(!is_float || (bits == 8 && zero == 0 && scales.scalar_type() == at::kFloat),
              "codes that are floats have 8 bits, no zero and float32 scales");
  const int64_t rows = codes.size(0), columns = codes.size(1) * 8 / bits;
  const int64_t stride = (rows + 15) / 16 * 16;
  check_tensor(scales, "scales", scales.scalar_type(), {-1, stride});
  TORCH_CHECK(scales.size(0) > 0 && columns % scales.size(0) == 0, "`scales` must divide ", columns,
              " columns, got ", scales.size(0));
  if (offsets) check_tensor(*offsets, "offsets", scales.scalar_type(), {scales.size(0), stride});
  return {
      .codes = codes.const_data_ptr(),
      .scales = scales.const_data_ptr(),
      .offsets = offsets ? offsets->const_data_ptr() : nullptr,
      .num_rows = rows,
      .num_columns = columns,
      .group = columns / scales.size(0),
      .scale_stride = stride,
      .bits = static_cast<int32_t>(bits),
      .zero = static_cast<int32_t>(zero),
      .has_wide_scales = scales.scalar_type() == at::kFloat,
      .has_float_codes = is_float || is_exponent,
  };
}

}  // namespace tgi::cuda
