// torch bindings of routed experts on CUDA.
#include <torch/library.h>

#include <optional>
#include <string>

#include "bindings/activation.h"
#include "bindings/cuda/checks.h"
#include "bindings/cuda/quant.h"

namespace {

using at::kFloat;
using at::kInt;
using at::Tensor;
using tgi::cuda::check_tensor;
using tgi::cuda::check_type;
using tgi::cuda::data_or_null;
using tgi::cuda::ExpertsPlanParams;
using tgi::cuda::ExpertsProductParams;
using tgi::cuda::ExpertsSumParams;
using tgi::cuda::GatedAddParams;
using tgi::cuda::QuantMatrix;
using tgi::cuda::RouteKind;
using tgi::cuda::RouteParams;
using tgi::cuda::run;

RouteKind kind_of(c10::string_view name) {
  if (name == "softmax") return RouteKind::kSoftmax;
  if (name == "sigmoid") return RouteKind::kSigmoid;
  TORCH_CHECK(name == "sparsemixer", "`kind` must be softmax, sigmoid or sparsemixer, got ",
              std::string(name));
  return RouteKind::kSparseMixer;
}

void check_num_experts(int64_t num_experts) {
  TORCH_CHECK(1 <= num_experts && num_experts <= tgi::cuda::kMaxExperts,
              "`num_experts` must be in [1, ", tgi::cuda::kMaxExperts, "], got ", num_experts);
}

void route(const Tensor& logits, const Tensor& slots, const std::optional<Tensor>& correction,
           c10::string_view kind, int64_t num_groups, int64_t top_groups, bool sums_top_two,
           bool is_renormalised, double eps, double scale, double jitter, const Tensor& ids,
           const Tensor& weights) {
  check_tensor(logits, "logits", kFloat, {-1, -1});
  const int64_t num_tokens = logits.size(0), num_experts = logits.size(1);
  check_num_experts(num_experts);
  check_tensor(slots, "slots", at::kLong, {num_tokens});
  if (correction) check_tensor(*correction, "correction", kFloat, {num_experts});
  check_tensor(ids, "ids", kInt, {num_tokens, -1});
  check_tensor(weights, "weights", kFloat, {num_tokens, ids.size(1)});
  TORCH_CHECK(num_groups >= 1 && num_experts % num_groups == 0, "`num_groups` must divide ",
              num_experts, " experts, got ", num_groups);
  TORCH_CHECK(top_groups >= 1 && top_groups <= num_groups, "`top_groups` must be in [1, ",
              num_groups, "], got ", top_groups);
  const int64_t most = num_experts / num_groups * top_groups;
  TORCH_CHECK(ids.size(1) >= 1 && ids.size(1) <= most, "`ids` must have 1 to ", most,
              " columns, got ", ids.size(1));
  const RouteParams params = {
      .logits = logits.const_data_ptr<float>(),
      .slots = slots.const_data_ptr<int64_t>(),
      .correction = data_or_null<float>(correction),
      .ids = ids.mutable_data_ptr<int32_t>(),
      .weights = weights.mutable_data_ptr<float>(),
      .num_tokens = num_tokens,
      .num_experts = num_experts,
      .top_k = ids.size(1),
      .num_groups = num_groups,
      .top_groups = top_groups,
      .sums_top_two = sums_top_two,
      .is_renormalised = is_renormalised,
      .eps = static_cast<float>(eps),
      .scale = static_cast<float>(scale),
      .jitter = static_cast<float>(jitter),
      .kind = kind_of(kind),
  };
  run(tgi::cuda::route, params, ids);
}

void check_plan(const Tensor& pairs, const Tensor& tiles, int64_t num_experts, bool is_streamed) {
  check_num_experts(num_experts);
  check_tensor(pairs, "pairs", kInt, {-1, -1});
  TORCH_CHECK(pairs.numel() <= INT32_MAX, "`pairs` must have fewer than 2^31 entries");
  check_tensor(tiles, "tiles", kInt, {-1, 4});
  const int64_t rows = 1 + tgi::cuda::experts_max_tiles(pairs.numel(), num_experts, is_streamed);
  TORCH_CHECK(tiles.size(0) >= rows, "`tiles` must have ", rows, " rows, got ", tiles.size(0));
  TORCH_CHECK(reinterpret_cast<uintptr_t>(tiles.const_data_ptr()) % 16 == 0,
              "`tiles` must begin at a multiple of 16 bytes");
}

void experts_plan(const Tensor& ids, int64_t num_experts, bool is_streamed, const Tensor& pairs,
                  const Tensor& tiles) {
  check_plan(pairs, tiles, num_experts, is_streamed);
  check_tensor(ids, "ids", kInt, {pairs.size(0), pairs.size(1)});
  const ExpertsPlanParams params = {
      .ids = ids.const_data_ptr<int32_t>(),
      .pairs = pairs.mutable_data_ptr<int32_t>(),
      .tiles = tiles.mutable_data_ptr<int32_t>(),
      .num_pairs = pairs.numel(),
      .num_experts = num_experts,
      .is_streamed = is_streamed,
  };
  run(tgi::cuda::experts_plan, params, pairs);
}

// Returns the experts' matrix: elements of a's type if `bits` is 16, else codes.
QuantMatrix make_weight(const Tensor& weight, const std::optional<Tensor>& scales,
                        const std::optional<Tensor>& offsets, int64_t bits, int64_t zero,
                        const Tensor& a) {
  if (bits != 16) {
    TORCH_CHECK(scales.has_value(), "codes need `scales`");
    return tgi::cuda::make_matrix(weight, *scales, offsets, bits, zero);
  }
  TORCH_CHECK(!scales && !offsets && zero == 0, "elements have no scales, offsets or zero");
  check_tensor(weight, "weight", a.scalar_type(), {-1, -1});
  TORCH_CHECK(weight.size(1) % 8 == 0, "`weight` must have a multiple of 8 columns, got ",
              weight.size(1));
  QuantMatrix elements = {};
  elements.codes = weight.const_data_ptr();
  elements.num_rows = weight.size(0);
  elements.num_columns = weight.size(1);
  elements.bits = 16;
  return elements;
}

ExpertsProductParams make_product(const Tensor& a, int64_t num_rows, int64_t pairs_per_row,
                                  const QuantMatrix& weight, const std::optional<Tensor>& bias,
                                  int64_t num_experts, const Tensor& pairs, const Tensor& tiles,
                                  bool is_streamed, bool is_gated, const Tensor& out) {
  check_plan(pairs, tiles, num_experts, is_streamed);
  const auto type = check_type(a, "a");
  const int64_t rows = weight.num_rows / num_experts, columns = is_gated ? rows / 2 : rows;
  TORCH_CHECK(weight.num_rows % (num_experts * (is_gated ? 16 : 8)) == 0,
              "each expert's output must have a multiple of 8 columns, got ", weight.num_rows,
              " rows of ", num_experts, " experts");
  TORCH_CHECK(rows * weight.num_columns < 1 << 29, "an expert has fewer than 2^29 weights, got [",
              rows, ", ", weight.num_columns, "]");
  TORCH_CHECK(a.is_contiguous() && a.numel() == num_rows * weight.num_columns, "`a` must have ",
              num_rows, " rows of ", weight.num_columns, " columns");
  check_tensor(out, "out", a.scalar_type(), {pairs.size(0), pairs.size(1), columns});
  if (bias) check_tensor(*bias, "bias", kFloat, {num_experts, rows});
  ExpertsProductParams p = {};
  p.weight = weight;
  p.a = a.const_data_ptr();
  p.bias = data_or_null<float>(bias);
  p.pairs = pairs.const_data_ptr<int32_t>();
  p.tiles = tiles.const_data_ptr<int32_t>();
  p.out = out.mutable_data_ptr();
  p.num_pairs = pairs.numel();
  p.num_experts = num_experts;
  p.pairs_per_row = pairs_per_row;
  p.is_gated = is_gated;
  p.is_streamed = is_streamed;
  p.type = type;
  return p;
}

void experts_gate_up(const Tensor& a, const Tensor& weight, const std::optional<Tensor>& scales,
                     const std::optional<Tensor>& offsets, const std::optional<Tensor>& bias,
                     int64_t bits, int64_t zero, int64_t num_experts, const Tensor& pairs,
                     const Tensor& tiles, bool is_streamed, c10::string_view activation,
                     double limit, double slope, double offset, const Tensor& out) {
  check_tensor(a, "a", a.scalar_type(), {pairs.size(0), -1});
  ExpertsProductParams p = make_product(a, pairs.size(0), pairs.size(1),
                                        make_weight(weight, scales, offsets, bits, zero, a), bias,
                                        num_experts, pairs, tiles, is_streamed, true, out);
  const std::optional<tgi::MlpActivation> found = tgi::find_activation(std::string(activation));
  TORCH_CHECK(found && *found != tgi::MlpActivation::kXielu, "`activation` must be ",
              tgi::kGatedNames, ", got ", std::string(activation));
  p.activation = *found;
  p.limit = static_cast<float>(limit);
  p.slope = static_cast<float>(slope);
  p.offset = static_cast<float>(offset);
  run(tgi::cuda::experts_product, p, out);
}

void experts_down(const Tensor& a, const Tensor& weight, const std::optional<Tensor>& scales,
                  const std::optional<Tensor>& offsets, const std::optional<Tensor>& bias,
                  int64_t bits, int64_t zero, int64_t num_experts, const Tensor& pairs,
                  const Tensor& tiles, bool is_streamed, const Tensor& out) {
  check_tensor(a, "a", a.scalar_type(), {pairs.size(0), pairs.size(1), -1});
  const ExpertsProductParams p =
      make_product(a, pairs.numel(), 1, make_weight(weight, scales, offsets, bits, zero, a), bias,
                   num_experts, pairs, tiles, is_streamed, false, out);
  run(tgi::cuda::experts_product, p, out);
}

void experts_sum(const Tensor& rows, const Tensor& ids, const Tensor& weights, int64_t num_experts,
                 double factor, const Tensor& x) {
  const auto type = check_type(rows, "rows");
  check_num_experts(num_experts);
  check_tensor(x, "x", kFloat, {-1, -1});
  check_tensor(ids, "ids", kInt, {x.size(0), -1});
  check_tensor(weights, "weights", kFloat, {x.size(0), ids.size(1)});
  check_tensor(rows, "rows", rows.scalar_type(), {x.size(0), ids.size(1), x.size(1)});
  TORCH_CHECK(x.size(1) % 8 == 0, "`x` must have a multiple of 8 columns, got ", x.size(1));
  const ExpertsSumParams params = {
      .rows = rows.const_data_ptr(),
      .ids = ids.const_data_ptr<int32_t>(),
      .weights = weights.const_data_ptr<float>(),
      .x = x.mutable_data_ptr<float>(),
      .num_tokens = x.size(0),
      .num_experts = num_experts,
      .top_k = ids.size(1),
      .hidden = x.size(1),
      .factor = static_cast<float>(factor),
      .type = type,
  };
  run(tgi::cuda::experts_sum, params, x);
}

void gated_add(const Tensor& rows, const Tensor& gate, double factor, const Tensor& x) {
  check_tensor(x, "x", kFloat, {-1, -1});
  check_tensor(rows, "rows", kFloat, {x.size(0), x.size(1)});
  check_tensor(gate, "gate", kFloat, {x.size(0), 1});
  TORCH_CHECK(x.size(1) % 4 == 0, "`x` must have a multiple of 4 columns, got ", x.size(1));
  const GatedAddParams params = {
      .rows = rows.const_data_ptr<float>(),
      .gate = gate.const_data_ptr<float>(),
      .x = x.mutable_data_ptr<float>(),
      .num_tokens = x.size(0),
      .hidden = x.size(1),
      .factor = static_cast<float>(factor),
  };
  run(tgi::cuda::gated_add, params, x);
}

}  // namespace

TORCH_LIBRARY_IMPL(tgi_cuda, CUDA, m) {
  m.impl("route", route);
  m.impl("experts_plan", experts_plan);
  m.impl("experts_gate_up", experts_gate_up);
  m.impl("experts_down", experts_down);
  m.impl("experts_sum", experts_sum);
  m.impl("gated_add", gated_add);
}
