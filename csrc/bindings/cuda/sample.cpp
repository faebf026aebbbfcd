// torch bindings of sampling and log-probabilities on CUDA.
#include <torch/library.h>

#include "bindings/cuda/checks.h"

namespace {

using at::kBool;
using at::kFloat;
using at::kInt;
using at::Tensor;
using tgi::cuda::check_tensor;
using tgi::cuda::run;

// The operands are named as in the schema of `sample`; the mask may have any number of rows.
tgi::SampleParams sample_params(const Tensor& logits, const Tensor& slots, const Tensor& records,
                                const Tensor& counts, const Tensor& biased_ids,
                                const Tensor& biased_values, const Tensor& masked_ids,
                                const std::optional<Tensor>& mask, const Tensor& token_ids,
                                const Tensor& is_finite, const Tensor& logprobs,
                                const Tensor& top_ids, const Tensor& top_logprobs,
                                const Tensor& num_top) {
  check_tensor(logits, "logits", kFloat, {-1, -1});
  const int64_t num_rows = logits.size(0), vocab = logits.size(1);
  TORCH_CHECK(vocab > 0, "`logits` must have columns");
  check_tensor(records, "records", at::kByte, {-1, static_cast<int64_t>(sizeof(tgi::SampleSlot))});
  const int64_t num_slots = records.size(0);
  check_tensor(slots, "slots", kInt, {num_rows});
  check_tensor(counts, "counts", kInt, {num_slots, vocab});
  check_tensor(biased_ids, "biased_ids", kInt, {num_slots, -1});
  check_tensor(biased_values, "biased_values", kFloat, {num_slots, biased_ids.size(1)});
  check_tensor(masked_ids, "masked_ids", kInt, {num_slots, -1});
  if (mask) check_tensor(*mask, "mask", kInt, {-1, (vocab + 31) / 32});
  check_tensor(token_ids, "token_ids", kInt, {num_rows});
  check_tensor(is_finite, "is_finite", kBool, {num_rows});
  check_tensor(logprobs, "logprobs", kFloat, {num_rows});
  check_tensor(top_ids, "top_ids", kInt, {num_rows, -1});
  check_tensor(top_logprobs, "top_logprobs", kFloat, {num_rows, top_ids.size(1)});
  check_tensor(num_top, "num_top", kInt, {num_rows});
  tgi::SampleParams params = {};
  params.logits = logits.const_data_ptr<float>();
  params.slots = slots.const_data_ptr<int32_t>();
  params.records = static_cast<tgi::SampleSlot*>(records.mutable_data_ptr());
  params.counts = counts.mutable_data_ptr<int32_t>();
  params.biased_ids = biased_ids.const_data_ptr<int32_t>();
  params.biased_values = biased_values.const_data_ptr<float>();
  params.masked_ids = masked_ids.const_data_ptr<int32_t>();
  params.mask = tgi::cuda::data_or_null<int32_t>(mask);
  params.token_ids = token_ids.mutable_data_ptr<int32_t>();
  params.is_finite = is_finite.mutable_data_ptr<bool>();
  params.logprobs = logprobs.mutable_data_ptr<float>();
  params.top_ids = top_ids.mutable_data_ptr<int32_t>();
  params.top_logprobs = top_logprobs.mutable_data_ptr<float>();
  params.num_top = num_top.mutable_data_ptr<int32_t>();
  params.vocab = vocab;
  params.biased_stride = biased_ids.size(1);
  params.masked_stride = masked_ids.size(1);
  params.max_top = top_ids.size(1);
  return params;
}

void sample(const Tensor& logits, const Tensor& slots, const Tensor& records, const Tensor& counts,
            const Tensor& biased_ids, const Tensor& biased_values, const Tensor& masked_ids,
            const std::optional<Tensor>& mask, const std::optional<Tensor>& mask_rows,
            const Tensor& scratch, const Tensor& workspace, const Tensor& token_ids,
            const Tensor& is_finite, const Tensor& logprobs, const Tensor& top_ids,
            const Tensor& top_logprobs, const Tensor& num_top) {
  const tgi::SampleParams base =
      sample_params(logits, slots, records, counts, biased_ids, biased_values, masked_ids, mask,
                    token_ids, is_finite, logprobs, top_ids, top_logprobs, num_top);
  const int64_t num_rows = logits.size(0);
  TORCH_CHECK(mask.has_value() == mask_rows.has_value(),
              "`mask` and `mask_rows` must be given together");
  if (mask_rows) check_tensor(*mask_rows, "mask_rows", kInt, {num_rows});
  check_tensor(scratch, "scratch", kFloat, {-1, base.vocab});
  TORCH_CHECK(scratch.size(0) >= num_rows, "`scratch` must have ", num_rows, " rows, got ",
              scratch.size(0));
  check_tensor(workspace, "workspace", at::kByte, {-1});
  const int64_t needed = tgi::cuda::sample_workspace_bytes(num_rows);
  TORCH_CHECK(workspace.size(0) >= needed, "`workspace` must have ", needed, " bytes, got ",
              workspace.size(0));
  const tgi::cuda::SampleParams params = {
      .base = base,
      .mask_rows = tgi::cuda::data_or_null<int32_t>(mask_rows),
      .scratch = scratch.mutable_data_ptr<float>(),
      .workspace = workspace.mutable_data_ptr(),
      .num_masks = mask ? mask->size(0) : 0,
      .num_rows = num_rows,
      .num_slots = records.size(0),
  };
  run(tgi::cuda::sample, params, logits);
}

// The operands are named as in the schemas; slots behind those of sequences are the spares.
tgi::cuda::DraftSlotsParams draft_params(const Tensor& records, const Tensor& counts,
                                         const Tensor& slots, const Tensor& ahead,
                                         const Tensor& drafts) {
  check_tensor(records, "records", at::kByte, {-1, static_cast<int64_t>(sizeof(tgi::SampleSlot))});
  check_tensor(counts, "counts", kInt, {records.size(0), -1});
  TORCH_CHECK(counts.size(1) > 0, "`counts` must have columns");
  check_tensor(slots, "slots", kInt, {-1});
  const int64_t num_spares = slots.size(0);
  TORCH_CHECK(num_spares <= records.size(0), "`records` must have ", num_spares,
              " spare slots, got ", records.size(0), " in all");
  check_tensor(ahead, "ahead", kInt, {num_spares});
  check_tensor(drafts, "drafts", kInt, {num_spares});
  return {
      .records = static_cast<tgi::SampleSlot*>(records.mutable_data_ptr()),
      .counts = counts.mutable_data_ptr<int32_t>(),
      .slots = slots.const_data_ptr<int32_t>(),
      .ahead = ahead.const_data_ptr<int32_t>(),
      .drafts = drafts.const_data_ptr<int32_t>(),
      .num_slots = records.size(0) - num_spares,
      .num_spares = num_spares,
      .vocab = counts.size(1),
  };
}

void draft_slots(const Tensor& records, const Tensor& counts, const Tensor& biased_ids,
                 const Tensor& biased_values, const Tensor& masked_ids, const Tensor& slots,
                 const Tensor& ahead, const Tensor& drafts) {
  tgi::cuda::DraftSlotsParams params = draft_params(records, counts, slots, ahead, drafts);
  const int64_t all = records.size(0);
  check_tensor(biased_ids, "biased_ids", kInt, {all, -1});
  check_tensor(biased_values, "biased_values", kFloat, {all, biased_ids.size(1)});
  check_tensor(masked_ids, "masked_ids", kInt, {all, -1});
  params.biased_ids = biased_ids.mutable_data_ptr<int32_t>();
  params.biased_values = biased_values.mutable_data_ptr<float>();
  params.masked_ids = masked_ids.mutable_data_ptr<int32_t>();
  params.biased_stride = biased_ids.size(1);
  params.masked_stride = masked_ids.size(1);
  run(tgi::cuda::draft_slots, params, records);
}

void accept_drafts(const Tensor& records, const Tensor& counts, const Tensor& slots,
                   const Tensor& ahead, const Tensor& drafts) {
  run(tgi::cuda::accept_drafts, draft_params(records, counts, slots, ahead, drafts), records);
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
  const tgi::TokenLogprobsParams base = {
      .logits = logits.const_data_ptr<float>(),
      .token_ids = token_ids.const_data_ptr<int32_t>(),
      .logprobs = logprobs.mutable_data_ptr<float>(),
      .top_ids = top_ids.mutable_data_ptr<int32_t>(),
      .top_logprobs = top_logprobs.mutable_data_ptr<float>(),
      .vocab = vocab,
      .num_top = top_ids.size(1),
  };
  run(tgi::cuda::token_logprobs, tgi::cuda::TokenLogprobsParams{.base = base, .num_rows = num_rows},
      logits);
}

}  // namespace

TORCH_LIBRARY_IMPL(tgi_cuda, CUDA, m) {
  m.impl("sample", sample);
  m.impl("draft_slots", draft_slots);
  m.impl("accept_drafts", accept_drafts);
  m.impl("token_logprobs", token_logprobs);
}
