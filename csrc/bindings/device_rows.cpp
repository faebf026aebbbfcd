#include "bindings/device_rows.h"

#include <pybind11/stl.h>
#include <structmember.h>

#include <algorithm>
#include <string>

#include "bindings/checks.h"
#include "bindings/plan_values.h"

namespace tgi {

namespace {

// Returns where in an instance the value of a slot of its class is. Reading it there takes a tenth
// of the time of a look-up by name, which would be the longest part of a step's host time.
Py_ssize_t offset_of(const py::type& type, const char* name) {
  const py::object member = type.attr("__dict__")[name];
  check(Py_TYPE(member.ptr()) == &PyMemberDescr_Type, "`", name, "` must be a slot of its class");
  return reinterpret_cast<PyMemberDescrObject*>(member.ptr())->d_member->offset;
}

// Checks that the inputs lie in memory of `num_bytes`, one behind the other.
void check_inputs(const int64_t* firsts, const DeviceSizes& sizes, int64_t num_bytes) {
  const auto [tokens, sequences, logits, decodes, entries] = sizes;
  for (const int64_t size : {tokens, sequences, logits, decodes, entries}) {
    check(size >= 0 && size < INT32_MAX, "a step's sizes must be in [0, ", INT32_MAX, "), got ",
          size);
  }
  const std::array<int64_t, kNumInputs> bytes = {
      8 * tokens,    4 * tokens,    4 * tokens,    4 * tokens,    4 * (sequences + 1),
      4 * sequences, 4 * sequences, 4 * sequences, 4 * sequences, 4 * decodes,
      4 * logits,    4 * logits,    4 * logits,    4 * entries};
  int64_t end = 0;
  for (size_t i = 0; i < bytes.size(); ++i) {
    check(firsts[i] >= end && firsts[i] % 8 == 0 && firsts[i] <= num_bytes, "`firsts`[", i,
          "] must be a multiple of 8 in [", end, ", ", num_bytes, "], got ", firsts[i]);
    end = firsts[i] + bytes[i];
  }
  check(end <= num_bytes, "the inputs have ", end, " bytes, the memory ", num_bytes);
}

// Returns the row of each slot's mask, -1 for none.
std::vector<int32_t> masks_of_slots(const std::vector<int32_t>& masked, size_t num_slots) {
  std::vector<int32_t> masks(num_slots, -1);
  for (size_t i = 0; i < masked.size(); ++i)
    masks.at(static_cast<size_t>(masked[i])) = static_cast<int32_t>(i);
  return masks;
}

}  // namespace

// The arrays of a step's inputs.
struct DeviceRows::Inputs {
  Inputs(uint8_t* memory, const int64_t* firsts) {
    const auto ints = [&](DeviceInput input) {
      return reinterpret_cast<int32_t*>(memory + firsts[static_cast<size_t>(input)]);
    };
    slots = reinterpret_cast<int64_t*>(memory + firsts[kInputSlots]);
    ids = ints(kInputIds);
    positions = ints(kInputPositions);
    adapters = ints(kInputAdapters);
    query_start = ints(kInputQueryStart);
    context_len = ints(kInputContextLen);
    table_slots = ints(kInputTableSlots);
    table_firsts = ints(kInputTableFirsts);
    table_starts = ints(kInputTableStarts);
    from_slot = ints(kInputFromSlot);
    logits_tokens = ints(kInputRows);
    logits_slots = ints(kInputRowSlots);
    mask_rows = ints(kInputMaskRows);
    entries = ints(kInputEntries);
  }

  void pad_tokens(int64_t first, int64_t end) const {
    std::fill(slots + first, slots + end, -1);
    std::fill(ids + first, ids + end, 0);
    std::fill(positions + first, positions + end, 0);
    std::fill(adapters + first, adapters + end, -1);
  }

  void pad_sequences(int64_t first, int64_t end) const {
    std::fill(context_len + first, context_len + end, 0);
    std::fill(table_slots + first, table_slots + end, -1);
    std::fill(table_firsts + first, table_firsts + end, 0);
    std::fill(table_starts + first, table_starts + end, 0);
  }

  // Writes a row's sequence, whose new entries come after those of the rows before it.
  void write_sequence(int64_t index, const Row& row, const std::vector<int32_t>& blocks,
                      int64_t& num_entries) const {
    context_len[index] = row.start + row.num_tokens;
    table_slots[index] = row.slot;
    table_firsts[index] = row.first_entry;
    table_starts[index] = static_cast<int32_t>(num_entries);
    std::copy(blocks.begin() + row.first_entry, blocks.begin() + row.num_blocks,
              entries + num_entries);
    num_entries += row.num_blocks - row.first_entry;
  }

