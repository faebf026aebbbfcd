// The rows of a plan (tgi_asgi/runner/plan.py) as flat arrays. Every integer of them is checked
// here.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <vector>

#include "cpu/step/step.h"

namespace tgi {

// A plan names what does not exist: the engine's mistake, never a client's.
class PlanError : public std::invalid_argument {
 public:
  using std::invalid_argument::invalid_argument;
};

struct RowLimits {
  int64_t vocab_size;
  int64_t num_blocks;
  int64_t block_size;
  int64_t max_context;
  int64_t max_rows;    // of a step, and the bound of slots
  int64_t max_tokens;  // of a step
};

// What a step's header points to, and which rows draw.
struct FlatRows {
  std::vector<int32_t> ids;          // [num_tokens]; 0 where the slot has it
  std::vector<int32_t> positions;    // [num_tokens]
  std::vector<int64_t> slots;        // [num_tokens]
  std::vector<int32_t> query_start;  // [num_rows + 1]
  std::vector<int32_t> context_len;  // [num_rows]
  std::vector<int32_t> block_table;  // [num_rows, table_width], 0 behind a row's blocks
  int64_t table_width = 0;
  int64_t num_generated = 0;        // the first so many tokens were drawn
  std::vector<int32_t> row_slots;   // [num_rows]
  std::vector<int32_t> from_slot;   // [num_rows] the slot whose last id is the row's; -1: none
  std::vector<int32_t> draws;       // tokens that are drawn after
  std::vector<int32_t> draw_slots;  // and their slots
  std::vector<int32_t> draw_rows;   // and their rows

  int64_t num_rows() const { return static_cast<int64_t>(context_len.size()); }
  // Puts the last ids of slots in their rows' place. `last_id(slot)` returns one.
  template <class LastId>
  void take_last_ids(const LastId& last_id) {
    for (size_t row = 0; row < from_slot.size(); ++row) {
      if (from_slot[row] >= 0) ids[static_cast<size_t>(query_start[row])] = last_id(from_slot[row]);
    }
  }
  // The arrays of a step; they are this struct's own.
  cpu::step::StepHeader header() const;
};

// Reads a sequence of `StepRow`; needs the GIL. Throws PlanError where a row names what does not
// exist, or two rows have one slot.
FlatRows flatten(pybind11::handle rows, const RowLimits& limits);

void bind_rows(pybind11::module_& module);

}  // namespace tgi
