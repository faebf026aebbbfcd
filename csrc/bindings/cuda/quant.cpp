// torch bindings of products with quantised weights on CUDA.
#include <torch/library.h>

#include "bindings/cuda/checks.h"

namespace {

using at::kFloat;
using at::Tensor;
using tgi::cuda::check_tensor;
using tgi::cuda::check_type;
using tgi::cuda::data_or_null;
using tgi::cuda::DequantiseParams;
using tgi::cuda::QuantLinearParams;
using tgi::cuda::QuantMatrix;
using tgi::cuda::run;

QuantMatrix make_matrix(const Tensor& codes, const Tensor& scales,
                        const std::optional<Tensor>& offsets, int64_t bits, int64_t zero) {
  TORCH_CHECK(bits == 4 || bits == 8, "`bits` must be 4 or 8, got ", bits);
  TORCH_CHECK(zero >= 0 && zero < 256, "`zero` must be in [0, 256), got ", zero);
  TORCH_CHECK(scales.scalar_type() == kFloat || scales.scalar_type() == at::kHalf,
              "`scales` must be float32 or float16, got ", scales.scalar_type());
  const bool is_float = codes.scalar_type() == at::kFloat8_e4m3fn;
  check_tensor(codes, "codes", is_float ? at::kFloat8_e4m3fn : at::kByte, {-1, -1});
  TORCH_CHECK(!is_float || (bits == 8 && zero == 0 && scales.scalar_type() == kFloat),
              "codes that are floats have 8 bits, no zero and float32 scales");
  TORCH_CHECK(reinterpret_cast<uintptr_t>(codes.const_data_ptr()) % 16 == 0,
              "`codes` must begin at a multiple of 16 bytes");
  const int64_t rows = codes.size(0), columns = codes.size(1) * 8 / bits;
  check_tensor(scales, "scales", scales.scalar_type(), {rows, -1});
  TORCH_CHECK(scales.size(1) > 0 && columns % scales.size(1) == 0, "`scales` must divide ", columns,
              " columns, got ", scales.size(1));
  if (offsets) check_tensor(*offsets, "offsets", scales.scalar_type(), {rows, scales.size(1)});
  return {codes.const_data_ptr(),
          scales.const_data_ptr(),
          offsets ? offsets->const_data_ptr() : nullptr,
          rows,
          columns,
          columns / scales.size(1),
          static_cast<int32_t>(bits),
          static_cast<int32_t>(zero),
          scales.scalar_type() == kFloat,
          is_float};
}

void quant_linear(const Tensor& a, const Tensor& codes, const Tensor& scales,
                  const std::optional<Tensor>& offsets, const std::optional<Tensor>& bias,
                  int64_t bits, int64_t zero, const Tensor& out) {
  const QuantMatrix weight = make_matrix(codes, scales, offsets, bits, zero);
  const bool is_wide = out.scalar_type() == kFloat;
  const auto type = check_type(a, "a");
  check_tensor(a, "a", a.scalar_type(), {-1, weight.num_columns});
  check_tensor(out, "out", is_wide ? kFloat : a.scalar_type(), {a.size(0), weight.num_rows});
  if (bias) check_tensor(*bias, "bias", kFloat, {weight.num_rows});
  const QuantLinearParams params = {weight,
                                    a.const_data_ptr(),
                                    data_or_null<float>(bias),
                                    out.mutable_data_ptr(),
                                    a.size(0),
                                    is_wide,
                                    type};
  run(tgi::cuda::quant_linear, params, out);
}

void dequantise(const Tensor& codes, const Tensor& scales, const std::optional<Tensor>& offsets,
                int64_t bits, int64_t zero, const Tensor& out) {
  const QuantMatrix weight = make_matrix(codes, scales, offsets, bits, zero);
  const auto type = check_type(out, "out");
  check_tensor(out, "out", out.scalar_type(), {weight.num_rows, weight.num_columns});
  run(tgi::cuda::dequantise, DequantiseParams{weight, out.mutable_data_ptr(), type}, out);
}

}  // namespace

TORCH_LIBRARY_IMPL(tgi_cuda, CUDA, m) {
  m.impl("quant_linear", quant_linear);
  m.impl("dequantise", dequantise);
}
