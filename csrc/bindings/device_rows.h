// The rows of a CUDA runner's steps: read from a plan, each integer checked, and written to the
// step's inputs in pinned memory (tgi_asgi/runner/cuda_buffers.py).
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include "bindings/checks.h"
#include "bindings/rows.h"

namespace tgi {

// The step's inputs, in the order in which they lie in its buffer.
enum DeviceInput {
  kInputSlots,
  kInputIds,
  kInputPositions,
  kInputAdapters,
  kInputQueryStart,
  kInputContextLen,
  kInputTableSlots,
  kInputTableFirsts,
  kInputTableStarts,
  kInputFromSlot,
  kInputRows,
  kInputRowSlots,
  kInputMaskRows,
  kInputEntries,
  kNumInputs,
};

// Sizes of a step's inputs, which may be more than the rows need; the rest is padding.
struct DeviceSizes {
  int64_t num_tokens, num_sequences, num_logits, num_decodes, num_entries;
};

// The rows of the step that is being launched, and what stays the same from step to step: the
// length of each slot's prompt, and its block table. The device keeps the tables, too, so a step
// brings all entries of a sequence that starts, and later only those of the blocks that a row
// writes to (csrc/cuda/begin_step.cu). The others are there: the steps that computed these blocks
// brought them.
//
// A step first reads its rows; then it chooses the sizes of its inputs and writes them.
class DeviceRows {
 public:
  // `row_type`: the class of rows, whose attributes must be slots.
  DeviceRows(const pybind11::type& row_type, const RowLimits& limits, bool is_batch_invariant);
  ~DeviceRows();
  DeviceRows(const DeviceRows&) = delete;
  DeviceRows& operator=(const DeviceRows&) = delete;

  // Assigns a slot to a sequence with a prompt of this length; nothing of its table is on the
  // device.
  void start(int64_t slot, int64_t prompt_len);
  // After a step that was written and failed: nothing of any table is on the device.
  void forget();

  // Reads a sequence of rows. Throws PlanError if one names something that does not exist, if two
  // have the same slot, or if a row that decodes comes after one that does not. Rows with a `stop`
  // are read as if they began at their `start` and had no drafts.
  void read(pybind11::handle rows);

  // Writes the rows read last to `memory`.
  //
  // firsts: each input's first byte, [kNumInputs].
  // needing: plan rows that have a row of logits; none: each sequence has one.
  // masked: slots whose samples are masked, in the order of their masks.
  // adapters: the place of each plan row's adapter, -1 for none; or empty.
  void write(Array<uint8_t>& memory, const int64_t* firsts, const DeviceSizes& sizes,
             const std::optional<std::vector<int64_t>>& needing, const std::vector<int32_t>& masked,
             const std::vector<int32_t>& adapters);

  // Of the rows read last:
  int64_t num_rows() const { return static_cast<int64_t>(rows_.size()); }
  int64_t num_tokens = 0;
  int64_t num_decodes = 0;  // rows that decode attention computes; they come first
  int64_t num_entries = 0;  // of block tables, to be written
  bool has_adapters = false, has_vectors = false, is_scored = false;  // a row asks for it
  bool has_stops = false;                                             // a row has a `stop`
  std::vector<int64_t> sampling;                                      // rows that sample a token
  std::vector<int64_t> sampling_slots;                                // their slots
  // Of the rows that do not decode: tokens in the step, and in total.
  std::vector<std::pair<int64_t, int64_t>> prompt_lens() const;
  // The end of a row's tokens, without padding.
  int64_t end(int64_t row) const { return rows_.at(static_cast<size_t>(row)).end; }

 private:
  enum Field {
    kSlot,
    kTokenIds,
    kStart,
    kBlockTables,
    kSamples,
    kPromptLogprobs,
    kPooling,
    kStop,
    kAdapter,
    kStates,
    kNumFields,
  };

  struct Slot {
    int64_t prompt_len = 0;
    int64_t num_written = 0;      // entries of its table, which the device has
    pybind11::object table;       // a sequence whose entries do not change
    std::vector<int32_t> blocks;  // its entries, as far as they were read
  };

  struct Row {
    int32_t slot, start, num_tokens;
    int32_t first_entry, num_blocks;  // entries [first_entry, num_blocks) of its table are written
    int64_t end;                      // of its tokens, among those of all rows
    size_t first_id;                  // in ids_
    bool is_from_slot;                // its token is the one that its slot sampled last
    bool samples;                     // a token
  };

  struct Inputs;

  PyObject* field(PyObject* row, Field name) const;
  void read_row(PyObject* item);
  // Reads a row's tokens; returns the position after the last.
  int64_t read_tokens(PyObject* token_ids, Row& row);
  void read_table(PyObject* tables, Slot& slot, int64_t num_blocks);
  void write_padding(const Inputs& inputs, const DeviceSizes& sizes) const;
  void write_tokens(const Inputs& inputs, int64_t first, const Row& row,
                    const std::vector<int32_t>& blocks, int32_t adapter) const;

  PyTypeObject* row_type_;
  std::array<Py_ssize_t, kNumFields> offsets_;  // of the fields in a row
  RowLimits limits_;
  bool is_batch_invariant_;
  std::vector<Slot> slots_;
  std::vector<bool> is_taken_;  // slots of the rows
  std::vector<Row> rows_;
  std::vector<int32_t> ids_;  // of rows that have them
};

void bind_device_rows(pybind11::module_& module);

}  // namespace tgi
