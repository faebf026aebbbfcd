// torch bindings of products with quantised weights on CUDA.
#include "bindings/cuda/quant.h"

#include <torch/library.h>

namespace {

using at::kFloat;
using at::Tensor;
using tgi::cuda::check_tensor;
using tgi::cuda::check_type;
using tgi::cuda::data_or_null;
using tgi::cuda::DequantiseParams;
using tgi::cuda::make_matrix;
using tgi::cuda::QuantLinearParams;
using tgi::cuda::QuantMatrix;
using tgi::cuda::run;

void quant_linear(const Tensor& a, const Tensor& codes, const Tensor& scales,
                  const std::optional<Tensor>& offsets, const std::optional<Tensor>& bias,
                  int64_t bits, int64_t zero, bool is_added, const Tensor& out) {
  const QuantMatrix weight = make_matrix(codes, scales, offsets, bits, zero);
  const bool is_wide = out.scalar_type() == kFloat;
  const auto type = check_type(a, "a");
  check_tensor(a, "a", a.scalar_type(), {-1, weight.num_columns});
  TORCH_CHECK(is_wide || !is_added, "`out` must be float32 to be added to, got ",
              out.scalar_type());
  check_tensor(out, "out", is_wide ? kFloat : a.scalar_type(), {a.size(0), weight.num_rows});
  if (bias) check_tensor(*bias, "bias", kFloat, {weight.num_rows});
  const QuantLinearParams params = {
      .weight = weight,
      .a = a.const_data_ptr(),
      .bias = data_or_null<float>(bias),
      .out = out.mutable_data_ptr(),
      .num_tokens = a.size(0),
      .is_wide = is_wide,
      .is_added = is_added,
      .type = type,
  };
  run(tgi::cuda::quant_linear, params, out);
}

void dequantise(const Tensor& codes, const Tensor& scales, const std::optional<Tensor>& offsets,
                int64_t bits, int64_t zero, const Tensor& out) {
  const QuantMatrix weight = make_matrix(codes, scales, offsets, bits, zero);
  const auto type = check_type(out, "out");
  check_tensor(out, "out", out.scalar_type(), {weight.num_rows, weight.num_columns});
  run(tgi::cuda::dequantise,
      DequantiseParams{
          .weight = weight,
          .out = out.mutable_data_ptr(),
          .type = type,
      },
      out);
}

}  // namespace

TORCH_LIBRARY_IMPL(tgi_cuda, CUDA, m) {
  m.impl("quant_linear", quant_linear);
  m.impl("dequantise", dequantise);
}
