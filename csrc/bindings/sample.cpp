// CPU adapters of sampling and log-probabilities.
#include "bindings/sample.h"

#include <torch/library.h>

#include <vector>

#include "checks.h"
#include "cpu/sample.h"
#include "cpu/team.h"
#include "params.h"

namespace {

using at::kBool;
using at::kFloat;
using at::kInt;
using at::Tensor;
using tgi::check_range;
using tgi::check_tensor;

// Slots in range and all different: two rows of one slot would race for its record.
void check_slots(const Tensor& slots, int64_t num_slots) {
  const int32_t* values = slots.const_data_ptr<int32_t>();
  check_range(values, slots.size(0), num_slots, "slots");
  std::vector<bool> is_taken(static_cast<size_t>(num_slots));
  for (int64_t i = 0; i < slots.size(0); ++i) {
    TORCH_CHECK(!is_taken[static_cast<size_t>(values[i])], "`slots` must differ, got ", values[i],
                " twice");
    is_taken[static_cast<size_t>(values[i])] = true;
  }
}

// The record's own counts stay within its lists, and the ids in the lists within the vocabulary.
void check_record(const tgi::SampleParams& p, int64_t slot) {
  const tgi::SampleSlot& record = p.records[slot];
  TORCH_CHECK(record.num_biased >= 0 && record.num_biased <= p.biased_stride, "slot ", slot,
              " has ", record.num_biased, " biased ids in a list of ", p.biased_stride);
  TORCH_CHECK(record.num_masked >= 0 && record.num_masked <= p.masked_stride, "slot ", slot,
              " has ", record.num_masked, " masked ids in a list of ", p.masked_stride);
  check_range(p.biased_ids + slot * p.biased_stride, record.num_biased, p.vocab, "biased_ids");
  check_range(p.masked_ids + slot * p.masked_stride, record.num_masked, p.vocab, "masked_ids");
}

}  // namespace

namespace tgi {

SampleCall check_sample(const Tensor& logits, const Tensor& slots, const Tensor& records,
                        const Tensor& counts, const Tensor& biased_ids, const Tensor& biased_values,
                        const Tensor& masked_ids, const std::optional<Tensor>& mask,
                        const Tensor& scratch, const Tensor& token_ids, const Tensor& is_finite,
                        const Tensor& logprobs, const Tensor& top_ids, const Tensor& top_logprobs,
                        const Tensor& num_top) {
  check_tensor(logits, "logits", kFloat, {-1, -1});
  const int64_t num_rows = logits.size(0), vocab = logits.size(1);
  tgi::check_positive(vocab, "vocab");
  check_tensor(records, "records", at::kByte, {-1, static_cast<int64_t>(sizeof(tgi::SampleSlot))});
  const int64_t num_slots = records.size(0);
  check_tensor(slots, "slots", kInt, {num_rows});
  check_tensor(counts, "counts", kInt, {num_slots, vocab});
  check_tensor(biased_ids, "biased_ids", kInt, {num_slots, -1});
  check_tensor(biased_values, "biased_values", kFloat, {num_slots, biased_ids.size(1)});
  check_tensor(masked_ids, "masked_ids", kInt, {num_slots, -1});
  if (mask) check_tensor(*mask, "mask", kInt, {num_rows, (vocab + 31) / 32});
  check_tensor(scratch, "scratch", kFloat, {-1, tgi::cpu::kSampleScratchRows, vocab});
  check_tensor(token_ids, "token_ids", kInt, {num_rows});
  check_tensor(is_finite, "is_finite", kBool, {num_rows});
  check_tensor(logprobs, "logprobs", kFloat, {num_rows});
  check_tensor(top_ids, "top_ids", kInt, {num_rows, -1});
  check_tensor(top_logprobs, "top_logprobs", kFloat, {num_rows, top_ids.size(1)});
  check_tensor(num_top, "num_top", kInt, {num_rows});
  check_slots(slots, num_slots);
  const tgi::SampleParams params = {logits.const_data_ptr<float>(),
                                    slots.const_data_ptr<int32_t>(),
                                    static_cast<tgi::SampleSlot*>(records.mutable_data_ptr()),
                                    counts.mutable_data_ptr<int32_t>(),
                                    biased_ids.const_data_ptr<int32_t>(),
                                    biased_values.const_data_ptr<float>(),
                                    masked_ids.const_data_ptr<int32_t>(),
                                    mask ? mask->const_data_ptr<int32_t>() : nullptr,
                                    token_ids.mutable_data_ptr<int32_t>(),
                                    is_finite.mutable_data_ptr<bool>(),
                                    logprobs.mutable_data_ptr<float>(),
                                    top_ids.mutable_data_ptr<int32_t>(),
                                    top_logprobs.mutable_data_ptr<float>(),
                                    num_top.mutable_data_ptr<int32_t>(),
                                    vocab,
                                    biased_ids.size(1),
                                    masked_ids.size(1),
                                    top_ids.size(1)};
  for (int64_t row = 0; row < num_rows; ++row) check_record(params, params.slots[row]);
  return {params, num_rows, scratch.mutable_data_ptr<float>(), scratch.size(0)};
}

void SampleCall::check_members(int num_members) const {
  TORCH_CHECK(most_members >= num_members, "`scratch` must have ", num_members, " parts, got ",
              most_members);
}

void SampleCall::run(int member, int num_members) const {
  const cpu::Range rows = cpu::split(num_rows, member, num_members);
  cpu::sample(params, scratch + member * cpu::kSampleScratchRows * params.vocab, rows.begin,
              rows.end);
}

}  // namespace tgi

