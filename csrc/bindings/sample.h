// Operands of the sampling kernels, checked: those that every device has, and a call on the CPU, by
// the operator `sample` or as the end of a recorded step.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <initializer_list>
#include <optional>

#include "params.h"

namespace tgi {

using CheckTensor = void(const at::Tensor&, const char*, c10::ScalarType,
                         std::initializer_list<int64_t>);

// Operands as the schema of `sample` names them, each held to its dtype and shape by `check`; the
// mask may have any number of rows.
SampleParams sample_params(CheckTensor* check, const at::Tensor& logits, const at::Tensor& slots,
                           const at::Tensor& records, const at::Tensor& counts,
                           const at::Tensor& biased_ids, const at::Tensor& biased_values,
                           const at::Tensor& masked_ids, const std::optional<at::Tensor>& mask,
                           const at::Tensor& token_ids, const at::Tensor& is_finite,
                           const at::Tensor& logprobs, const at::Tensor& top_ids,
                           const at::Tensor& top_logprobs, const at::Tensor& num_top);

// The same of `token_logprobs`.
TokenLogprobsParams token_logprobs_params(CheckTensor* check, const at::Tensor& logits,
                                          const at::Tensor& token_ids, const at::Tensor& logprobs,
                                          const at::Tensor& top_ids,
                                          const at::Tensor& top_logprobs);

// The operands of one call. They belong to the tensors that were checked.
struct SampleCall {
  SampleParams params;
  int64_t num_rows;
  float* scratch;
  int64_t most_members;  // that the scratch has room for

  void check_members(int num_members) const;
  // A member's rows.
  void run(int member, int num_members) const;
};

// What draws read and move on, as `SampleState` has it, checked: a call without rows, logits and
// results. They belong to the tensors.
SampleCall check_sample_state(int64_t vocab, const at::Tensor& records, const at::Tensor& counts,
                              const at::Tensor& biased_ids, const at::Tensor& biased_values,
                              const at::Tensor& masked_ids, const at::Tensor& scratch);

// Throws unless the slots of a call's rows are all different, in [0, num_slots), and their records
// stay within their lists.
void check_sample_slots(const SampleParams& params, int64_t num_rows, int64_t num_slots);

// Operands as the schema of `sample` names them.
SampleCall check_sample(const at::Tensor& logits, const at::Tensor& slots,
                        const at::Tensor& records, const at::Tensor& counts,
                        const at::Tensor& biased_ids, const at::Tensor& biased_values,
                        const at::Tensor& masked_ids, const std::optional<at::Tensor>& mask,
                        const at::Tensor& scratch, const at::Tensor& token_ids,
                        const at::Tensor& is_finite, const at::Tensor& logprobs,
                        const at::Tensor& top_ids, const at::Tensor& top_logprobs,
                        const at::Tensor& num_top);

}  // namespace tgi
