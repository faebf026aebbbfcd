// Recording: what a step's operators read and write, checked once.
#include "bindings/program.h"

#include <ATen/ops/empty.h>

#include <algorithm>

#include "bindings/checks.h"
#include "cpu/team.h"

namespace tgi {

using at::kByte;
using at::kFloat;
using at::Tensor;
using step::Precision;
using step::Sync;

StepProgram::StepProgram(int64_t max_tokens, int64_t max_sequences, int64_t max_rows)
    : max_tokens_(max_tokens),
      max_sequences_(max_sequences),
      max_rows_(max_rows),
      num_members_(cpu::num_threads()),
      split_(static_cast<size_t>(num_members_) + 1) {
  check_positive(max_tokens, "max_tokens");
  check_positive(max_sequences, "max_sequences");
  check_positive(max_rows, "max_rows");
}

int64_t StepProgram::activation_bytes(int64_t tokens, int64_t columns,
                                      const std::string& precision) const {
  const int64_t tiles = (tokens + step::kTileTokens - 1) / step::kTileTokens;
  const step::Activation shape = {nullptr, precision_of(precision), columns};
  return std::max<int64_t>(tiles, num_members_) * shape.tile_bytes();
}

int64_t StepProgram::query_bytes(const Tensor& kv, int64_t block_size, int64_t head_dim,
                                 int64_t num_heads) const {
  return num_heads * kv_of(kv, block_size, head_dim).query_bytes();
}

void StepProgram::embed(const Tensor& weight, const std::string& format, int64_t columns,
                        int64_t num_ids, double factor, const Tensor& x) {
  const step::PackedMatrix table = matrix_of(weight, format, columns);
  TORCH_CHECK(num_ids > 0 && num_ids <= table.num_rows, "`num_ids` must be in [1, ", table.num_rows,
              "], got ", num_ids);
  check_tensor(x, "x", kFloat, {max_tokens_, columns});
  num_ids_ = num_ids;
  x_ = x;
  forward_.add(step::kernels().embed,
               step::EmbedParams{table, static_cast<float>(factor), x.mutable_data_ptr<float>()});
  keep({weight, x});
}

void StepProgram::norm(const Tensor& x, const Tensor& weight, double eps, bool for_logits,
                       const Tensor& out, const std::string& precision) {
  const int64_t columns = weight.numel();
  check_tensor(weight, "weight", kFloat, {columns});
  check_tensor(x, "x", kFloat, {max_tokens_, columns});
  const step::Activation activation =
      activation_of(out, for_logits ? max_rows_ : max_tokens_, columns, precision);
  const step::NormParams params = {x.const_data_ptr<float>(),
                                   weight.const_data_ptr<float>(),
                                   static_cast<float>(eps),
                                   for_logits,
                                   activation,
                                   activation.tile_bytes()};
  (for_logits ? head_ : forward_)
      .add(step::kernels().norm, params,
           for_logits ? Sync::kUnlessPrivateRows : Sync::kUnlessPrivateTokens);
  norms_.insert(out.const_data_ptr());
  keep({x, weight, out});
}

void StepProgram::qkv(const Tensor& in, const std::string& precision,
                      const std::vector<Tensor>& parts, const std::vector<std::string>& formats,
                      int64_t columns, const std::optional<Tensor>& bias, int64_t num_heads,
                      const Tensor& cosines, const Tensor& sines, const std::vector<Tensor>& norms,
                      double eps, double scale, const Tensor& kv, int64_t block_size,
                      int64_t head_dim, const Tensor& q) {
  TORCH_CHECK(parts.size() == formats.size() && (parts.size() == 1 || parts.size() == 3),
              "`parts` must be one or three matrices with a format each");
  TORCH_CHECK(norms.empty() || norms.size() == 2, "`norms` must be none or two");
  step::QkvParams params = {};
  params.kv = kv_of(kv, block_size, head_dim);
  params.num_parts = static_cast<int32_t>(parts.size());
  const int64_t unit_strips = norms.empty() ? 1 : head_dim / step::kStripRows;
  int64_t num_rows = 0;
  for (size_t i = 0; i < parts.size(); ++i) {
    params.parts[i] =
        linear(in, precision, parts[i], formats[i], columns, bias, num_rows, unit_strips);
    num_rows += params.parts[i].weight.num_rows;
  }
  const int64_t expected = (num_heads + 2 * params.kv.num_heads) * head_dim;
  TORCH_CHECK(num_heads > 0 && num_heads % params.kv.num_heads == 0 && num_rows == expected,
              "`parts` must have the rows of the heads, ", expected, ", got ", num_rows);
  check_tensor(cosines, "cosines", kFloat, {-1, head_dim / 2});
  check_tensor(sines, "sines", kFloat, {cosines.size(0), head_dim / 2});
  check_tensor(q, "q", kByte, {max_tokens_, num_heads * params.kv.query_bytes()});
  for (const Tensor& norm : norms) check_tensor(norm, "norms", kFloat, {head_dim});
  if (bias) check_tensor(*bias, "bias", kFloat, {expected});
  params.num_heads = num_heads;
  params.head_dim = head_dim;
  params.cosines = cosines.const_data_ptr<float>();
  params.sines = sines.const_data_ptr<float>();
  params.q_norm = norms.empty() ? nullptr : norms[0].const_data_ptr<float>();
  params.k_norm = norms.empty() ? nullptr : norms[1].const_data_ptr<float>();
  params.eps = static_cast<float>(eps);
  params.q_scale = static_cast<float>(scale * 1.4426950408889634);
  params.q = q.mutable_data_ptr();
  forward_.add(step::kernels().qkv, params);
  last_qkv_ = forward_.size();
  q_ = q;
  num_positions_ = std::min<int64_t>(num_positions_, cosines.size(0));
  keep(parts);
  keep(norms);
  keep({in, cosines, sines, kv, q});
  if (bias) keep({*bias});
}

void StepProgram::attention(const Tensor& q, const Tensor& pool, int64_t block_size,
                            int64_t head_dim, int64_t max_context, const Tensor& out,
                            const std::string& precision) {
  const step::KvLayerView kv = kv_of(pool, block_size, head_dim);
  check_tensor(q, "q", kByte, {max_tokens_, -1});
  const int64_t num_heads = q.size(1) / kv.query_bytes(), width = num_heads * head_dim;
  TORCH_CHECK(q.size(1) % kv.query_bytes() == 0 && num_heads % kv.num_heads == 0,
              "`q` must have a multiple of ", kv.num_heads, " heads of ", kv.query_bytes(),
              " bytes, got ", q.size(1), " bytes");
  if (workspace_ == nullptr) {
    workspace_ = std::make_unique<step::AttentionWorkspace>(num_members_, max_context, head_dim);
    max_context_ = max_context;
    num_heads_ = num_heads;
    kv_ = kv;
  }
  TORCH_CHECK(kv.num_heads == kv_.num_heads && head_dim == kv_.head_dim &&
                  kv.num_blocks == kv_.num_blocks && block_size == kv_.block_size &&
                  num_heads_ == num_heads && max_context == max_context_,
              "all layers of a program must have one shape of attention");
  forward_.add(step::kernels().attention,
               step::AttentionParams{q.const_data_ptr(), kv, num_heads_,
                                     activation_of(out, max_tokens_, width, precision),
                                     workspace_->partials()});
  keep({q, pool, out});
}

void StepProgram::linear_add(const Tensor& in, const std::string& precision, const Tensor& weight,
                             const std::string& format, int64_t columns,
                             const std::optional<Tensor>& bias, const Tensor& x) {
  // It writes to x, which other members may still be normalising for themselves.
  TORCH_CHECK(norms_.count(in.const_data_ptr()) == 0,
              "`linear_add` cannot take the result of `norm`");
  const step::LinearParams params = linear(in, precision, weight, format, columns, bias, 0, 1);
  check_tensor(x, "x", kFloat, {max_tokens_, params.weight.num_rows});
  if (bias) check_tensor(*bias, "bias", kFloat, {params.weight.num_rows});
  forward_.add(step::kernels().linear_add,
               step::LinearAddParams{params, x.mutable_data_ptr<float>()});
  keep({in, weight, x});
  if (bias) keep({*bias});
}

void StepProgram::gate_up(const Tensor& in, const std::string& precision, const Tensor& weight,
                          const std::string& format, int64_t columns,
                          const std::optional<Tensor>& bias, const std::string& activation,
                          const Tensor& out, const std::string& out_precision) {
  TORCH_CHECK(activation == "silu" || activation == "gelu_tanh",
              "`activation` must be silu or gelu_tanh, got ", activation);
  step::LinearParams params = linear(in, precision, weight, format, columns, bias, 0, 2);
  const int64_t rows = params.weight.num_rows;
  TORCH_CHECK(rows % (2 * step::kStripRows) == 0, "`weight` must have a multiple of 64 rows, got ",
              rows);
  if (bias) check_tensor(*bias, "bias", kFloat, {rows});
  const auto kind =
      activation == "silu" ? step::MlpActivation::kSilu : step::MlpActivation::kGeluTanh;
  forward_.add(
      step::kernels().gate_up,
      step::GateUpParams{params, kind, activation_of(out, max_tokens_, rows / 2, out_precision)});
  keep({in, weight, out});
  if (bias) keep({*bias});
}

void StepProgram::logits(const Tensor& in, const std::string& precision, const Tensor& weight,
                         const std::string& format, int64_t columns,
                         const std::optional<Tensor>& bias, double cap, const Tensor& out) {
  step::LinearParams params = linear(in, precision, weight, format, columns, bias, 0, 1);
  check_tensor(out, "logits", kFloat, {max_rows_, -1});
  TORCH_CHECK(out.size(1) > 0 && out.size(1) <= params.weight.num_rows,
              "`logits` must have at most ", params.weight.num_rows, " columns, got ", out.size(1));
  if (bias) check_tensor(*bias, "bias", kFloat, {params.weight.num_rows});
  head_.add(step::kernels().logits, step::LogitsParams{params, out.mutable_data_ptr<float>(),
                                                       out.size(1), static_cast<float>(cap)});
  logits_ = out;
  keep({in, weight, out});
  if (bias) keep({*bias});
}

step::Activation StepProgram::activation_of(const Tensor& buffer, int64_t tokens, int64_t columns,
                                            const std::string& precision) const {
  TORCH_CHECK(columns % step::kBlockColumns == 0,
              "an activation must have a multiple of 32 columns, got ", columns);
  check_tensor(buffer, "activation", kByte, {activation_bytes(tokens, columns, precision)});
  return {buffer.mutable_data_ptr<uint8_t>(), precision_of(precision), columns};
}

step::LinearParams StepProgram::linear(const Tensor& in, const std::string& precision,
                                       const Tensor& weight, const std::string& format,
                                       int64_t columns, const std::optional<Tensor>& bias,
                                       int64_t first_row, int64_t unit_strips) {
  step::LinearParams params = {};
  params.weight = matrix_of(weight, format, columns);
  params.in = {in.mutable_data_ptr<uint8_t>(), precision_of(precision), columns};
  check_tensor(in, "activation", kByte, {-1});
  const step::Format kind = params.weight.format;
  const bool is_float32 = params.in.precision == Precision::kFloat32;
  TORCH_CHECK(is_float32 || (params.in.precision == Precision::kInt8 && step::is_quantised(kind)) ||
                  (params.in.precision == Precision::kBF16 && kind == step::Format::kBF16),
              "a weight of format ", format, " cannot be multiplied in ", precision);
  if (norms_.count(in.const_data_ptr()) != 0) params.private_bytes = params.in.tile_bytes();
  if (bias) params.bias = bias->const_data_ptr<float>() + first_row;
  if (is_float32 && kind != step::Format::kF32 && kind != step::Format::kF16) {
    params.scratch_floats = unit_strips * step::kStripRows * columns;
    params.scratch = scratch_of(num_members_ * params.scratch_floats);
  }
  return params;
}

float* StepProgram::scratch_of(int64_t floats) {
  if (scratch_.empty() || scratch_.back().numel() < floats)
    scratch_.push_back(at::empty({floats}, kFloat));
  return scratch_.back().mutable_data_ptr<float>();
}

step::KvLayerView StepProgram::kv_of(const Tensor& pool, int64_t block_size,
                                     int64_t head_dim) const {
  TORCH_CHECK(block_size > 0 && block_size % 16 == 0, "`block_size` must be a multiple of 16, got ",
              block_size);
  TORCH_CHECK(head_dim > 0 && head_dim % step::kStripRows == 0 && head_dim <= 256,
              "`head_dim` must be a multiple of 32 up to 256, got ", head_dim);
  const bool is_int8 = pool.scalar_type() == at::kChar;
  TORCH_CHECK(is_int8 || pool.scalar_type() == kFloat || pool.scalar_type() == at::kBFloat16,
              "`kv` must be float32, bfloat16 or int8, got ", pool.scalar_type());
  const step::KvLayerView view = {static_cast<uint8_t*>(pool.mutable_data_ptr()),
                                  is_int8                        ? Precision::kInt8
                                  : pool.scalar_type() == kFloat ? Precision::kFloat32
                                                                 : Precision::kBF16,
                                  pool.size(0),
                                  pool.stride(0) * pool.element_size(),
                                  block_size,
                                  pool.size(2),
                                  head_dim};
  check_kv(pool, block_size / 16 * view.sub_block_bytes() / pool.element_size());
  return view;
}

void StepProgram::keep(const std::vector<Tensor>& tensors) {
  kept_.insert(kept_.end(), tensors.begin(), tensors.end());
}

}  // namespace tgi
