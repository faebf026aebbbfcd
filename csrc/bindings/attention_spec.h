// How a layer attends: which positions it sees and how its scores are modified.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "bindings/checks.h"
#include "cpu/step/step.h"

namespace tgi {

class AttentionSpec {
 public:
  AttentionSpec(double scale, std::optional<int64_t> window, std::optional<int64_t> chunk,
                std::optional<double> soft_cap, const std::optional<Array<float>>& sinks,
                const std::optional<Array<float>>& slopes, bool sees_ahead);

  float q_scale() const { return q_scale_; }
  const cpu::step::AttentionRule& rule() const { return rule_; }
  // Returns the score parameters for this many heads; throws if the number of sinks or slopes
  // differs. The result points into this object.
  cpu::step::ScoreParams scores(int64_t num_heads) const;

 private:
  // All scaled by log2(e), because the softmax uses powers of two.
  float q_scale_, cap_;
  cpu::step::AttentionRule rule_;
  std::vector<float> sinks_, slopes_;
};

using SpecPtr = std::shared_ptr<AttentionSpec>;

void bind_attention_spec(py::module_& module);

}  // namespace tgi
