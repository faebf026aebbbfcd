// The rows of a plan (tgi_asgi/runner/plan.py) as flat arrays. Every integer of them is checked
// here.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <vector>

#include "bindings/adapter.h"
#include "cpu/step/step.h"

namespace tgi {

// A plan names what does not exist: the engine's mistake, never a client's.
class PlanError : public std::invalid_argument {
 public:
  using std::invalid_argument::invalid_argument;
};

constexpr int64_t kNoWindow = INT64_MAX;

struct RowLimits {
  int64_t vocab_size;
  int64_t num_blocks;
  int64_t block_size;
  int64_t max_context;
  int64_t max_rows;    // of a step, and the bound of slots
  int64_t max_tokens;  // of a step
  // How many positions a token sees, its own the last, in the layers of each group: blocks that
  // lie before them are not read, and may be others' already.
  std::vector<int64_t> windows;
  int64_t num_kept_states;  // the bound of places where states are kept

  int64_t num_groups() const { return static_cast<int64_t>(windows.size()); }
};

// A state that is kept: that of a row's sequence in front of one of the row's tokens.
struct StateKeep {
  int32_t row;
  int32_t position;
  int32_t place;  // among those for kept states
};

// A plan's rows as they were given, each integer checked. Where a row begins, and with which
// tokens, may be known only once the step before is done.
struct PlannedRows {
  struct Row {
    int32_t slot;
    int32_t start;  // or the first position that it may begin at, where its slot says which
    int32_t stop;   // behind the last position that it may have
    int32_t most_drafts;
    bool is_from_slot;  // its token is the one that its slot drew last
    bool is_floating;   // and its position, too
    bool samples;
    bool is_generated;               // its tokens were drawn
    size_t first_id, num_ids;        // of `ids`
    size_t first_block, num_blocks;  // of `blocks`: so many of each group, group by group
    AdapterPtr adapter;              // null: none
    int32_t resumes;                 // the place of a kept state that it goes on from, or -1
    size_t first_keep, num_keeps;    // of `keeps`
  };
  std::vector<Row> rows;
  std::vector<int32_t> ids;
  std::vector<int32_t> blocks;
  std::vector<StateKeep> keeps;
  bool has_adapters = false;
};

// What a step's header points to, and which rows draw. Rows that have nothing left to compute are
// not in it.
struct FlatRows {
  std::vector<int32_t> ids;          // [num_tokens]
  std::vector<int32_t> positions;    // [num_tokens]
  std::vector<int64_t> slots;        // [num_groups, num_tokens]
  std::vector<int32_t> query_start;  // [num_rows + 1]
  std::vector<int32_t> context_len;  // [num_rows]
  // [num_groups, num_rows, table_width], 0 behind a row's blocks
  std::vector<int32_t> block_table;
  int64_t num_groups = 1;
  int64_t table_width = 0;
  int64_t num_generated = 0;         // the first so many tokens were drawn
  std::vector<int32_t> row_slots;    // [num_rows]
  std::vector<int32_t> num_drafts;   // [num_rows] of its tokens, the last ones; or empty
  std::vector<int32_t> resumes;      // [num_rows] places of kept states, -1: its slot's; or empty
  std::vector<StateKeep> keeps;      // row by row, in the order of positions
  std::vector<int32_t> row_of_plan;  // [num_rows] which row of the plan it is
  std::vector<int32_t> draws;        // tokens that are drawn after
  std::vector<int32_t> draw_slots;   // and their slots
  std::vector<int32_t> draw_rows;    // and their rows of the plan
  std::vector<int32_t> drafts;       // and which they are, where they are drafts; else -1
  std::vector<AdapterPtr> adapters;  // [num_rows], null: none; or empty
  std::vector<step::AdapterSpan> adapter_spans;  // rows that follow each other with one adapter

  int64_t num_rows() const { return static_cast<int64_t>(context_len.size()); }
  // Gives the rows their adapters, as many as there are rows, or none.
  void set_adapters(std::vector<AdapterPtr> of_rows);
  // The arrays of a step; they are this struct's own.
  cpu::step::StepHeader header() const;
};

// What a slot drew last, and where the next token will stand.
struct SlotPlace {
  int32_t last_id;
  int64_t position;
};

// Reads a sequence of `StepRow`; needs the GIL. Throws PlanError where a row names what does not
// exist, or two rows have one slot.
PlannedRows read_rows(pybind11::handle rows, const RowLimits& limits);

// Where a row begins, given its slot's place. Throws PlanError where the slot is not there.
int64_t start_of(const PlannedRows::Row& row, const SlotPlace& place);

// Lays out rows. `places` has one for each row that is from its slot, any for others; `drafts` is
// empty, or has a list a row, each at most as long as the row allows. Throws PlanError.
FlatRows lay_out(const PlannedRows& planned, const RowLimits& limits,
                 const std::vector<SlotPlace>& places,
                 const std::vector<std::vector<int32_t>>& drafts);

void bind_rows(pybind11::module_& module);

}  // namespace tgi
