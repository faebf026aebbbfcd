// The memory of what recurrent layers keep of sequences: two places a slot, see
// cpu/step/states.h. The system commits it as slots are first used.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "bindings/checks.h"
#include "bindings/rows.h"
#include "cpu/memory.h"
#include "cpu/step/states.h"

namespace tgi {

// What a layer keeps: the window of a short convolution, and numbers behind it.
struct StateShape {
  int64_t num_channels;
  int64_t num_taps;
  int64_t num_floats;

  int64_t window_bytes() const;

  int64_t num_bytes() const;
};

class StatePool {
 public:
  StatePool(std::vector<StateShape> layers, int64_t num_slots);

  int64_t num_layers() const { return static_cast<int64_t>(layers_.size()); }
  const StateShape& shape(int64_t layer) const;
  cpu::step::StateView window(int64_t layer) const;
  cpu::step::StateView floats(int64_t layer) const;
  // What the states of a sequence take, of both places.
  int64_t slot_bytes() const { return 2 * stride_; }

  // Chooses the places of a step, and lets its header know them; what is written to counts as
  // nothing until `commit`. Throws std::invalid_argument where a row goes on from a state that its
  // slot has not; then nothing has changed.
  void begin(const std::vector<int32_t>& slots, cpu::step::StepHeader& header);
  // The step has been computed.
  void commit();

 private:
  struct Place {
    int64_t num_tokens = -1;  // that its sequence has had; -1: it holds nothing
  };

  std::vector<StateShape> layers_;
  std::vector<int64_t> offsets_;  // of layers in a place
  int64_t stride_ = 0;            // bytes of a place
  cpu::Memory memory_;
  std::vector<Place> places_;  // [slots][2]
  std::vector<int32_t> from_, to_;
  std::vector<int64_t> ends_;  // of the present step's sequences
};

void bind_state_pool(py::module_& module);

}  // namespace tgi
