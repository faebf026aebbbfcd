// CPU adapter of paged attention.
#include "cpu/attention.h"

#include <torch/library.h>

#include <vector>

#include "bindings/checks.h"
#include "cpu/team.h"
#include "params.h"

namespace {

using at::kFloat;
using at::kInt;
using at::Tensor;
using tgi::check_kv;
using tgi::check_range;
using tgi::check_tensor;

// Lengths fit together, and every block that a context needs is in the pool.
void check_tables(const tgi::AttentionParams& p, int64_t num_tokens, int64_t num_blocks) {
  TORCH_CHECK(p.query_start[0] == 0 && p.query_start[p.num_sequences] == num_tokens,
              "`query_start` must run from 0 to ", num_tokens, ", got ", p.query_start[0], " to ",
              p.query_start[p.num_sequences]);
  for (int64_t s = 0; s < p.num_sequences; ++s) {
    const int64_t num_queries = int64_t{p.query_start[s + 1]} - p.query_start[s];
    TORCH_CHECK(num_queries >= 0, "`query_start` must ascend, got ", p.query_start[s], " before ",
                p.query_start[s + 1]);
    const int64_t context = p.context_len[s];
    TORCH_CHECK(context >= num_queries && context <= p.block_table_stride * p.block_size,
                "`context_len`[", s, "] must be in [", num_queries, ", ",
                p.block_table_stride * p.block_size, "], got ", context);
    const int64_t num_used = (context + p.block_size - 1) / p.block_size;
    check_range(p.block_table + s * p.block_table_stride, num_used, num_blocks, "block_table");
  }
}

void attention(const Tensor& q, const Tensor& kv, const Tensor& query_start,
               const Tensor& context_len, const Tensor& block_table, int64_t block_size,
               double scale, const Tensor& out) {
  TORCH_CHECK(block_size == 16 || block_size == 32 || block_size == 64,
              "`block_size` must be 16, 32 or 64, got ", block_size);
  check_tensor(q, "q", kFloat, {-1, -1, -1});
  const int64_t num_tokens = q.size(0), num_heads = q.size(1), head_dim = q.size(2);
  TORCH_CHECK(head_dim % 16 == 0 && head_dim >= 16 && head_dim <= 256,
              "`q` must have head_dim a multiple of 16 up to 256, got ", head_dim);
  TORCH_CHECK(kv.scalar_type() == kFloat || kv.scalar_type() == at::kBFloat16,
              "`kv` must be float32 or bfloat16, got ", kv.scalar_type());
  check_kv(kv, block_size * head_dim);
  const int64_t num_kv_heads = kv.size(2);
  TORCH_CHECK(num_kv_heads > 0 && num_heads % num_kv_heads == 0, "`q` must have a multiple of ",
              num_kv_heads, " heads, got ", num_heads);
  check_tensor(context_len, "context_len", kInt, {-1});
  const int64_t num_sequences = context_len.size(0);
  check_tensor(query_start, "query_start", kInt, {num_sequences + 1});
  check_tensor(block_table, "block_table", kInt, {num_sequences, -1});
  check_tensor(out, "out", kFloat, {num_tokens, num_heads * head_dim});
  const tgi::AttentionParams params = {
      q.const_data_ptr<float>(),
      kv.const_data_ptr(),
      query_start.const_data_ptr<int32_t>(),
      context_len.const_data_ptr<int32_t>(),
      block_table.const_data_ptr<int32_t>(),
      out.mutable_data_ptr<float>(),
      num_sequences,
      num_heads,
      num_kv_heads,
      head_dim,
      kv.stride(0),
      block_size,
      block_table.size(1),
      static_cast<float>(scale),
      kv.scalar_type() == kFloat ? tgi::FloatType::kFloat32 : tgi::FloatType::kBfloat16};
  check_tables(params, num_tokens, kv.size(0));
  if (num_tokens == 0) return;

  tgi::cpu::AttentionPlan plan;
  tgi::cpu::attention_plan(params, plan);
  std::vector<float> workspace;
  tgi::cpu::run_on_team(
      [&](int num_members) {
        workspace.resize(
            static_cast<size_t>(tgi::cpu::attention_workspace(params, plan, num_members)));
      },
      [&](int member, int num_members) {
        tgi::cpu::attention(params, plan, workspace.data(), member, num_members);
        tgi::cpu::team_barrier();
        tgi::cpu::attention_finish(params, plan, workspace.data(), member, num_members);
      });
}

}  // namespace

TORCH_LIBRARY_IMPL(tgi, CPU, m) { m.impl("attention", attention); }
