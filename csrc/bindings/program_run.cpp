// Running a recorded step: its arrays checked, its work shared out, its operators replayed.
#include <ATen/ops/diff.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <chrono>

#include "bindings/checks.h"
#include "bindings/program.h"
#include "cpu/team.h"

namespace tgi {

using at::kInt;
using at::kLong;
using at::Tensor;

namespace {

void check_limit(int64_t size, int64_t limit, const char* name) {
  TORCH_CHECK(size <= limit, "`", name, "` must have at most ", limit, " elements, got ", size);
}

double now_s() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

}  // namespace

void StepProgram::run(const Tensor& ids, const Tensor& positions, const Tensor& slots,
                      const Tensor& query_start, const Tensor& context_len,
                      const Tensor& block_table, const Tensor& rows) {
  begin(header_of(ids, positions, slots, query_start, context_len, block_table, rows));
  if (header_.num_tokens == 0) return;
  cpu::run_on_team([&](int num_members) { prepare(num_members, false); },
                   [&](int member, int num_members) { run_step(member, num_members); });
}

void StepProgram::draw(const Tensor& ids, const Tensor& positions, const Tensor& slots,
                       const Tensor& query_start, const Tensor& context_len,
                       const Tensor& block_table, const Tensor& rows, const Tensor& row_slots,
                       const Tensor& records, const Tensor& counts, const Tensor& biased_ids,
                       const Tensor& biased_values, const Tensor& masked_ids,
                       const std::optional<Tensor>& mask, const Tensor& scratch,
                       const Tensor& token_ids, const Tensor& is_finite, const Tensor& logprobs,
                       const Tensor& top_ids, const Tensor& top_logprobs, const Tensor& num_top) {
  begin(header_of(ids, positions, slots, query_start, context_len, block_table, rows));
  TORCH_CHECK(header_.num_rows > 0, "`rows` must not be empty");
  run_and_draw(check_sample(logits_.narrow(0, 0, header_.num_rows), row_slots, records, counts,
                            biased_ids, biased_values, masked_ids, mask, scratch, token_ids,
                            is_finite, logprobs, top_ids, top_logprobs, num_top));
}

void StepProgram::draw_header(const step::StepHeader& header, SampleCall call) {
  begin(header);
  TORCH_CHECK(call.num_rows == header.num_rows && call.params.vocab == logits_.size(1),
              "the draw must have the rows and the vocabulary of the step");
  call.params.logits = logits_.const_data_ptr<float>();
  run_and_draw(call);
}

Tensor StepProgram::profile(const Tensor& ids, const Tensor& positions, const Tensor& slots,
                            const Tensor& query_start, const Tensor& context_len,
                            const Tensor& block_table, const Tensor& rows) {
  begin(header_of(ids, positions, slots, query_start, context_len, block_table, rows));
  TORCH_CHECK(header_.num_rows > 0, "`rows` must not be empty");
  Tensor times = at::empty({num_operators() + 1}, at::kDouble);
  auto* const first = times.mutable_data_ptr<double>();
  cpu::run_on_team([&](int num_members) { prepare(num_members, true); },
                   [&](int member, int num_members) {
                     if (member == 0) *first = now_s();
                     run_step(member, num_members, first + 1);
                   });
  return times.diff();
}

void StepProgram::run_head(const Tensor& rows) {
  TORCH_CHECK(!has_last_rows_ && !ends_early_, "`draw` has kept only what it drew after");
  check_tensor(rows, "rows", kInt, {-1});
  header_.num_rows = rows.size(0);
  header_.rows = rows.const_data_ptr<int32_t>();
  check_rows();
  if (header_.num_rows == 0) return;
  cpu::run_on_team([&](int num_members) { check_members(num_members); },
                   [&](int member, int num_members) {
                     head_.run(header_, 0, head_.size(), member, num_members);
                   });
}

step::StepHeader StepProgram::header_of(const Tensor& ids, const Tensor& positions,
                                        const Tensor& slots, const Tensor& query_start,
                                        const Tensor& context_len, const Tensor& block_table,
                                        const Tensor& rows) {
  check_tensor(ids, "ids", kInt, {-1});
  check_tensor(context_len, "context_len", kInt, {-1});
  check_tensor(rows, "rows", kInt, {-1});
  step::StepHeader header = {};
  header.num_tokens = ids.size(0);
  header.num_sequences = context_len.size(0);
  header.num_rows = rows.size(0);
  check_tensor(positions, "positions", kInt, {header.num_tokens});
  check_tensor(slots, "slots", kLong, {header.num_tokens});
  check_tensor(query_start, "query_start", kInt, {header.num_sequences + 1});
  check_tensor(block_table, "block_table", kInt, {header.num_sequences, -1});
  header.ids = ids.const_data_ptr<int32_t>();
  header.positions = positions.const_data_ptr<int32_t>();
  header.slots = slots.const_data_ptr<int64_t>();
  header.query_start = query_start.const_data_ptr<int32_t>();
  header.context_len = context_len.const_data_ptr<int32_t>();
  header.block_table = block_table.const_data_ptr<int32_t>();
  header.block_table_stride = block_table.size(1);
  header.rows = rows.const_data_ptr<int32_t>();
  return header;
}

void StepProgram::begin(const step::StepHeader& header) {
  check_limit(header.num_tokens, max_tokens_, "ids");
  check_limit(header.num_sequences, max_sequences_, "context_len");
  header_ = header;
  check_header();
  check_rows();
}

void StepProgram::check_header() const {
  const step::StepHeader& h = header_;
  check_range(h.ids, h.num_tokens, num_ids_, "ids");
  check_range(h.positions, h.num_tokens, num_positions_, "positions");
  check_range(h.slots, h.num_tokens, kv_.num_blocks * kv_.block_size, "slots");
  TORCH_CHECK(h.query_start[0] == 0 && h.query_start[h.num_sequences] == h.num_tokens,
              "`query_start` must run from 0 to ", h.num_tokens);
  for (int64_t s = 0; s < h.num_sequences; ++s) {
    const int64_t length = int64_t{h.query_start[s + 1]} - h.query_start[s];
    const int64_t longest = std::min(max_context_, h.block_table_stride * kv_.block_size);
    TORCH_CHECK(length > 0, "`query_start` must ascend, got ", h.query_start[s], " before ",
                h.query_start[s + 1]);
    TORCH_CHECK(h.context_len[s] >= length && h.context_len[s] <= longest, "`context_len`[", s,
                "] must be in [", length, ", ", longest, "], got ", h.context_len[s]);
    const int64_t num_blocks = (h.context_len[s] + kv_.block_size - 1) / kv_.block_size;
    check_range(h.block_table + s * h.block_table_stride, num_blocks, kv_.num_blocks,
                "block_table");
  }
}

void StepProgram::check_rows() const {
  check_limit(header_.num_rows, max_rows_, "rows");
  check_range(header_.rows, header_.num_rows, header_.num_tokens, "rows");
}

void StepProgram::check_members(int num_members) const {
  TORCH_CHECK(num_members <= num_members_, "the program was recorded for ", num_members_,
              " threads, not ", num_members);
}

void StepProgram::prepare(int num_members, bool only_rows) {
  check_members(num_members);
  step::split_attention(header_, num_heads_, kv_.num_heads, num_members, split_.data());
  header_.attention_split = split_.data();
  ends_early_ = only_rows && header_.num_rows == 0;
  has_last_rows_ = only_rows && last_rows_.prepare(header_, kv_.block_size, num_heads_,
                                                   kv_.num_heads, num_members);
}

void StepProgram::run_step(int member, int num_members, double* ends) {
  const step::StepHeader& last = has_last_rows_ ? last_rows_.header() : header_;
  forward_.run(header_, 0, last_qkv_, member, num_members, ends);
  if (ends_early_) return;
  if (has_last_rows_) {
    if (member == 0) {
      last_rows_.gather(x_.mutable_data_ptr(), x_.stride(0) * x_.element_size());
      last_rows_.gather(q_.mutable_data_ptr(), q_.stride(0));
    }
    cpu::team_barrier();
  }
  forward_.run(last, last_qkv_, forward_.size(), member, num_members, ends);
  if (last.num_rows == 0) return;
  head_.run(last, 0, head_.size(), member, num_members,
            ends == nullptr ? nullptr : ends + forward_.size());
}

void StepProgram::run_and_draw(const SampleCall& call) {
  cpu::run_on_team(
      [&](int num_members) {
        prepare(num_members, true);
        call.check_members(num_members);
      },
      [&](int member, int num_members) {
        run_step(member, num_members);
        call.run(member, num_members);
      });
}

}  // namespace tgi
