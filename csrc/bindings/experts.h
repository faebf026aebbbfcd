// Routed experts as Python holds them: routing rules, routing results and expert weights.
// Everything is checked here; the kernels rely on it.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "bindings/matrix.h"
#include "cpu/step/step.h"

namespace tgi {

// How experts are selected and weighted.
class RouteSpec {
 public:
  RouteSpec(int64_t num_experts, int64_t top_k, const std::string& kind,
            const std::optional<Array<float>>& correction, int64_t num_groups, int64_t top_groups,
            bool sums_top_two, bool is_renormalised, double eps, double scale, double jitter,
            const std::optional<Array<float>>& expert_scales);

  int64_t num_experts() const { return params_.out.num_experts; }
  int64_t top_k() const { return params_.out.top_k; }
  // Without logits and output pointers. Points into this object.
  const step::RouteParams& params() const { return params_; }

 private:
  std::vector<float> correction_, expert_scales_;
  step::RouteParams params_ = {};
};

// The experts selected for each token; written by `route`.
struct RoutingBuffer {
  cpu::Memory memory;
  int64_t num_rows;  // tokens
  step::ExpertRouting view;

  static RoutingBuffer make(int64_t num_tokens, int64_t num_experts, int64_t top_k);
};

// One product of all experts of a layer: matrices of the same shape, each in the format of its
// file.
class ExpertStack {
 public:
  ExpertStack(const std::vector<const Matrix*>& matrices,
              const std::optional<std::vector<Array<float>>>& biases);

  int64_t num_experts() const { return static_cast<int64_t>(weights_.size()); }
  int64_t num_rows() const { return weights_.front().num_rows; }  // as stored
  int64_t num_columns() const { return weights_.front().num_columns; }
  int64_t nbytes() const;
  // Throws if any of them cannot be multiplied in this precision.
  void check_precision(step::Precision precision, int64_t unit_strips) const;
  // The work memory that the largest matrix needs, in floats.
  int64_t scratch_floats(step::Precision precision, int64_t unit_strips) const;
  // Points into this object.
  step::ExpertMatrices view() const {
    return {weights_.data(), biases_.empty() ? nullptr : biases_.data()};
  }

 private:
  std::vector<cpu::Memory> memories_;
  std::vector<step::PackedMatrix> weights_;
  std::vector<Array<float>> arrays_;
  std::vector<const float*> biases_;
};

using RoutePtr = std::shared_ptr<RouteSpec>;
using RoutingPtr = std::shared_ptr<RoutingBuffer>;
using StackPtr = std::shared_ptr<ExpertStack>;

// The experts of a layer, and how their gate and up outputs are combined.
struct ExpertMlps {
  bool is_gated;
  std::vector<StackPtr> gate_up;  // one stack with alternating panels, or one each; or ups alone
  StackPtr down;
  MlpActivation activation;
  step::ClampedGate clamped;

  // Throws if the parts do not fit together.
  static ExpertMlps make(std::vector<StackPtr> gate_up, StackPtr down,
                         const std::string& activation, double limit, double slope, double offset,
                         bool is_gated);
  int64_t unit_strips() const { return is_gated && gate_up.size() == 1 ? 2 : 1; }
  int64_t num_columns() const { return down->num_columns(); }  // of the input of `down`
};

using MlpsPtr = std::shared_ptr<ExpertMlps>;

// Checks the weights and writes them to parameters whose routing, input and buffers are already
// set. Returns the number of floats of work memory per member, which the caller allocates and
// passes to `set_scratch`.
int64_t set_experts(const ExpertMlps& mlps, step::ExpertsParams& params);
void set_scratch(step::ExpertsParams& params, float* scratch, int64_t floats);

void bind_experts(py::module_& module);

}  // namespace tgi
