// CPU adapters of sampling and log-probabilities, and what the CUDA adapters share with them.
#include "bindings/sample.h"

#include <torch/library.h>

#include <vector>

#include "bindings/checks.h"
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

SampleParams sample_params(CheckTensor* check, const Tensor& logits, const Tensor& slots,
                           const Tensor& records, const Tensor& counts, const Tensor& biased_ids,
                           const Tensor& biased_values, const Tensor& masked_ids,
                           const std::optional<Tensor>& mask, const Tensor& token_ids,
                           const Tensor& is_finite, const Tensor& logprobs, const Tensor& top_ids,
                           const Tensor& top_logprobs, const Tensor& num_top) {
  check(logits, "logits", kFloat, {-1, -1});
  const int64_t num_rows = logits.size(0), vocab = logits.size(1);
  check_positive(vocab, "vocab");
  check(records, "records", at::kByte, {-1, static_cast<int64_t>(sizeof(SampleSlot))});
  const int64_t num_slots = records.size(0);
  check(slots, "slots", kInt, {num_rows});
  check(counts, "counts", kInt, {num_slots, vocab});
  check(biased_ids, "biased_ids", kInt, {num_slots, -1});
  check(biased_values, "biased_values", kFloat, {num_slots, biased_ids.size(1)});
  check(masked_ids, "masked_ids", kInt, {num_slots, -1});
  if (mask) check(*mask, "mask", kInt, {-1, (vocab + 31) / 32});
  check(token_ids, "token_ids", kInt, {num_rows});
  check(is_finite, "is_finite", kBool, {num_rows});
  check(logprobs, "logprobs", kFloat, {num_rows});
  check(top_ids, "top_ids", kInt, {num_rows, -1});
  check(top_logprobs, "top_logprobs", kFloat, {num_rows, top_ids.size(1)});
  check(num_top, "num_top", kInt, {num_rows});
  return {logits.const_data_ptr<float>(),
          slots.const_data_ptr<int32_t>(),
          static_cast<SampleSlot*>(records.mutable_data_ptr()),
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
}

TokenLogprobsParams token_logprobs_params(CheckTensor* check, const Tensor& logits,
                                          const Tensor& token_ids, const Tensor& logprobs,
                                          const Tensor& top_ids, const Tensor& top_logprobs) {
  check(logits, "logits", kFloat, {-1, -1});
  const int64_t num_rows = logits.size(0), vocab = logits.size(1);
  check(token_ids, "token_ids", kInt, {num_rows});
  check(logprobs, "logprobs", kFloat, {num_rows});
  check(top_ids, "top_ids", kInt, {num_rows, -1});
  check(top_logprobs, "top_logprobs", kFloat, {num_rows, top_ids.size(1)});
  TORCH_CHECK(top_ids.size(1) <= vocab, "`top_ids` must have at most ", vocab, " columns, got ",
              top_ids.size(1));
  return {logits.const_data_ptr<float>(),
          token_ids.const_data_ptr<int32_t>(),
          logprobs.mutable_data_ptr<float>(),
          top_ids.mutable_data_ptr<int32_t>(),
          top_logprobs.mutable_data_ptr<float>(),
          vocab,
          top_ids.size(1)};
}

SampleCall check_sample_state(int64_t vocab, const Tensor& records, const Tensor& counts,
                              const Tensor& biased_ids, const Tensor& biased_values,
                              const Tensor& masked_ids, const Tensor& scratch) {
  const int64_t num_slots = records.size(0);
  check_tensor(records, "records", at::kByte, {-1, static_cast<int64_t>(sizeof(SampleSlot))});
  check_tensor(counts, "counts", kInt, {num_slots, vocab});
  check_tensor(biased_ids, "biased_ids", kInt, {num_slots, -1});
  check_tensor(biased_values, "biased_values", kFloat, {num_slots, biased_ids.size(1)});
  check_tensor(masked_ids, "masked_ids", kInt, {num_slots, -1});
  check_tensor(scratch, "scratch", kFloat, {-1, cpu::kSampleScratchRows, vocab});
  SampleParams params = {};
  params.records = static_cast<SampleSlot*>(records.mutable_data_ptr());
  params.counts = counts.mutable_data_ptr<int32_t>();
  params.biased_ids = biased_ids.const_data_ptr<int32_t>();
  params.biased_values = biased_values.const_data_ptr<float>();
  params.masked_ids = masked_ids.const_data_ptr<int32_t>();
  params.vocab = vocab;
  params.biased_stride = biased_ids.size(1);
  params.masked_stride = masked_ids.size(1);
  return {params, 0, scratch.mutable_data_ptr<float>(), scratch.size(0)};
}

void check_sample_slots(const SampleParams& params, int64_t num_rows, int64_t num_slots) {
  check_range(params.slots, num_rows, num_slots, "slots");
  std::vector<bool> is_taken(static_cast<size_t>(num_slots));
  for (int64_t row = 0; row < num_rows; ++row) {
    const int32_t slot = params.slots[row];
    TORCH_CHECK(!is_taken[static_cast<size_t>(slot)], "`slots` must differ, got ", slot, " twice");
    is_taken[static_cast<size_t>(slot)] = true;
    check_record(params, slot);
  }
}

SampleCall check_sample(const Tensor& logits, const Tensor& slots, const Tensor& records,
                        const Tensor& counts, const Tensor& biased_ids, const Tensor& biased_values,
                        const Tensor& masked_ids, const std::optional<Tensor>& mask,
                        const Tensor& scratch, const Tensor& token_ids, const Tensor& is_finite,
                        const Tensor& logprobs, const Tensor& top_ids, const Tensor& top_logprobs,
                        const Tensor& num_top) {
  const SampleParams params = sample_params(check_tensor, logits, slots, records, counts,
                                            biased_ids, biased_values, masked_ids, mask, token_ids,
                                            is_finite, logprobs, top_ids, top_logprobs, num_top);
  const int64_t num_rows = logits.size(0);
  if (mask) check_tensor(*mask, "mask", kInt, {num_rows, -1});
  check_tensor(scratch, "scratch", kFloat, {-1, cpu::kSampleScratchRows, params.vocab});
  check_sample_slots(params, num_rows, records.size(0));
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
  const tgi::TokenLogprobsParams params =
      tgi::token_logprobs_params(check_tensor, logits, token_ids, logprobs, top_ids, top_logprobs);
  const int64_t num_rows = logits.size(0);
  check_range(params.token_ids, num_rows, params.vocab, "token_ids");
  tgi::cpu::parallel_range(num_rows, 1, [&](int64_t begin, int64_t end) {
    tgi::cpu::token_logprobs(params, begin, end);
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(tgi, CPU, m) {
  m.impl("sample", sample);
  m.impl("token_logprobs", token_logprobs);
}
