// How a layer attends: what it sees of its sequence, and what is done with its scores.
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
                const std::optional<Array<float>>& slopes);

  float q_scale() const { return q_scale_; }
  const cpu::step::AttentionRule& rule() const { return rule_; }
  // For so many heads: throws where there are sinks or slopes for other numbers of them. Points
  // into this.
  cpu::step::ScoreParams scores(int64_t num_heads) const;

 private:
  // All times log2(e), as softmax is of powers of two.
  float q_scale_, cap_;
  cpu::step::AttentionRule rule_;
  std::vector<float> sinks_, slopes_;
};

using SpecPtr = std::shared_ptr<AttentionSpec>;

void bind_attention_spec(py::module_& module);

}  // namespace tgi
