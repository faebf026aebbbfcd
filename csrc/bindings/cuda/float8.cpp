// torch bindings of products of FP8 activations with FP8 weights.
#include <ATen/ops/_scaled_mm.h>
#include <torch/library.h>

#include "bindings/cuda/checks.h"
#include "cuda/dependent_launch.h"

namespace {

using at::kFloat;
using at::kFloat8_e4m3fn;
using at::Tensor;
using tgi::cuda::check_tensor;
using tgi::cuda::check_type;
using tgi::cuda::kMaxQuantised;
using tgi::cuda::kTokenMultiple;
using tgi::cuda::QuantiseParams;
using tgi::cuda::run;

constexpr int64_t kGroup = 128;  // columns, and rows of weights, that share a scale

// Returns the number of tokens that a product with scales of groups has: cuBLAS refuses others.
int64_t padded(int64_t num_tokens) {
  return (num_tokens + kTokenMultiple - 1) / kTokenMultiple * kTokenMultiple;
}

// Checks codes and their scales, whose first numbers are used: one per token, or [groups, padded
// tokens].
void check_codes(const Tensor& codes, const Tensor& scales, bool has_groups) {
  check_tensor(codes, "codes", kFloat8_e4m3fn, {-1, -1});
  const int64_t num_tokens = codes.size(0), num_columns = codes.size(1);
  TORCH_CHECK(!has_groups || num_columns % kGroup == 0, "groups need a multiple of ", kGroup,
              " columns, got ", num_columns);
  check_tensor(scales, "scales", kFloat, {-1});
  const int64_t num_scales = has_groups ? num_columns / kGroup * padded(num_tokens) : num_tokens;
  TORCH_CHECK(scales.size(0) >= num_scales, "`scales` must have ", num_scales, " numbers, got ",
              scales.size(0));
}

void quantise(const Tensor& x, bool has_groups, const Tensor& codes, const Tensor& scales) {
  const auto type = check_type(x, "x");
  check_codes(codes, scales, has_groups);
  check_tensor(x, "x", x.scalar_type(), {codes.size(0), codes.size(1)});
  TORCH_CHECK(has_groups || (x.size(1) % 8 == 0 && x.size(1) <= kMaxQuantised),
              "`x` must have a multiple of 8 columns, at most ", kMaxQuantised, ", got ",
              x.size(1));
  const QuantiseParams params = {
      .x = x.const_data_ptr(),
      .codes = static_cast<uint8_t*>(codes.mutable_data_ptr()),
      .scales = scales.mutable_data_ptr<float>(),
      .num_tokens = x.size(0),
      .num_columns = x.size(1),
      .has_groups = has_groups,
      .type = type,
  };
  run(tgi::cuda::quantise, params, codes);
}

// out = a W^T, with a scale per token and row.
void multiply_rows(const Tensor& codes, const Tensor& scales, const Tensor& weight,
                   const Tensor& weight_scales, const Tensor& out) {
  check_tensor(weight_scales, "weight_scales", kFloat, {weight.size(0)});
  Tensor target = out;
  at::_scaled_mm_out(target, codes, weight.t(), scales.narrow(0, 0, codes.size(0)).unsqueeze(1),
                     weight_scales.unsqueeze(0), std::nullopt, std::nullopt, out.scalar_type(),
                     /*use_fast_accum=*/true);
}

// Returns a matrix with further rows, which its memory must have.
Tensor with_rows(const Tensor& matrix, int64_t count, const char* name) {
  const int64_t width = matrix.size(1);
  const int64_t end = (matrix.storage_offset() + count * width) * matrix.element_size();
  TORCH_CHECK(end <= static_cast<int64_t>(matrix.storage().nbytes()), "`", name,
              "` must have memory for ", count, " tokens");
  return matrix.as_strided({count, width}, {width, 1});
}

// The same with a scale per 128 columns of a token, and per 128 x 128 weights. Tokens that pad the
// product are whatever lies behind the others, and so are their results.
void multiply_groups(const Tensor& codes, const Tensor& scales, const Tensor& weight,
                     const Tensor& weight_scales, const Tensor& out) {
  const int64_t num_rows = weight.size(0), num_columns = codes.size(1);
  check_tensor(weight_scales, "weight_scales", kFloat, {num_rows / kGroup, num_columns / kGroup});
  const int64_t count = padded(codes.size(0));
  Tensor target = with_rows(out, count, "out");
  at::_scaled_mm_out(target, with_rows(codes, count, "codes"), weight.t(),
                     scales.as_strided({count, num_columns / kGroup}, {1, count}),
                     weight_scales.t(), std::nullopt, std::nullopt, out.scalar_type(),
                     /*use_fast_accum=*/false);
}

void multiply_codes(const Tensor& codes, const Tensor& scales, const Tensor& weight,
                    const Tensor& weight_scales, const Tensor& out) {
  const bool has_groups = weight_scales.dim() == 2;
  check_codes(codes, scales, has_groups);
  check_tensor(weight, "weight", kFloat8_e4m3fn, {-1, codes.size(1)});
  check_type(out, "out");
  check_tensor(out, "out", out.scalar_type(), {codes.size(0), weight.size(0)});
  if (codes.size(0) == 0) return;
  (has_groups ? multiply_groups : multiply_rows)(codes, scales, weight, weight_scales, out);
  tgi::cuda::follow_library();
}

}  // namespace

TORCH_LIBRARY_IMPL(tgi_cuda, CUDA, m) {
  m.impl("quantise", quantise);
  m.impl("multiply_codes", multiply_codes);
}