  void write_logits(int64_t index, int64_t token, int32_t slot, int32_t mask) const {
    logits_tokens[index] = static_cast<int32_t>(token);
    logits_slots[index] = slot;
    mask_rows[index] = mask;
  }

  int64_t* slots;
  int32_t *ids, *positions, *adapters, *query_start, *context_len;
  int32_t *table_slots, *table_firsts, *table_starts, *from_slot;
  int32_t *logits_tokens, *logits_slots, *mask_rows, *entries;
};

DeviceRows::DeviceRows(const py::type& row_type, const RowLimits& limits, bool is_batch_invariant)
    : row_type_(reinterpret_cast<PyTypeObject*>(row_type.ptr())),
      limits_(limits),
      is_batch_invariant_(is_batch_invariant),
      slots_(static_cast<size_t>(limits.max_rows)) {
  check(limits.num_groups() == 1, "a device has one block table for all layers");
  const std::array<const char*, kNumFields> names = {
      "slot",    "token_ids", "start",   "block_tables", "samples", "prompt_logprobs",
      "pooling", "stop",      "adapter", "states"};
  for (size_t i = 0; i < names.size(); ++i) offsets_[i] = offset_of(row_type, names[i]);
  Py_INCREF(row_type_);
}

DeviceRows::~DeviceRows() { Py_DECREF(row_type_); }

void DeviceRows::start(int64_t slot, int64_t prompt_len) {
  Slot& started = slots_.at(static_cast<size_t>(slot));
  started.prompt_len = prompt_len;
  started.num_written = 0;
}

void DeviceRows::forget() {
  for (Slot& slot : slots_) slot.num_written = 0;
}

PyObject* DeviceRows::field(PyObject* row, Field name) const {
  PyObject* const value = *reinterpret_cast<PyObject**>(reinterpret_cast<char*>(row) +
                                                        offsets_[static_cast<size_t>(name)]);
  if (value == nullptr) throw py::type_error("a row lacks an attribute");
  return value;
}

void DeviceRows::read(py::handle rows) {
  const Items items(rows);
  rows_.clear();
  ids_.clear();
  sampling.clear();
  sampling_slots.clear();
  is_taken_.assign(slots_.size(), false);
  num_tokens = num_decodes = num_entries = 0;
  has_adapters = has_vectors = is_scored = has_stops = false;
  for (int64_t index = 0; index < items.size(); ++index) read_row(items[index]);
}

void DeviceRows::read_row(PyObject* item) {
  if (Py_TYPE(item) != row_type_) throw py::type_error("a plan's rows have the same class");
  Row row = {};
  row.slot = static_cast<int32_t>(integer(field(item, kSlot), "slot", limits_.max_rows));
  const auto at = static_cast<size_t>(row.slot);
  if (is_taken_[at]) throw PlanError("two rows of a step have one slot");
  is_taken_[at] = true;
  row.start = static_cast<int32_t>(integer(field(item, kStart), "position", limits_.max_context));
  if (field(item, kStates) != Py_None)
    throw PlanError("a row has states, which a device does not have");
  has_stops = has_stops || field(item, kStop) != Py_None;
  const int64_t stop = read_tokens(field(item, kTokenIds), row);
  const int64_t num_blocks = (stop + limits_.block_size - 1) / limits_.block_size;
  read_table(field(item, kBlockTables), slots_[at], num_blocks);
  const int64_t first_entry = std::min(row.start / limits_.block_size, slots_[at].num_written);
  row.first_entry = static_cast<int32_t>(first_entry);
  row.num_blocks = static_cast<int32_t>(num_blocks);
  num_entries += num_blocks - first_entry;
  // Decode and prefill attention add in different orders. For batch invariance, prompt tokens must
  // not use decode attention, since chunking decides whether a single one is left for a step of its
  // own.
  const bool is_prompt = row.start < slots_[at].prompt_len;
  if (row.is_from_slot || (row.num_tokens == 1 && !(is_batch_invariant_ && is_prompt))) {
    if (num_decodes == static_cast<int64_t>(rows_.size())) {
      ++num_decodes;
    } else if (row.is_from_slot) {
      throw PlanError("a row that decodes comes after a chunk of a prompt");
    }
  }
  const bool has_vector = field(item, kPooling) != Py_None;
  const int samples = PyObject_IsTrue(field(item, kSamples));
  if (samples < 0) throw py::error_already_set();
  row.samples = samples == 1 && !has_vector;
  if (row.samples) {
    sampling.push_back(static_cast<int64_t>(rows_.size()));
    sampling_slots.push_back(row.slot);
  }
  has_vectors = has_vectors || has_vector;
  is_scored = is_scored || field(item, kPromptLogprobs) != Py_None;
  has_adapters = has_adapters || field(item, kAdapter) != Py_None;
  rows_.push_back(row);
}

int64_t DeviceRows::read_tokens(PyObject* token_ids, Row& row) {
  row.first_id = ids_.size();
  row.is_from_slot = token_ids == Py_None;
  int64_t count = 1;
  if (!row.is_from_slot) {
    const Items ids(token_ids);
    count = ids.size();
    for (int64_t i = 0; i < count; ++i)
      ids_.push_back(static_cast<int32_t>(integer(ids[i], "token id", limits_.vocab_size)));
  }
  num_tokens += count;
  if (num_tokens > limits_.max_tokens)
    throw PlanError("a step has at most " + std::to_string(limits_.max_tokens) + " tokens");
  const int64_t stop = row.start + count;
  if (count == 0 || stop > limits_.max_context)
    throw PlanError("a row has no token, or exceeds the context of " +
                    std::to_string(limits_.max_context));
  row.num_tokens = static_cast<int32_t>(count);
  row.end = num_tokens;
  return stop;
}

void DeviceRows::read_table(PyObject* tables, Slot& slot, int64_t num_blocks) {
  const Items groups(tables);
  if (groups.size() != 1)
    throw PlanError("a row has one block table, got " + std::to_string(groups.size()));
  const Items table(groups[0]);
  if (table.size() < num_blocks)
    throw PlanError(std::to_string(num_blocks) + " blocks are needed, got " +
                    std::to_string(table.size()));
  if (slot.table.ptr() != groups[0]) {
    slot.table = py::reinterpret_borrow<py::object>(groups[0]);
    slot.blocks.clear();
    slot.num_written = 0;
  }
  for (int64_t i = static_cast<int64_t>(slot.blocks.size()); i < num_blocks; ++i)
    slot.blocks.push_back(static_cast<int32_t>(integer(table[i], "block", limits_.num_blocks)));
}

std::vector<std::pair<int64_t, int64_t>> DeviceRows::prompt_lens() const {
  std::vector<std::pair<int64_t, int64_t>> lens;
  for (size_t i = static_cast<size_t>(num_decodes); i < rows_.size(); ++i)
    lens.emplace_back(rows_[i].num_tokens, rows_[i].start + rows_[i].num_tokens);
  return lens;
}

void DeviceRows::write(Array<uint8_t>& memory, const int64_t* firsts, const DeviceSizes& sizes,
                       const std::optional<std::vector<int64_t>>& needing,
                       const std::vector<int32_t>& masked, const std::vector<int32_t>& adapters) {
  const int64_t num_rows = static_cast<int64_t>(rows_.size());
  const int64_t gap = sizes.num_decodes - num_decodes;  // padding after the last that decodes
  check(gap >= 0 && num_rows + gap <= sizes.num_sequences && num_tokens + gap <= sizes.num_tokens &&
            num_entries <= sizes.num_entries &&
            (needing ? static_cast<int64_t>(needing->size()) <= sizes.num_logits
                     : sizes.num_logits == sizes.num_sequences),
        "the rows do not fit the sizes of the step");
  check_inputs(firsts, sizes, memory.nbytes());
  check(adapters.empty() || adapters.size() == rows_.size(), "`adapters` has an entry per row");
  const Inputs inputs(memory.mutable_data(), firsts);
  const std::vector<int32_t> masks = masks_of_slots(masked, slots_.size());
  write_padding(inputs, sizes);
  const auto write_logits = [&](int64_t at, const Row& row, int64_t end) {
    const int32_t slot = row.samples ? row.slot : -1;
    inputs.write_logits(at, end - 1, slot, row.samples ? masks[static_cast<size_t>(slot)] : -1);
  };
  int64_t entries = 0;
  for (int64_t index = 0; index < num_rows; ++index) {
    const Row& row = rows_[static_cast<size_t>(index)];
    const int64_t sequence = index < num_decodes ? index : index + gap;
    const int64_t end = index < num_decodes ? row.end : row.end + gap;
    if (index < num_decodes) {
      inputs.from_slot[index] = row.is_from_slot ? row.slot : -1;
    } else {
      inputs.query_start[sequence] = static_cast<int32_t>(end) - row.num_tokens;
    }
    Slot& slot = slots_[static_cast<size_t>(row.slot)];
    const int32_t adapter = adapters.empty() ? -1 : adapters[static_cast<size_t>(index)];
    write_tokens(inputs, end - row.num_tokens, row, slot.blocks, adapter);
    inputs.write_sequence(sequence, row, slot.blocks, entries);
    slot.num_written = row.num_blocks;
    if (!needing) write_logits(sequence, row, end);
  }
  if (!needing) return;
  for (size_t at = 0; at < needing->size(); ++at) {
    const int64_t index = (*needing)[at];
    const Row& row = rows_.at(static_cast<size_t>(index));
    write_logits(static_cast<int64_t>(at), row, index < num_decodes ? row.end : row.end + gap);
  }
}

void DeviceRows::write_padding(const Inputs& inputs, const DeviceSizes& sizes) const {
  const int64_t gap = sizes.num_decodes - num_decodes;
  const int64_t num_sequences = static_cast<int64_t>(rows_.size()) + gap;
  inputs.pad_tokens(num_decodes, sizes.num_decodes);
  inputs.pad_tokens(num_tokens + gap, sizes.num_tokens);
  inputs.pad_sequences(num_decodes, sizes.num_decodes);
  inputs.pad_sequences(num_sequences, sizes.num_sequences);
  std::fill(inputs.from_slot + num_decodes, inputs.from_slot + sizes.num_decodes, -1);
  std::fill_n(inputs.query_start, sizes.num_decodes, 0);  // which no kernel reads
  std::fill(inputs.query_start + num_sequences, inputs.query_start + sizes.num_sequences + 1,
            static_cast<int32_t>(num_tokens + gap));
  for (int64_t at = 0; at < sizes.num_logits; ++at) inputs.write_logits(at, 0, -1, -1);
}

void DeviceRows::write_tokens(const Inputs& inputs, int64_t first, const Row& row,
                              const std::vector<int32_t>& blocks, int32_t adapter) const {
  for (int32_t i = 0; i < row.num_tokens; ++i) {
    const int64_t position = row.start + i, token = first + i;
    const int64_t block = blocks[static_cast<size_t>(position / limits_.block_size)];
    inputs.slots[token] = block * limits_.block_size + position % limits_.block_size;
    inputs.ids[token] = row.is_from_slot ? 0 : ids_[row.first_id + static_cast<size_t>(i)];
    inputs.positions[token] = static_cast<int32_t>(position);
    inputs.adapters[token] = adapter;
  }
}

void bind_device_rows(py::module_& module) {
  py::class_<DeviceRows>(module, "DeviceRows", "The rows of a CUDA runner's steps.")
      .def(py::init<const py::type&, const RowLimits&, bool>(), py::arg("row_type"),
           py::arg("limits"), py::arg("is_batch_invariant"))
      .def("start", &DeviceRows::start, py::arg("slot"), py::arg("prompt_len"))
      .def("forget", &DeviceRows::forget)
      .def("read", &DeviceRows::read, py::arg("rows"))
      .def(
          "write",
          [](DeviceRows& self, Array<uint8_t> memory, const Array<int64_t>& firsts,
             const std::array<int64_t, 5>& sizes,
             const std::optional<std::vector<int64_t>>& needing, const std::vector<int32_t>& masked,
             const std::vector<int32_t>& adapters) {
            check_shape(firsts, "firsts", {kNumInputs});
            self.write(memory, firsts.data(), {sizes[0], sizes[1], sizes[2], sizes[3], sizes[4]},
                       needing, masked, adapters);
          },
          py::arg("memory").noconvert(), py::arg("firsts").noconvert(), py::arg("sizes"),
          py::arg("needing"), py::arg("masked"), py::arg("adapters"))
      .def_readonly("num_tokens", &DeviceRows::num_tokens)
      .def_readonly("num_decodes", &DeviceRows::num_decodes)
      .def_readonly("num_entries", &DeviceRows::num_entries)
      .def_readonly("has_adapters", &DeviceRows::has_adapters)
      .def_readonly("has_vectors", &DeviceRows::has_vectors)
      .def_readonly("is_scored", &DeviceRows::is_scored)
      .def_readonly("has_stops", &DeviceRows::has_stops)
      .def_readonly("sampling", &DeviceRows::sampling)
      .def_readonly("sampling_slots", &DeviceRows::sampling_slots)
      .def_property_readonly("prompt_lens", &DeviceRows::prompt_lens)
      .def("end", &DeviceRows::end, py::arg("row"));
}

}  // namespace tgi
