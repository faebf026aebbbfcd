// The rows of a plan (tgi_asgi/runner/plan.py) as flat arrays. Every integer of a plan is checked
// here.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <vector>

#include "bindings/adapter.h"
#include "bindings/image_rows.h"
#include "bindings/plan_values.h"
#include "cpu/step/step.h"

namespace tgi {

constexpr int64_t kNoWindow = INT64_MAX;

struct RowLimits {
  int64_t vocab_size;
  int64_t num_blocks;
  int64_t block_size;
  int64_t max_context;
  int64_t max_rows;    // of a step; also the bound of slots
  int64_t max_tokens;  // of a step
  // How many positions a token sees, including its own, in the layers of each group. Earlier blocks
  // are not read and may already belong to other sequences.
  std::vector<int64_t> windows;
  int64_t num_kept_states;  // number of places for kept states

  int64_t num_groups() const { return static_cast<int64_t>(windows.size()); }
};

// A recurrent state to keep: that of a row's sequence before the token at `position`.
struct StateKeep {
  int32_t row;
  int32_t position;
  int32_t place;  // among the places for kept states
};

// A plan's rows as given, each integer checked. A row's start and tokens may be known only when the
// previous step has finished.
struct PlannedRows {
  struct Row {
    int32_t slot;
    int32_t start;  // if is_floating, the earliest start; the slot determines the actual one
    int32_t stop;   // end of the positions that it may have
    int32_t max_drafts;
    bool is_from_slot;  // its token is the one that its slot sampled last
    bool is_floating;   // its position also comes from the slot
    bool samples;
    bool is_generated;               // its tokens were sampled
    size_t first_id, num_ids;        // in `ids`
    size_t first_block, num_blocks;  // in `blocks`: this many per group, group by group
    AdapterPtr adapter;              // null: none
    int32_t resumes;                 // the place of the kept state to resume from, or -1
    size_t first_keep, num_keeps;    // in `keeps`
  };
  std::vector<Row> rows;
  std::vector<int32_t> ids;
  std::vector<int32_t> blocks;
  std::vector<StateKeep> keeps;
  bool has_adapters = false;
};

// The arrays that a step's header points to, and the rows to sample. Rows with nothing left to
// compute are left out.
struct FlatRows {
  std::vector<int32_t> ids;          // [num_tokens]
  std::vector<int32_t> positions;    // [num_tokens]
  std::vector<int64_t> slots;        // [num_groups, num_tokens]
  std::vector<int32_t> query_start;  // [num_rows + 1]
  std::vector<int32_t> context_len;  // [num_rows]
  // [num_groups, num_rows, table_width], 0 after a row's blocks
  std::vector<int32_t> block_table;
  int64_t num_groups = 1;
  int64_t table_width = 0;
  int64_t num_generated = 0;        // this many tokens at the front were sampled
  std::vector<int32_t> row_slots;   // [num_rows]
  std::vector<int32_t> num_drafts;  // [num_rows] drafts, a row's last tokens; or empty
  std::vector<int32_t> resumes;  // [num_rows] places of kept states, -1: its slot's own; or empty
  std::vector<StateKeep> keeps;  // row by row, in order of position
  std::vector<int32_t> row_of_plan;              // [num_rows] index of the row in the plan
  std::vector<int32_t> sample_after;             // tokens to sample after, as indices into `ids`
  std::vector<int32_t> sample_slots;             // their slots
  std::vector<int32_t> sample_plan_rows;         // their rows in the plan
  std::vector<int32_t> drafts;                   // their ids if they are drafts, else -1
  std::vector<AdapterPtr> adapters;              // [num_rows], null: none; or empty
  std::vector<step::AdapterSpan> adapter_spans;  // runs of consecutive rows with the same adapter
  ImagesPtr images;                              // null: the step has no tokens of images

  int64_t num_rows() const { return static_cast<int64_t>(context_len.size()); }
  // Throws std::invalid_argument unless the sequences share out the tokens of `ids`, each has at
  // least one and a context that includes them, and `num_generated` ends where a sequence does.
  // Every batch has passed this or is from `lay_out`, so that readers check only what they bound:
  // ids, positions, slots, blocks, and the longest context.
  void check_sequences() const;
  // Sets the rows' adapters: one per row, or an empty list.
  void set_adapters(std::vector<AdapterPtr> of_rows);
  // Adds images' rows; where ids are read, their tokens have `pad_id`.
  void set_images(std::shared_ptr<ImageRows> given, int32_t pad_id);
  // Returns a step's header; it points into this struct.
  cpu::step::StepHeader header() const;
};

// The last token that a slot sampled, and the position of its next token.
struct SlotPosition {
  int32_t last_id;
  int64_t position;
};

// Reads a sequence of `StepRow`; needs the GIL. Throws PlanError if a row names something that does
// not exist, or if two rows have the same slot.
PlannedRows read_rows(pybind11::handle rows, const RowLimits& limits);

// Returns the position at which a row starts, given its slot's position. Throws PlanError if the
// slot is elsewhere.
int64_t start_of(const PlannedRows::Row& row, const SlotPosition& place);

// Lays out rows. `places` has an entry per row, which only rows from slots use; `drafts` is empty
// or has a list per row, no longer than the row allows. Throws PlanError.
FlatRows lay_out(const PlannedRows& planned, const RowLimits& limits,
                 const std::vector<SlotPosition>& places,
                 const std::vector<std::vector<int32_t>>& drafts);

void bind_rows(pybind11::module_& module);

}  // namespace tgi
