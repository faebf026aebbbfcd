// CUDA adapters of the layers' operators: check, fill the parameters, launch.
#include <torch/library.h>

#include <optional>
#include <string>

#include "bindings/activation.h"
#include "bindings/cuda/checks.h"

namespace {

using at::kFloat;
using at::kInt;
using at::Tensor;
using tgi::cuda::ActMulParams;
using tgi::cuda::check_kv_type;
using tgi::cuda::check_tensor;
using tgi::cuda::check_type;
using tgi::cuda::data_or_null;
using tgi::cuda::EmbedParams;
using tgi::cuda::RmsNormParams;
using tgi::cuda::RopeParams;
using tgi::cuda::run;
using tgi::cuda::Type;

void embed(const Tensor& ids, const Tensor& table, const Tensor& out) {
  const Type type = check_type(table, "table");
  check_tensor(table, "table", table.scalar_type(), {-1, -1});
  check_tensor(ids, "ids", kInt, {-1});
  check_tensor(out, "out", kFloat, {ids.size(0), table.size(1)});
  const EmbedParams params = {ids.const_data_ptr<int32_t>(),
                              table.const_data_ptr(),
                              out.mutable_data_ptr<float>(),
                              ids.size(0),
                              table.size(0),
                              table.size(1),
                              type};
  run(tgi::cuda::embed, params, out);
}

void rms_norm(const Tensor& x, const Tensor& weight, double eps, const std::optional<Tensor>& rows,
              const Tensor& out) {
  const Type type = check_type(out, "out");
  check_tensor(weight, "weight", kFloat, {-1});
  check_tensor(x, "x", kFloat, {-1, weight.size(0)});
  if (rows) check_tensor(*rows, "rows", kInt, {-1});
  const int64_t num_rows = rows ? rows->size(0) : x.size(0);
  check_tensor(out, "out", out.scalar_type(), {num_rows, weight.size(0)});
  const RmsNormParams params = {x.const_data_ptr<float>(),
                                weight.const_data_ptr<float>(),
                                data_or_null<int32_t>(rows),
                                out.mutable_data_ptr(),
                                x.size(0),
                                num_rows,
                                weight.size(0),
                                static_cast<float>(eps),
                                type};
  run(tgi::cuda::rms_norm, params, out);
}

void act_mul(const Tensor& gate_up, c10::string_view activation, const Tensor& out) {
  const Type type = check_type(out, "out");
  check_tensor(out, "out", out.scalar_type(), {-1, -1});
  check_tensor(gate_up, "gate_up", out.scalar_type(), {out.size(0), 2 * out.size(1)});
  const std::optional<tgi::MlpActivation> found = tgi::find_activation(std::string(activation));
  const bool has_kernel =
      found == tgi::MlpActivation::kSilu || found == tgi::MlpActivation::kGeluTanh;
  TORCH_CHECK(has_kernel, "`activation` must be silu or gelu_tanh, got ", std::string(activation));
  const ActMulParams params = {
      gate_up.const_data_ptr(), out.mutable_data_ptr(), out.size(0), out.size(1), *found, type};
  run(tgi::cuda::act_mul, params, out);
}

void rope_kv_write(const Tensor& qkv, const Tensor& positions, const Tensor& slots,
                   const Tensor& cos, const Tensor& sin, const std::optional<Tensor>& q_norm,
                   const std::optional<Tensor>& k_norm, double eps, double key_scale,
                   double value_scale, const Tensor& q, const Tensor& kv) {
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
  TORCH_CHECK(q_norm.has_value() == k_norm.has_value(), "`q_norm` and `k_norm` come together");
  if (q_norm) check_tensor(*q_norm, "q_norm", kFloat, {head_dim});
  if (k_norm) check_tensor(*k_norm, "k_norm", kFloat, {head_dim});
  const RopeParams params = {qkv.const_data_ptr(),
                             positions.const_data_ptr<int32_t>(),
                             slots.const_data_ptr<int64_t>(),
                             cos.const_data_ptr<float>(),
                             sin.const_data_ptr<float>(),
                             data_or_null<float>(q_norm),
                             data_or_null<float>(k_norm),
                             q.mutable_data_ptr(),
                             kv.mutable_data_ptr(),
                             num_tokens,
                             cos.size(0),
                             num_heads,
                             kv.size(2),
                             head_dim,
                             2 * cos.size(1),
                             kv.size(0),
                             kv.size(3),
                             static_cast<float>(eps),
                             static_cast<float>(key_scale),
                             static_cast<float>(value_scale),
                             type,
                             kv_type};
  run(tgi::cuda::rope_kv_write, params, q);
}

}  // namespace

TORCH_LIBRARY_IMPL(tgi_cuda, CUDA, m) {
  m.impl("embed", embed);
  m.impl("rms_norm", rms_norm);
  m.impl("act_mul", act_mul);
  m.impl("rope_kv_write", rope_kv_write);
}
