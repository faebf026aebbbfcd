// torch bindings of paged attention on CUDA.
#include <torch/library.h>

#include <optional>

#include "bindings/cuda/checks.h"

namespace {

using at::kInt;
using at::Tensor;
using tgi::cuda::AttentionGatherParams;
using tgi::cuda::AttentionMergeParams;
using tgi::cuda::AttentionParams;
using tgi::cuda::check_kv_type;
using tgi::cuda::check_tensor;
using tgi::cuda::check_type;
using tgi::cuda::data_or_null;
using tgi::cuda::run;

// A layer's attention parameters.
struct Spec {
  int64_t window;
  double scale, soft_cap;
  const std::optional<Tensor>&sinks, &slopes;
  double key_scale, value_scale;
};

AttentionParams make_params(const Tensor& q, const Tensor& kv, const Tensor& context_len,
                            const Tensor& block_table, const Spec& spec, const Tensor& out) {
  AttentionParams p = {};
  p.type = check_type(q, "q");
  p.kv_type = check_kv_type(kv, q);
  check_tensor(q, "q", q.scalar_type(), {-1, -1, -1});
  check_tensor(kv, "kv", kv.scalar_type(), {-1, 2, -1, -1, q.size(2)});
  TORCH_CHECK(kv.size(2) > 0 && q.size(1) % kv.size(2) == 0, "`q` must have a multiple of ",
              kv.size(2), " heads, got ", q.size(1));
  TORCH_CHECK(kv.size(0) > 0 && kv.size(0) * kv.size(3) < (int64_t{1} << 31),
              "`kv` must have 1 to 2^31 slots");
  check_tensor(context_len, "context_len", kInt, {-1});
  check_tensor(block_table, "block_table", kInt, {context_len.size(0), -1});
  check_tensor(out, "out", q.scalar_type(), {q.size(0), q.size(1), q.size(2)});
  TORCH_CHECK(spec.window >= 0 && spec.window < (int64_t{1} << 31),
              "`window` must be 0 to 2^31 - 1, got ", spec.window);
  TORCH_CHECK(spec.soft_cap >= 0, "`soft_cap` must not be negative, got ", spec.soft_cap);
  if (spec.sinks) check_tensor(*spec.sinks, "sinks", at::kFloat, {q.size(1)});
  if (spec.slopes) check_tensor(*spec.slopes, "slopes", at::kFloat, {q.size(1)});
  p.q = q.const_data_ptr();
  p.kv = kv.const_data_ptr();
  p.context_len = context_len.const_data_ptr<int32_t>();
  p.block_table = block_table.const_data_ptr<int32_t>();
  p.out = out.mutable_data_ptr();
  p.num_tokens = q.size(0);
  p.num_sequences = context_len.size(0);
  p.num_heads = q.size(1);
  p.num_kv_heads = kv.size(2);
  p.head_dim = q.size(2);
  p.num_blocks = kv.size(0);
  p.block_size = kv.size(3);
  p.block_table_stride = block_table.size(1);
  p.sinks = data_or_null<float>(spec.sinks);
  p.slopes = data_or_null<float>(spec.slopes);
  p.window = spec.window;
  p.scale = static_cast<float>(spec.scale);
  p.soft_cap = static_cast<float>(spec.soft_cap);
  p.key_scale = static_cast<float>(spec.key_scale);
  p.value_scale = static_cast<float>(spec.value_scale);
  return p;
}

void check_plan(const Tensor& plan, const AttentionParams& p) {
  check_tensor(plan, "plan", kInt, {-1});
  TORCH_CHECK(plan.size(0) > p.num_sequences, "`plan` must have ", p.num_sequences + 1,
              " elements, got ", plan.size(0));
}

void check_workspace(const Tensor& workspace, const AttentionParams& p) {
  const int64_t needed = tgi::cuda::attention_workspace_bytes(
      p.num_sequences, p.block_table_stride, p.block_size, p.num_heads, p.head_dim);
  check_tensor(workspace, "workspace", at::kByte, {-1});
  TORCH_CHECK(workspace.size(0) >= needed, "`workspace` must have ", needed, " bytes, got ",
              workspace.size(0));
}

void attention_plan(const Tensor& context_len, const Tensor& block_table, int64_t block_size,
                    int64_t window, const Tensor& plan) {
  check_tensor(context_len, "context_len", kInt, {-1});
  check_tensor(block_table, "block_table", kInt, {context_len.size(0), -1});
  TORCH_CHECK(block_size > 0 && window >= 0,
              "`block_size` must be positive and `window` not negative");
  AttentionParams p = {};
  p.context_len = context_len.const_data_ptr<int32_t>();
  p.num_sequences = context_len.size(0);
  p.block_size = block_size;
  p.block_table_stride = block_table.size(1);
  p.window = window;
  check_plan(plan, p);
  p.plan = plan.mutable_data_ptr<int32_t>();
  run(tgi::cuda::attention_plan, p, plan);
}

void attention_decode(const Tensor& q, const Tensor& kv, const Tensor& context_len,
                      const Tensor& block_table, int64_t window, double scale, double soft_cap,
                      const std::optional<Tensor>& sinks, const std::optional<Tensor>& slopes,
                      double key_scale, double value_scale, const Tensor& plan,
                      const Tensor& workspace, const Tensor& out) {
  AttentionParams p =
      make_params(q, kv, context_len, block_table,
                  {window, scale, soft_cap, sinks, slopes, key_scale, value_scale}, out);
  TORCH_CHECK(p.num_tokens == p.num_sequences, "`q` must have one token a sequence, got ",
              p.num_tokens, " for ", p.num_sequences);
  check_plan(plan, p);
  check_workspace(workspace, p);
  p.plan = plan.mutable_data_ptr<int32_t>();
  p.workspace = workspace.mutable_data_ptr();
  run(tgi::cuda::attention_decode, p, out);
}

void attention_prefill(const Tensor& q, const Tensor& kv, const Tensor& query_start,
                       const Tensor& context_len, const Tensor& block_table, int64_t max_query_len,
                       int64_t window, double scale, double soft_cap,
                       const std::optional<Tensor>& sinks, const std::optional<Tensor>& slopes,
                       double key_scale, double value_scale, const Tensor& out) {
  AttentionParams p =
      make_params(q, kv, context_len, block_table,
                  {window, scale, soft_cap, sinks, slopes, key_scale, value_scale}, out);
  check_tensor(query_start, "query_start", kInt, {p.num_sequences + 1});
  TORCH_CHECK(max_query_len >= 0 && max_query_len <= p.num_tokens,
              "`max_query_len` must be in [0, ", p.num_tokens, "], got ", max_query_len);
  p.query_start = query_start.const_data_ptr<int32_t>();
  p.max_query_len = max_query_len;
  run(tgi::cuda::attention_prefill, p, out);
}

void attention_gather(const Tensor& kv, const Tensor& block_table, int64_t context_len,
                      int64_t num_rows, const Tensor& out) {
  AttentionGatherParams p = {};
  p.type = check_type(out, "out");
  p.kv_type = check_kv_type(kv, out);
  check_tensor(kv, "kv", kv.scalar_type(), {-1, 2, -1, -1, -1});
  check_tensor(block_table, "block_table", kInt, {-1});
  check_tensor(out, "out", out.scalar_type(), {2, kv.size(2), -1, kv.size(4)});
  TORCH_CHECK(kv.size(0) > 0 && kv.size(4) % 8 == 0,
              "`kv` must have a block and a multiple of 8 dims");
  TORCH_CHECK(context_len >= 0 && context_len <= block_table.size(0) * kv.size(3),
              "`context_len` must be in [0, ", block_table.size(0) * kv.size(3), "], got ",
              context_len);
  TORCH_CHECK(num_rows >= context_len && num_rows <= out.size(2), "`num_rows` must be in [",
              context_len, ", ", out.size(2), "], got ", num_rows);
  p.kv = kv.const_data_ptr();
  p.block_table = block_table.const_data_ptr<int32_t>();
  p.out = out.mutable_data_ptr();
  p.context_len = context_len;
  p.num_rows = num_rows;
  p.capacity = out.size(2);
  p.num_kv_heads = kv.size(2);
  p.head_dim = kv.size(4);
  p.num_blocks = kv.size(0);
  p.block_size = kv.size(3);
  run(tgi::cuda::attention_gather, p, out);
}

void attention_merge(at::TensorList parts, at::TensorList lses, double value_scale,
                     const Tensor& out) {
  AttentionMergeParams p = {};
  p.type = check_type(out, "out");
  check_tensor(out, "out", out.scalar_type(), {-1, -1, -1});
  TORCH_CHECK(
      !parts.empty() && parts.size() <= tgi::cuda::kMaxMergedParts && lses.size() == parts.size(),
      "there must be 1 to ", tgi::cuda::kMaxMergedParts, " `parts` with an LSE each, got ",
      parts.size(), " and ", lses.size());
  for (size_t i = 0; i < parts.size(); ++i) {
    const Tensor &part = parts[i], &lse = lses[i];
    check_tensor(part, "parts", out.scalar_type(), {out.size(0), out.size(1), out.size(2)});
    // Part of the rows of each head, so not contiguous.
    TORCH_CHECK(lse.device() == out.device() && lse.scalar_type() == at::kFloat && lse.dim() == 2 &&
                    lse.size(0) == out.size(1) && lse.size(1) == out.size(0) && lse.stride(1) == 1,
                "`lses` must be float32 [", out.size(1), ", ", out.size(0),
                "] with adjacent tokens, got ", lse.scalar_type(), " ", lse.sizes());
    p.parts[i] = part.const_data_ptr();
    p.lses[i] = lse.const_data_ptr<float>();
    p.lse_strides[i] = lse.stride(0);
  }
  TORCH_CHECK(out.size(2) % 8 == 0, "`out` must have a multiple of 8 dims, got ", out.size(2));
  p.out = out.mutable_data_ptr();
  p.num_parts = static_cast<int64_t>(parts.size());
  p.num_tokens = out.size(0);
  p.num_heads = out.size(1);
  p.head_dim = out.size(2);
  p.value_scale = static_cast<float>(value_scale);
  run(tgi::cuda::attention_merge, p, out);
}

}  // namespace

TORCH_LIBRARY_IMPL(tgi_cuda, CUDA, m) {
  m.impl("attention_plan", attention_plan);
  m.impl("attention_decode", attention_decode);
  m.impl("attention_prefill", attention_prefill);
  m.impl("attention_gather", attention_gather);
  m.impl("attention_merge", attention_merge);
}