namespace {

void sample(const Tensor& logits, const Tensor& slots, const Tensor& records, const Tensor& counts,
            const Tensor& biased_ids, const Tensor& biased_values, const Tensor& masked_ids,
            const std::optional<Tensor>& mask, const Tensor& scratch, const Tensor& token_ids,
            const Tensor& is_finite, const Tensor& logprobs, const Tensor& top_ids,
            const Tensor& top_logprobs, const Tensor& num_top) {
  const tgi::SampleCall call =
      tgi::check_sample(logits, slots, records, counts, biased_ids, biased_values, masked_ids, mask,
                        scratch, token_ids, is_finite, logprobs, top_ids, top_logprobs, num_top);
  const auto check_scratch = [&](int num_members) { call.check_members(num_members); };
  const auto body = [&](int member, int num_members) { call.run(member, num_members); };
  if (call.num_rows > 1) {
    tgi::cpu::run_on_team(check_scratch, body);
  } else if (call.num_rows == 1) {
    check_scratch(1);
    tgi::cpu::run_alone(body);
  }
}

void token_logprobs(const Tensor& logits, const Tensor& token_ids, const Tensor& logprobs,
                    const Tensor& top_ids, const Tensor& top_logprobs) {
  check_tensor(logits, "logits", kFloat, {-1, -1});
  const int64_t num_rows = logits.size(0), vocab = logits.size(1);
  check_tensor(token_ids, "token_ids", kInt, {num_rows});
  check_tensor(logprobs, "logprobs", kFloat, {num_rows});
  check_tensor(top_ids, "top_ids", kInt, {num_rows, -1});
  check_tensor(top_logprobs, "top_logprobs", kFloat, {num_rows, top_ids.size(1)});
  TORCH_CHECK(top_ids.size(1) <= vocab, "`top_ids` must have at most ", vocab, " columns, got ",
              top_ids.size(1));
  check_range(token_ids.const_data_ptr<int32_t>(), num_rows, vocab, "token_ids");
  const tgi::TokenLogprobsParams params = {logits.const_data_ptr<float>(),
                                           token_ids.const_data_ptr<int32_t>(),
                                           logprobs.mutable_data_ptr<float>(),
                                           top_ids.mutable_data_ptr<int32_t>(),
                                           top_logprobs.mutable_data_ptr<float>(),
                                           vocab,
                                           top_ids.size(1)};
  tgi::cpu::parallel_range(num_rows, 1, [&](int64_t begin, int64_t end) {
    tgi::cpu::token_logprobs(params, begin, end);
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(tgi, CPU, m) {
  m.impl("sample", sample);
  m.impl("token_logprobs", token_logprobs);
}
