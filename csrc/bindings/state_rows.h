// Recurrent layers for models that compute in torch: one call per layer, from rows as tensors to
// rows. The places of a step's states are chosen once for all layers.
#pragma once

#include <cstdint>
#include <memory>

#include "bindings/float_tensors.h"
#include "bindings/operands.h"
#include "bindings/rows.h"
#include "bindings/state_pool.h"

namespace tgi {

class StateRows {
 public:
  explicit StateRows(std::shared_ptr<StatePool> pool) : pool_(std::move(pool)) {}

  // Begins a step of these rows; see StatePool::begin.
  void begin(const FlatRows& batch);
  // Call it when all layers have been computed.
  void commit();
  void roll_back() { pool_->roll_back(); }
  void discard(int32_t slot, int64_t num_tokens) { pool_->discard(slot, num_tokens); }

  // Convolves q, k and v and applies the delta rule. qkv: [num_tokens, channels]; steps:
  // [num_tokens, 2 * heads]; out: [num_tokens, padded width of all heads], contiguous.
  void delta_net(int64_t layer, const ShortConv& conv, const DeltaRule& rule, const FloatArray& qkv,
                 const FloatArray& steps, FloatArray& out);

 private:
  std::shared_ptr<StatePool> pool_;
  bool has_begun_ = false;
  FlatRows batch_;
  cpu::step::StepHeader header_ = {};
  Workspace convolved_;
};

void bind_state_rows(py::module_& module);

}  // namespace tgi
