// torch bindings of products with plain weights on CUDA.
#include <torch/library.h>

#include "bindings/cuda/checks.h"

namespace {

using at::kFloat;
using at::Tensor;
using tgi::cuda::check_tensor;
using tgi::cuda::check_type;
using tgi::cuda::data_or_null;
using tgi::cuda::LinearParams;
using tgi::cuda::ResidualAddParams;
using tgi::cuda::run;

void linear(const Tensor& a, const Tensor& weight, const std::optional<Tensor>& bias, bool is_added,
            const Tensor& out) {
  const auto type = check_type(a, "a");
  check_tensor(a, "a", a.scalar_type(), {-1, -1});
  check_tensor(weight, "weight", a.scalar_type(), {-1, a.size(1)});
  TORCH_CHECK(a.size(1) % 8 == 0, "`a` must have a multiple of 8 columns, got ", a.size(1));
  const bool is_wide = out.scalar_type() == kFloat;
  TORCH_CHECK(is_wide || !is_added, "`out` must be float32 to be added to, got ",
              out.scalar_type());
  check_tensor(out, "out", is_wide ? kFloat : a.scalar_type(), {a.size(0), weight.size(0)});
  if (bias) check_tensor(*bias, "bias", kFloat, {weight.size(0)});
  const LinearParams params = {
      .a = a.const_data_ptr(),
      .weight = weight.const_data_ptr(),
      .bias = data_or_null<float>(bias),
      .out = out.mutable_data_ptr(),
      .num_tokens = a.size(0),
      .num_rows = weight.size(0),
      .num_columns = a.size(1),
      .is_wide = is_wide,
      .is_added = is_added,
      .type = type,
  };
  run(tgi::cuda::linear, params, out);
}

void residual_add(const Tensor& rows, double factor, const Tensor& x) {
  const auto type = check_type(rows, "rows");
  check_tensor(x, "x", kFloat, {-1, -1});
  check_tensor(rows, "rows", rows.scalar_type(), {x.size(0), x.size(1)});
  TORCH_CHECK(x.size(1) % 8 == 0, "`x` must have a multiple of 8 columns, got ", x.size(1));
  const ResidualAddParams params = {
      .rows = rows.const_data_ptr(),
      .x = x.mutable_data_ptr<float>(),
      .num_elements = x.numel(),
      .factor = static_cast<float>(factor),
      .type = type,
  };
  run(tgi::cuda::residual_add, params, x);
}

}  // namespace

TORCH_LIBRARY_IMPL(tgi_cuda, CUDA, m) {
  m.impl("linear", linear);
  m.impl("residual_add", residual_add);
}
