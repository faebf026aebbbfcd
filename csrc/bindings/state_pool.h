// The memory of what recurrent layers keep of sequences: of a slot two rows of places, as many as a
// row of a step may leave states, and some for states that are kept, see cpu/step/states.h. The
// system commits it as places are first used.
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
  // num_drafts: of a row, at the most.
  StatePool(std::vector<StateShape> layers, int64_t num_slots, int64_t num_kept,
            int64_t num_drafts);

  int64_t num_layers() const { return static_cast<int64_t>(layers_.size()); }
  const StateShape& shape(int64_t layer) const;
  cpu::step::StateView window(int64_t layer) const;
  cpu::step::StateView floats(int64_t layer) const;
  // What the states of a sequence take, of all places.
  int64_t slot_bytes() const { return 2 * depth_ * stride_; }

  // Chooses the places of a step, and lets its header know them; what is written to counts as
  // nothing until `commit`. Throws std::invalid_argument where a row goes on from a state that is
  // not there, or a place is written to that another row has to do with; then nothing has changed.
  void begin(const FlatRows& rows, cpu::step::StepHeader& header);
  // The step has been computed.
  void commit();
  // It is void all the same: what it has written counts as nothing, also to a step that would go
  // on from there and write to where this one began.
  void forget();

 private:
  struct Place {
    int64_t num_tokens = -1;  // that its sequence has had; -1: it holds nothing
  };

  // Where a row of a step begins: the place, and in which half of its slot's places that is.
  struct Source {
    int32_t place;  // negative: with nothing
    int32_t half;   // negative: in none
  };
  // Which half a row of a step writes to.
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
  // Forgets the states of a half of more tokens than these.
  void clear(int32_t slot, int32_t half, int64_t num_tokens);

  std::vector<StateShape> layers_;
  const int64_t num_slots_, depth_;
  std::vector<int64_t> offsets_;  // of layers in a place
  int64_t stride_ = 0;            // bytes of a place
  cpu::Memory memory_;
  std::vector<Place> places_;                // [slots][2][depth], then the kept ones
  std::vector<int32_t> newest_;              // of each slot the half that was written last
  std::vector<cpu::step::StateSpan> spans_;  // of the present step
  std::vector<int64_t> ends_;                // how many tokens each leaves in its state
  std::vector<Target> targets_;
};

void bind_state_pool(py::module_& module);

}  // namespace tgi
