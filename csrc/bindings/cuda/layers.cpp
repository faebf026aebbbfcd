// torch bindings of the layer operators on CUDA: check, fill in the parameters, launch.
#include <torch/library.h>

#include <optional>
#include <string>

#include "bindings/activation.h"
#include "bindings/cuda/checks.h"

namespace {

using at::kFloat;
using at::kInt;
using at::Tensor;
using tgi::cuda::ActivateParams;
using tgi::cuda::check_kv_type;
using tgi::cuda::check_tensor;
using tgi::cuda::check_type;
using tgi::cuda::data_or_null;
using tgi::cuda::EmbedParams;
using tgi::cuda::NormParams;
using tgi::cuda::RopeParams;
using tgi::cuda::run;
using tgi::cuda::Type;

void embed(const Tensor& ids, const Tensor& table, const Tensor& out) {
  const Type type = check_type(table, "table");
  check_tensor(table, "table", table.scalar_type(), {-1, -1});
  check_tensor(ids, "ids", kInt, {-1});
  check_tensor(out, "out", kFloat, {ids.size(0), table.size(1)});
  const EmbedParams params = {
      .ids = ids.const_data_ptr<int32_t>(),
      .table = table.const_data_ptr(),
      .out = out.mutable_data_ptr<float>(),
      .num_tokens = ids.size(0),
      .num_rows = table.size(0),
      .hidden = table.size(1),
      .type = type,
  };
  run(tgi::cuda::embed, params, out);
}

NormParams norm_params(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                       double eps, const Tensor& out) {
  check_tensor(weight, "weight", kFloat, {-1});
  check_tensor(x, "x", kFloat, {-1, weight.size(0)});
  if (bias) check_tensor(*bias, "bias", kFloat, {weight.size(0)});
  NormParams p = {};
  p.x = x.const_data_ptr<float>();
  p.weight = weight.const_data_ptr<float>();
  p.bias = data_or_null<float>(bias);
  p.out = out.mutable_data_ptr();
  p.num_tokens = p.num_rows = x.size(0);
  p.hidden = weight.size(0);
  p.eps = static_cast<float>(eps);
  return p;
}

void norm(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, double eps,
          const std::optional<Tensor>& rows, const Tensor& out) {
  NormParams p = norm_params(x, weight, bias, eps, out);
  p.is_wide = out.scalar_type() == kFloat;
  if (!p.is_wide) p.type = check_type(out, "out");
  if (rows) {
    check_tensor(*rows, "rows", kInt, {-1});
    TORCH_CHECK(!out.is_alias_of(x), "`out` may be `x` only where all rows are normed in order");
    p.rows = rows->const_data_ptr<int32_t>();
    p.num_rows = rows->size(0);
  }
  check_tensor(out, "out", out.scalar_type(), {p.num_rows, p.hidden});
  run(tgi::cuda::norm, p, out);
}

void norm_add(const Tensor& rows, const Tensor& weight, const std::optional<Tensor>& bias,
              double eps, double factor, const Tensor& x) {
  NormParams p = norm_params(rows, weight, bias, eps, x);
  check_tensor(x, "x", kFloat, {p.num_rows, p.hidden});
  p.factor = static_cast<float>(factor);
  p.is_wide = p.is_added = 1;
  run(tgi::cuda::norm, p, x);
}

void run_activation(const Tensor& x, c10::string_view name, double above, double below,
                    bool is_gated, const Tensor& out) {
  ActivateParams p = {};
  p.type = check_type(out, "out");
  check_tensor(out, "out", out.scalar_type(), {-1, -1});
  check_tensor(x, is_gated ? "gate_up" : "x", out.scalar_type(),
               {out.size(0), (is_gated ? 2 : 1) * out.size(1)});
  const std::optional<tgi::MlpActivation> found = tgi::find_activation(std::string(name));
  TORCH_CHECK(found && !(is_gated && *found == tgi::MlpActivation::kXielu), "`activation` must be ",
              is_gated ? tgi::kGatedNames : tgi::kActivationNames, ", got ", std::string(name));
  p.x = x.const_data_ptr();
  p.out = out.mutable_data_ptr();
  p.num_tokens = out.size(0);
  p.intermediate = out.size(1);
  p.activation = *found;
  p.above = static_cast<float>(above);
  p.below = static_cast<float>(below);
  p.is_gated = is_gated;
  run(tgi::cuda::activate, p, out);
}

void gate(const Tensor& gate_up, c10::string_view activation, const Tensor& out) {
  run_activation(gate_up, activation, 0, 0, true, out);
}

void activate(const Tensor& x, c10::string_view activation, double above, double below,
              const Tensor& out) {
  run_activation(x, activation, above, below, false, out);
}

// Checks a weight of head norms. They must all be present or all absent, with one weight for all
// heads or one per head.
void check_norm(const std::optional<Tensor>& norm, const char* name, int64_t num_heads,
                int64_t head_dim, bool is_there, bool is_each) {
  TORCH_CHECK(norm.has_value() == is_there,
              "`q_norm` and `k_norm` come together, and so do `q_bias` and `k_bias`, with them");
  if (norm) check_tensor(*norm, name, kFloat, {is_each ? num_heads * head_dim : head_dim});
}

void rope_kv_write(const Tensor& qkv, const Tensor& positions, const Tensor& slots,
                   const Tensor& cos, const Tensor& sin, const std::optional<Tensor>& q_norm,
                   const std::optional<Tensor>& k_norm, const std::optional<Tensor>& q_bias,
                   const std::optional<Tensor>& k_bias, bool is_norm_last, double eps,
                   double key_scale, double value_scale, const Tensor& q, const Tensor& kv) {
  const Type type = check_type(q, "q"), kv_type = check_kv_type(kv, q);
  check_tensor(q, "q", q.scalar_type(), {-1, -1, -1});
  const int64_t num_tokens = q.size(0), num_heads = q.size(1), head_dim = q.size(2);
  check_tensor(kv, "kv", kv.scalar_type(), {-1, 2, -1, -1, head_dim});
  check_tensor(qkv, "qkv", q.scalar_type(), {num_tokens, (num_heads + 2 * kv.size(2)) * head_dim});
  check_tensor(cos, "cos", kFloat, {-1, -1});
  check_tensor(sin, "sin", kFloat, {cos.size(0), cos.size(1)});
  TORCH_CHECK(cos.size(0) > 0, "`cos` must have a position");
  check_tensor(positions, "positions", kInt, {num_tokens});
  check_tensor(slots, "slots", at::kLong, {num_tokens});
  const bool is_normed = q_norm.has_value(), has_bias = q_bias.has_value();
  TORCH_CHECK(is_normed || !has_bias, "`q_bias` comes with `q_norm` only");
  const bool is_each = is_normed && q_norm->numel() != head_dim;
  check_norm(q_norm, "q_norm", num_heads, head_dim, is_normed, is_each);
  check_norm(k_norm, "k_norm", kv.size(2), head_dim, is_normed, is_each);
  check_norm(q_bias, "q_bias", num_heads, head_dim, has_bias, is_each);
  check_norm(k_bias, "k_bias", kv.size(2), head_dim, has_bias, is_each);
  const RopeParams params = {
      .qkv = qkv.const_data_ptr(),
      .positions = positions.const_data_ptr<int32_t>(),
      .slots = slots.const_data_ptr<int64_t>(),
      .cos = cos.const_data_ptr<float>(),
      .sin = sin.const_data_ptr<float>(),
      .q_norm = data_or_null<float>(q_norm),
      .k_norm = data_or_null<float>(k_norm),
      .q_bias = data_or_null<float>(q_bias),
      .k_bias = data_or_null<float>(k_bias),
      .q = q.mutable_data_ptr(),
      .kv = kv.mutable_data_ptr(),
      .num_tokens = num_tokens,
      .num_positions = cos.size(0),
      .num_heads = num_heads,
      .num_kv_heads = kv.size(2),
      .head_dim = head_dim,
      .rotary_dim = 2 * cos.size(1),
      .num_blocks = kv.size(0),
      .block_size = kv.size(3),
      .norm_stride = is_each ? head_dim : 0,
      .is_norm_last = is_norm_last,
      .eps = static_cast<float>(eps),
      .key_scale = static_cast<float>(key_scale),
      .value_scale = static_cast<float>(value_scale),
      .type = type,
      .kv_type = kv_type,
  };
  run(tgi::cuda::rope_kv_write, params, q);
}

}  // namespace

TORCH_LIBRARY_IMPL(tgi_cuda, CUDA, m) {
  m.impl("embed", embed);
  m.impl("norm", norm);
  m.impl("norm_add", norm_add);
  m.impl("gate", gate);
  m.impl("activate", activate);
  m.impl("rope_kv_write", rope_kv_write);
}
