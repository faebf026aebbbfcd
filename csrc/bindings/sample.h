// Sampling on the CPU: the state of all slots, and one call, made by `sample` or at the end of a
// recorded step.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "bindings/checks.h"
#include "cpu/draft_rows.h"
#include "cpu/memory.h"
#include "params.h"

namespace tgi {

// The arrays of tgi_asgi.ops.SampleState, and work memory. The lists are replaced when they grow.
class SampleArrays {
 public:
  SampleArrays(Array<uint8_t> records, Array<int32_t> counts);
  void set_lists(Array<int32_t> biased_ids, Array<float> biased_values, Array<int32_t> masked_ids);

  int64_t num_slots() const { return records_.shape(0); }
  int64_t vocab() const { return counts_.shape(1); }
  const SampleSlot& record(int32_t slot) const { return params_.records[slot]; }
  // A call's parameters without rows, logits and results.
  const SampleParams& params() const { return params_; }
  // Throws unless `slots` are in range and distinct (except for rows that follow drafts), and their
  // records' counts are within their lists.
  void check_slots(const std::vector<int32_t>& slots, const std::vector<int32_t>& drafts) const;
  // Throws unless the slot's record is in range: with other shares than those in [0, 1] no token
  // could be sampled, and kernels would read outside of their lists.
  void check_record(int32_t slot) const;
  // Allocates work memory for this many members.
  void reserve(int num_members);
  uint8_t* scratch() const { return scratch_.get(); }

 private:
  Array<uint8_t> records_;
  Array<int32_t> counts_, biased_ids_, masked_ids_;
  Array<float> biased_values_;
  SampleParams params_ = {};
  cpu::Memory scratch_;
  int64_t num_scratch_ = 0;  // members that it is allocated for
};

// What one call samples: one token per row.
struct Samples {
  std::vector<int32_t> slots;
  std::vector<int32_t> drafts;  // see cpu::DraftRows; empty: no row follows a draft
  std::vector<int32_t> ahead;
  std::vector<int32_t> token_ids;
  std::unique_ptr<bool[]> is_finite, is_accepted;
  std::vector<float> logprobs;
  std::vector<int32_t> top_ids;  // [num_rows, max_top]
  std::vector<float> top_logprobs;
  std::vector<int32_t> num_top;
  int64_t max_top = 0;

  int64_t num_rows() const { return static_cast<int64_t>(slots.size()); }
  // Allocates the results of all rows.
  void prepare(const SampleArrays& state);
  cpu::DraftRows draft_rows() const {
    return drafts.empty() ? cpu::DraftRows{} : cpu::DraftRows{drafts.data(), ahead.data()};
  }
  // Returns numpy arrays: token_ids, is_finite, logprobs, top_ids, top_logprobs, num_top,
  // is_accepted.
  py::tuple arrays() const;
};

// Samples prepared rows from logits [num_rows, vocab].
class SampleCall {
 public:
  // mask: [num_rows, ceil(vocab / 32)], or null.
  SampleCall(SampleArrays& state, Samples& samples, const int32_t* mask);
  void set_logits(const float* logits) { params_.logits = logits; }
  int64_t num_rows() const { return num_rows_; }
  int64_t vocab() const { return params_.vocab; }
  void reserve(int num_members) const { state_.reserve(num_members); }
  // Runs one member's part.
  void run(int member, int num_members) const;
  // Advances the slots, once all members have run.
  void finish();

 private:
  SampleArrays& state_;
  Samples& samples_;
  SampleParams params_;
  int64_t num_rows_;
};

// Checks the mask's shape and returns its data, or null if there is none.
const int32_t* mask_data(const std::optional<Array<int32_t>>& mask, int64_t num_rows,
                         int64_t vocab);

// Returns a sample as (token id, log-probability or None, the most probable tokens or None, whether
// the logits were finite).
py::object sampled_of(const Samples& samples, size_t i);

void bind_sampling(py::module_& module);

}  // namespace tgi
