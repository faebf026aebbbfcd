// A checked call of the sampling kernel: by the operator `sample`, and as the end of a recorded
// step.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>

#include "params.h"

namespace tgi {

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
