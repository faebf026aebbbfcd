// CUDA adapters of sampling and log-probabilities.
#include "bindings/sample.h"

#include <torch/library.h>

#include "bindings/cuda/checks.h"

namespace {

using at::kFloat;
using at::kInt;
using at::Tensor;
using tgi::cuda::check_tensor;
using tgi::cuda::run;

void sample(const Tensor& logits, const Tensor& slots, const Tensor& records, const Tensor& counts,
            const Tensor& biased_ids, const Tensor& biased_values, const Tensor& masked_ids,
            const std::optional<Tensor>& mask, const std::optional<Tensor>& mask_rows,
            const Tensor& scratch, const Tensor& token_ids, const Tensor& is_finite,
            const Tensor& logprobs, const Tensor& top_ids, const Tensor& top_logprobs,
            const Tensor& num_top) {
  const tgi::SampleParams base = tgi::sample_params(
      check_tensor, logits, slots, records, counts, biased_ids, biased_values, masked_ids, mask,
      token_ids, is_finite, logprobs, top_ids, top_logprobs, num_top);
  const int64_t num_rows = logits.size(0);
  TORCH_CHECK(mask.has_value() == mask_rows.has_value(),
              "`mask` and `mask_rows` must be given together");
  if (mask_rows) check_tensor(*mask_rows, "mask_rows", kInt, {num_rows});
  check_tensor(scratch, "scratch", kFloat, {-1, base.vocab});
  TORCH_CHECK(scratch.size(0) >= num_rows, "`scratch` must have ", num_rows, " rows, got ",
              scratch.size(0));
  const tgi::cuda::SampleParams params = {base,
                                          tgi::cuda::data_or_null<int32_t>(mask_rows),
                                          scratch.mutable_data_ptr<float>(),
                                          mask ? mask->size(0) : 0,
                                          num_rows,
                                          records.size(0)};
  run(tgi::cuda::sample, params, logits);
}

void token_logprobs(const Tensor& logits, const Tensor& token_ids, const Tensor& logprobs,
                    const Tensor& top_ids, const Tensor& top_logprobs) {
  const tgi::TokenLogprobsParams base =
      tgi::token_logprobs_params(check_tensor, logits, token_ids, logprobs, top_ids, top_logprobs);
  run(tgi::cuda::token_logprobs, tgi::cuda::TokenLogprobsParams{base, logits.size(0)}, logits);
}

}  // namespace

TORCH_LIBRARY_IMPL(tgi_cuda, CUDA, m) {
  m.impl("sample", sample);
  m.impl("token_logprobs", token_logprobs);
}
