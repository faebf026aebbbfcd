// The memory of recurrent states. Each slot has two halves, each with as many places as one row of
// a step may write states; more places hold kept states, see cpu/step/states.h. The system commits
// places when they are first used.
#pragma once

#include <cstdint>
#include <vector>

#include "bindings/checks.h"
#include "bindings/rows.h"
#include "cpu/memory.h"
#include "cpu/step/states.h"

namespace tgi {

// The state of one layer: the window of a short convolution, followed by other floats.
struct StateShape {
  int64_t num_channels;
  int64_t num_taps;
  int64_t num_floats;

  int64_t window_bytes() const;

  int64_t num_bytes() const;
};

class StatePool {
 public:
  // num_drafts: the maximum per row.
  StatePool(std::vector<StateShape> layers, int64_t num_slots, int64_t num_kept,
            int64_t num_drafts);

  int64_t num_layers() const { return static_cast<int64_t>(layers_.size()); }
  const StateShape& shape(int64_t layer) const;
  cpu::step::StateView window(int64_t layer) const;
  cpu::step::StateView floats(int64_t layer) const;
  // The bytes that the states of one sequence occupy, over all places.
  int64_t slot_bytes() const { return 2 * depth_ * stride_; }

  // Chooses the places of a step and sets them in its header; states that the step writes are not
  // valid until `commit`. Throws std::invalid_argument, without changing anything, if a row starts
  // from a state that does not exist, or if a place would be written that another row uses; two
  // rows have no slot in common.
  void begin(const FlatRows& rows, cpu::step::StepHeader& header);
  // Call it when the step has been computed.
  void commit();
  // Voids a step after `commit`: the states that it wrote become invalid. A later step therefore
  // cannot start from them and overwrite the state with which the voided step started.
  void roll_back();
  // Discards the states of a slot after more than `num_tokens` tokens.
  void discard(int32_t slot, int64_t num_tokens);

 private:
  struct Place {
    int64_t num_tokens = -1;  // tokens of the sequence up to this state; -1: empty
  };

  // Where a row of a step starts: the place, and in which half of its slot's places that is.
  struct Source {
    int32_t place;  // negative: no state
    int32_t half;   // negative: in neither half
  };
  // The half that a row of a step writes to.
  struct Target {
    int32_t slot, half;
  };

  int32_t first_kept() const { return static_cast<int32_t>(2 * depth_ * num_slots_); }
  int32_t first_of(int32_t slot, int32_t half) const {
    return static_cast<int32_t>((2 * slot + half) * depth_);
  }
  bool holds(int32_t place, int64_t num_tokens) const {
    return places_[static_cast<size_t>(place)].num_tokens == num_tokens;
  }
  Source source_of(const FlatRows& rows, size_t row, int64_t start) const;
  void check_rows(const FlatRows& rows, const cpu::step::StepHeader& header) const;
  void check_keeps(const FlatRows& rows, const cpu::step::StepHeader& header) const;
  // Invalidates the states in a half that have more than `num_tokens` tokens.
  void clear(int32_t slot, int32_t half, int64_t num_tokens);

  std::vector<StateShape> layers_;
  const int64_t num_slots_, depth_;
  std::vector<int64_t> offsets_;  // of layers within a place
  int64_t stride_ = 0;            // bytes per place
  cpu::Memory memory_;
  std::vector<Place> places_;                // [slots][2][depth], followed by the kept ones
  std::vector<int32_t> newest_;              // per slot, the half written last
  std::vector<cpu::step::StateSpan> spans_;  // of the current step
  std::vector<int64_t> ends_;                // number of tokens in the state that each span writes
  std::vector<Target> targets_;
};

void bind_state_pool(py::module_& module);

}  // namespace tgi
