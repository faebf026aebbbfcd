#include "bindings/rows.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>

#include "bindings/checks.h"

namespace tgi {

namespace py = pybind11;

namespace {

// Attribute names of a row, interned once: looking one up by a C string creates a new str.
struct Names {
  PyObject* slot = PyUnicode_InternFromString("slot");
  PyObject* token_ids = PyUnicode_InternFromString("token_ids");
  PyObject* start = PyUnicode_InternFromString("start");
  PyObject* block_tables = PyUnicode_InternFromString("block_tables");
  PyObject* samples = PyUnicode_InternFromString("samples");
  PyObject* is_generated = PyUnicode_InternFromString("is_generated");
  PyObject* stop = PyUnicode_InternFromString("stop");
  PyObject* num_drafts = PyUnicode_InternFromString("num_drafts");
  PyObject* adapter = PyUnicode_InternFromString("adapter");
  PyObject* states = PyUnicode_InternFromString("states");
  PyObject* resumes = PyUnicode_InternFromString("resumes");
  PyObject* keeps = PyUnicode_InternFromString("keeps");
};

bool is_true(const py::object& value) {
  const int found = PyObject_IsTrue(value.ptr());
  if (found < 0) throw py::error_already_set();
  return found != 0;
}

int32_t narrow(int64_t value) { return static_cast<int32_t>(value); }

}  // namespace

cpu::step::StepHeader FlatRows::header() const {
  cpu::step::StepHeader header = {};
  header.num_tokens = static_cast<int64_t>(ids.size());
  header.num_generated = num_generated;
  header.num_sequences = num_rows();
  header.num_rows = static_cast<int64_t>(sample_after.size());
  header.ids = ids.data();
  header.positions = header.rotary = positions.data();
  header.num_groups = num_groups;
  header.slots = slots.data();
  header.query_start = query_start.data();
  header.context_len = context_len.data();
  header.block_table = block_table.data();
  header.block_table_stride = table_width;
  header.rows = sample_after.data();
  header.adapters = adapter_spans.data();
  header.num_adapters = static_cast<int64_t>(adapter_spans.size());
  if (images != nullptr) images->add_to(header);
  return header;
}

void FlatRows::check_sequences() const {
  const auto num_tokens = static_cast<int64_t>(ids.size());
  check(query_start.size() == context_len.size() + 1 && query_start.front() == 0 &&
            query_start.back() == num_tokens,
        "`query_start` must run from 0 to ", num_tokens, ", and have one more entry than ",
        "`context_len`");
  for (size_t s = 0; s < context_len.size(); ++s) {
    const int64_t length = int64_t{query_start[s + 1]} - query_start[s];
    check(length > 0, "`query_start` must ascend, got ", query_start[s], " before ",
          query_start[s + 1]);
    check(context_len[s] >= length, "`context_len`[", s, "] must be at least ", length, ", got ",
          context_len[s]);
  }
  check(num_generated >= 0 && num_generated <= num_tokens, "`num_generated` must be in [0, ",
        num_tokens, "], got ", num_generated);
  check(std::binary_search(query_start.begin(), query_start.end(), num_generated),
        "`num_generated` must be where a sequence begins, or all tokens, got ", num_generated);
}

void FlatRows::set_images(std::shared_ptr<ImageRows> given, int32_t pad_id) {
  const auto num_tokens = static_cast<int64_t>(ids.size());
  const auto fits = [&](const std::vector<int32_t>& list) {
    return list.empty() || static_cast<int64_t>(list.size()) == num_tokens;
  };
  check_range(given->tokens.data(), static_cast<int64_t>(given->tokens.size()), num_tokens,
              "tokens");
  check(fits(given->rotary) && fits(given->visible_until),
        "`rotary` and `visible_until` must have an element a token of the step, ", num_tokens);
  for (const int32_t token : given->tokens) ids[static_cast<size_t>(token)] = pad_id;
  images = std::move(given);
}

void FlatRows::set_adapters(std::vector<AdapterPtr> of_rows) {
  adapters = std::move(of_rows);
  adapter_spans.clear();
  for (size_t row = 0; row < adapters.size(); ++row) {
    if (adapters[row] == nullptr) continue;
    const int32_t begin = query_start[row], end = query_start[row + 1];
    if (row > 0 && adapters[row] == adapters[row - 1]) {
      adapter_spans.back().end = end;
    } else {
      adapter_spans.push_back({begin, end, adapters[row]->terms()});
    }
  }
}

namespace {

// Appends a row's blocks, group by group. Blocks before the window are not examined: the first
// block that is read takes their entries.
void read_tables(const py::object& given, const PlannedRows::Row& row, const RowLimits& limits,
                 std::vector<int32_t>& blocks) {
  const Items tables(given);
  const auto num_blocks = static_cast<int64_t>(row.num_blocks);
  if (tables.size() != limits.num_groups())
    throw PlanError("a row has a block table for each of " + std::to_string(limits.num_groups()) +
                    " groups, got " + std::to_string(tables.size()));
  for (int64_t group = 0; group < limits.num_groups(); ++group) {
    const Items table(tables[group]);
    if (table.size() < num_blocks)
      throw PlanError(std::to_string(num_blocks) + " blocks are needed, got " +
                      std::to_string(table.size()));
    const int64_t window = limits.windows[static_cast<size_t>(group)];
    const int64_t first =
        row.start >= window ? (row.start - window + 1) / limits.block_size : int64_t{0};
    for (int64_t i = first; i < num_blocks; ++i) {
      const int32_t block = narrow(integer(table[i], "block", limits.num_blocks));
      if (i == first) blocks.insert(blocks.end(), static_cast<size_t>(first), block);
      blocks.push_back(block);
    }
  }
}

// Reads which kept state a row resumes from, and which of its states to keep.
void read_states(const py::object& given, const RowLimits& limits, PlannedRows::Row& row,
                 std::vector<StateKeep>& keeps) {
  static const Names names;
  row.resumes = -1;
  row.first_keep = keeps.size();
  if (given.is_none()) return;
  const auto place_of = [&](PyObject* value) {
    return narrow(integer(value, "place of a kept state", limits.num_kept_states));
  };
  const py::object resumes = attribute(given.ptr(), names.resumes);
  if (!resumes.is_none()) row.resumes = place_of(resumes.ptr());
  const Items items(attribute(given.ptr(), names.keeps));
  int64_t last = row.start;
  for (int64_t i = 0; i < items.size(); ++i) {
    const Items pair((py::handle(items[i])));
    if (pair.size() != 2) throw PlanError("a kept state is a pair of a position and a place");
    const int64_t position = integer(pair[0], "position of a state", row.stop);
    if (position < last || position == 0 || (row.is_floating && position > row.start))
      throw PlanError("states to keep must be in the order of a row's positions, and none at 0");
    keeps.push_back({0, narrow(position), place_of(pair[1])});
    last = position;
  }
  row.num_keeps = keeps.size() - row.first_keep;
}

}  // namespace

PlannedRows read_rows(py::handle rows, const RowLimits& limits) {
  static const Names names;
  const Items items(rows);
  PlannedRows planned;
  planned.rows.reserve(static_cast<size_t>(items.size()));
  std::vector<bool> is_taken(static_cast<size_t>(limits.max_rows));
  int64_t num_tokens = 0;
  for (int64_t index = 0; index < items.size(); ++index) {
    PyObject* const item = items[index];
    const int64_t slot = integer(attribute(item, names.slot).ptr(), "slot", limits.max_rows);
    if (is_taken[static_cast<size_t>(slot)]) throw PlanError("two rows of a step have one slot");
    is_taken[static_cast<size_t>(slot)] = true;
    PlannedRows::Row row = {};
    row.slot = narrow(slot);
    const int64_t start =
        integer(attribute(item, names.start).ptr(), "position", limits.max_context);
    row.start = narrow(start);
    row.first_id = planned.ids.size();
    row.first_block = planned.blocks.size();
    const py::object token_ids = attribute(item, names.token_ids);
    row.is_from_slot = token_ids.is_none();
    int64_t max_row_tokens = 1, stop = start + 1;
    if (row.is_from_slot) {
      const py::object given = attribute(item, names.stop);
      row.is_floating = !given.is_none();
      if (row.is_floating) {
        stop = integer(given.ptr(), "end position", limits.max_context + 1);
        const int64_t max_drafts =
            integer(attribute(item, names.num_drafts).ptr(), "number of drafts", limits.max_tokens);
        if (stop < start) throw PlanError("a row stops before it starts");
        row.max_drafts = narrow(max_drafts);
        max_row_tokens += max_drafts;
      }
    } else {
      const Items ids(token_ids);
      for (int64_t i = 0; i < ids.size(); ++i)
        planned.ids.push_back(narrow(integer(ids[i], "token id", limits.vocab_size)));
      max_row_tokens = ids.size();
      stop = start + max_row_tokens;
    }
    row.num_ids = planned.ids.size() - row.first_id;
    row.stop = narrow(stop);
    num_tokens += max_row_tokens;
    if (num_tokens > limits.max_tokens)
      throw PlanError("a step has at most " + std::to_string(limits.max_tokens) + " tokens");
    if (max_row_tokens == 0 || stop > limits.max_context)
      throw PlanError("a row has no token, or exceeds the context of " +
                      std::to_string(limits.max_context));
    row.num_blocks = static_cast<size_t>((stop + limits.block_size - 1) / limits.block_size);
    read_tables(attribute(item, names.block_tables), row, limits, planned.blocks);
    row.samples = is_true(attribute(item, names.samples));
    row.is_generated = is_true(attribute(item, names.is_generated));
    const py::object adapter = attribute(item, names.adapter);
    if (!adapter.is_none()) row.adapter = adapter.cast<std::shared_ptr<Adapter>>();
    planned.has_adapters = planned.has_adapters || row.adapter != nullptr;
    read_states(attribute(item, names.states), limits, row, planned.keeps);
    planned.rows.push_back(row);
  }
  return planned;
}

int64_t start_of(const PlannedRows::Row& row, const SlotPosition& place) {
  if (!row.is_floating) return row.start;
  const int64_t start = place.position - 1;
  if (start < row.start || start > row.stop)
    throw PlanError("slot " + std::to_string(row.slot) + " is at " + std::to_string(start) +
                    ", not in [" + std::to_string(row.start) + ", " + std::to_string(row.stop) +
                    "]");
  return start;
}

namespace {

// Writes the block tables and slots of rows whose tokens are already laid out.
void lay_out_tables(const PlannedRows& planned, const std::vector<const PlannedRows::Row*>& rows,
                    const RowLimits& limits, FlatRows& flat) {
  const size_t num_tokens = flat.ids.size(), width = static_cast<size_t>(flat.table_width);
  const auto num_groups = static_cast<size_t>(limits.num_groups());
  flat.num_groups = limits.num_groups();
  flat.block_table.resize(num_groups * rows.size() * width);
  flat.slots.resize(num_groups * num_tokens);
  for (size_t group = 0; group < num_groups; ++group) {
    int64_t* const slots = flat.slots.data() + group * num_tokens;
    for (size_t row = 0; row < rows.size(); ++row) {
      int32_t* const table = flat.block_table.data() + (group * rows.size() + row) * width;
      const int64_t num_blocks =
          (flat.context_len[row] + limits.block_size - 1) / limits.block_size;
      const PlannedRows::Row& from = *rows[row];
      std::copy_n(planned.blocks.data() + from.first_block + group * from.num_blocks, num_blocks,
                  table);
      for (int32_t token = flat.query_start[row]; token < flat.query_start[row + 1]; ++token) {
        const int64_t position = flat.positions[static_cast<size_t>(token)];
        slots[token] =
            table[position / limits.block_size] * limits.block_size + position % limits.block_size;
      }
    }
  }
}

}  // namespace

FlatRows lay_out(const PlannedRows& planned, const RowLimits& limits,
                 const std::vector<SlotPosition>& places,
                 const std::vector<std::vector<int32_t>>& drafts) {
  FlatRows flat;
  std::vector<const PlannedRows::Row*> taken;
  std::vector<AdapterPtr> adapters;
  flat.query_start.push_back(0);
  for (size_t index = 0; index < planned.rows.size(); ++index) {
    const PlannedRows::Row& row = planned.rows[index];
    const int64_t start = start_of(row, places[index]);
    const auto first = static_cast<int64_t>(flat.ids.size());
    if (row.is_from_slot) {
      if (start >= row.stop) continue;  // the sequence already has all its tokens
      flat.ids.push_back(places[index].last_id);
      if (!drafts.empty()) {
        const std::vector<int32_t>& list = drafts[index];
        flat.ids.insert(flat.ids.end(), list.begin(), list.end());
      }
    } else {
      const auto ids = planned.ids.begin() + static_cast<std::ptrdiff_t>(row.first_id);
      flat.ids.insert(flat.ids.end(), ids, ids + static_cast<std::ptrdiff_t>(row.num_ids));
    }
    const auto stop = static_cast<int64_t>(flat.ids.size());
    const int64_t context = start + stop - first;
    if (context > row.stop || (row.is_from_slot && stop - first > 1 + row.max_drafts))
      throw PlanError("a row has more drafts than it may have");
    for (int64_t position = start; position < context; ++position)
      flat.positions.push_back(narrow(position));
    flat.query_start.push_back(narrow(stop));
    flat.context_len.push_back(narrow(context));
    if (row.is_generated) {
      if (flat.num_generated != first) throw PlanError("rows of generated tokens come first");
      flat.num_generated = stop;
    }
    flat.row_slots.push_back(row.slot);
    flat.row_of_plan.push_back(narrow(static_cast<int64_t>(index)));
    flat.num_drafts.push_back(row.is_from_slot ? narrow(stop - first - 1) : 0);
    flat.resumes.push_back(row.resumes);
    if (row.num_keeps > 0 && start != row.start)
      throw PlanError("a state is kept for a row that starts elsewhere");
    for (size_t i = row.first_keep; i < row.first_keep + row.num_keeps; ++i) {
      flat.keeps.push_back(planned.keeps[i]);
      flat.keeps.back().row = narrow(flat.num_rows() - 1);
    }
    taken.push_back(&row);
    adapters.push_back(row.adapter);
    flat.table_width =
        std::max(flat.table_width, (context + limits.block_size - 1) / limits.block_size);
    if (!row.samples) continue;
    for (int64_t token = row.is_from_slot ? first : stop - 1; token < stop; ++token) {
      const bool is_draft = row.is_from_slot && token > first;
      flat.sample_after.push_back(narrow(token));
      flat.sample_slots.push_back(row.slot);
      flat.sample_plan_rows.push_back(narrow(static_cast<int64_t>(index)));
      flat.drafts.push_back(is_draft ? flat.ids[static_cast<size_t>(token)] : -1);
    }
  }
  if (planned.has_adapters) flat.set_adapters(std::move(adapters));
  lay_out_tables(planned, taken, limits, flat);
  return flat;
}

namespace {

// last_ids, positions: one element per slot, with any stride. drafts: a list per row, or empty.
FlatRows flatten_with_ids(py::handle rows, const RowLimits& limits,
                          const py::array_t<int32_t, 0>& last_ids,
                          const std::optional<py::array_t<int64_t, 0>>& positions,
                          const std::vector<std::vector<int32_t>>& drafts) {
  const PlannedRows planned = read_rows(rows, limits);
  check(last_ids.ndim() == 1 && (!positions || positions->ndim() == 1),
        "`last_ids` and `positions` must have one dimension");
  check(drafts.empty() || drafts.size() == planned.rows.size(), "`drafts` must have a list a row");
  for (const std::vector<int32_t>& list : drafts) {
    check_range(list.data(), static_cast<int64_t>(list.size()), limits.vocab_size, "drafts");
  }
  std::vector<SlotPosition> places(planned.rows.size());
  for (size_t index = 0; index < places.size(); ++index) {
    const PlannedRows::Row& row = planned.rows[index];
    if (!row.is_from_slot) continue;
    if (row.slot >= last_ids.shape(0)) throw PlanError("a row's slot has no last id");
    places[index].last_id = last_ids.unchecked<1>()(row.slot);
    if (!row.is_floating) continue;
    if (!positions || row.slot >= positions->shape(0))
      throw PlanError("a row's slot has no position");
    places[index].position = positions->unchecked<1>()(row.slot);
  }
  return lay_out(planned, limits, places, drafts);
}

// Uses prepared arrays, such as those of a module's self-check. What is checked here is how tokens
// are shared out; those who read the arrays check ids, positions, slots, blocks and the rest.
FlatRows from_arrays(std::vector<int32_t> ids, std::vector<int32_t> positions,
                     std::vector<int64_t> slots, std::vector<int32_t> query_start,
                     std::vector<int32_t> context_len, const Array<int32_t>& block_table,
                     std::vector<int32_t> row_slots, int64_t num_generated,
                     const std::vector<std::shared_ptr<Adapter>>& adapters,
                     std::vector<int32_t> num_drafts, std::vector<int32_t> resumes,
                     const std::vector<std::tuple<int32_t, int32_t, int32_t>>& keeps) {
  check(positions.size() == ids.size() && slots.size() == ids.size(),
        "`positions` and `slots` have an entry a token");
  check_shape(block_table, "block_table", {static_cast<int64_t>(context_len.size()), -1});
  FlatRows flat;  // with a single group
  flat.ids = std::move(ids);
  flat.positions = std::move(positions);
  flat.slots = std::move(slots);
  flat.query_start = std::move(query_start);
  flat.context_len = std::move(context_len);
  check(row_slots.empty() || row_slots.size() == flat.context_len.size(),
        "`row_slots` has an entry a sequence");
  flat.row_slots = std::move(row_slots);
  flat.num_generated = num_generated;
  flat.check_sequences();
  flat.block_table.assign(block_table.data(), block_table.data() + block_table.size());
  flat.table_width = block_table.shape(1);
  check(adapters.empty() || adapters.size() == flat.context_len.size(),
        "`adapters` has an entry a sequence");
  flat.set_adapters({adapters.begin(), adapters.end()});
  flat.num_drafts = std::move(num_drafts);
  flat.resumes = std::move(resumes);
  for (const auto& [row, position, place] : keeps) flat.keeps.push_back({row, position, place});
  return flat;
}

template <class Value>
py::array_t<Value> copy_of(const std::vector<Value>& values) {
  return py::array_t<Value>(static_cast<py::ssize_t>(values.size()), values.data());
}

RowLimits make_limits(int64_t vocab_size, int64_t num_blocks, int64_t block_size,
                      int64_t max_context, int64_t max_rows, int64_t max_tokens,
                      const std::vector<std::optional<int64_t>>& windows, int64_t num_kept_states) {
  for (const int64_t limit :
       {vocab_size, num_blocks, block_size, max_context, max_rows, max_tokens}) {
    check(limit > 0 && limit <= INT32_MAX, "limits must be in [1, ", INT32_MAX, "], got ", limit);
  }
  RowLimits limits = {
      .vocab_size = vocab_size,
      .num_blocks = num_blocks,
      .block_size = block_size,
      .max_context = max_context,
      .max_rows = max_rows,
      .max_tokens = max_tokens,
      .windows = {},
      .num_kept_states = num_kept_states,
  };
  check(num_kept_states >= 0 && num_kept_states <= INT32_MAX, "`num_kept_states` must be in [0, ",
        INT32_MAX, "], got ", num_kept_states);
  check(!windows.empty(), "there must be at least one group");
  for (const std::optional<int64_t>& window : windows) {
    check(!window || *window > 0, "a window must be positive");
    limits.windows.push_back(window.value_or(kNoWindow));
  }
  return limits;
}

}  // namespace

void bind_rows(py::module_& module) {
  py::register_local_exception<PlanError>(module, "PlanError", PyExc_ValueError);
  py::class_<RowLimits>(module, "RowLimits", "Bounds of a plan's integers.")
      .def(py::init(&make_limits), py::kw_only(), py::arg("vocab_size"), py::arg("num_blocks"),
           py::arg("block_size"), py::arg("max_context"), py::arg("max_rows"),
           py::arg("max_tokens"), py::arg("windows"), py::arg("num_kept_states") = 0);
  py::class_<FlatRows>(module, "FlatRows",
                       "A plan's rows as flat arrays, see csrc/bindings/rows.h.")
      .def(py::init(&from_arrays), py::kw_only(), py::arg("ids"), py::arg("positions"),
           py::arg("slots"), py::arg("query_start"), py::arg("context_len"),
           py::arg("block_table").noconvert(), py::arg("row_slots") = std::vector<int32_t>(),
           py::arg("num_generated") = 0,
           py::arg("adapters") = std::vector<std::shared_ptr<Adapter>>(),
           py::arg("num_drafts") = std::vector<int32_t>(),
           py::arg("resumes") = std::vector<int32_t>(),
           py::arg("keeps") = std::vector<std::tuple<int32_t, int32_t, int32_t>>())
      .def("set_images", &FlatRows::set_images, py::arg("images").none(false), py::arg("pad_id"))
      .def_readonly("num_generated", &FlatRows::num_generated,
                    "Number of leading tokens that were sampled (for tests and benchmarks).")
      .def_property_readonly("ids", [](const FlatRows& rows) { return copy_of(rows.ids); })
      .def_property_readonly("positions",
                             [](const FlatRows& rows) { return copy_of(rows.positions); })
      .def_property_readonly("slots", [](const FlatRows& rows) { return copy_of(rows.slots); })
      .def_property_readonly("query_start",
                             [](const FlatRows& rows) { return copy_of(rows.query_start); })
      .def_property_readonly("context_len",
                             [](const FlatRows& rows) { return copy_of(rows.context_len); })
      .def_property_readonly("row_slots",
                             [](const FlatRows& rows) { return copy_of(rows.row_slots); })
      .def_property_readonly("row_of_plan",
                             [](const FlatRows& rows) { return copy_of(rows.row_of_plan); })
      .def_property_readonly("sample_after",
                             [](const FlatRows& rows) { return copy_of(rows.sample_after); })
      .def_property_readonly("sample_slots",
                             [](const FlatRows& rows) { return copy_of(rows.sample_slots); })
      .def_property_readonly("sample_plan_rows",
                             [](const FlatRows& rows) { return copy_of(rows.sample_plan_rows); })
      .def_property_readonly("drafts", [](const FlatRows& rows) { return copy_of(rows.drafts); })
      .def_property_readonly("resumes", [](const FlatRows& rows) { return copy_of(rows.resumes); })
      .def_property_readonly("keeps",
                             [](const FlatRows& rows) {
                               std::vector<std::tuple<int32_t, int32_t, int32_t>> keeps;
                               for (const StateKeep& each : rows.keeps) {
                                 keeps.emplace_back(each.row, each.position, each.place);
                               }
                               return keeps;
                             })
      .def_property_readonly("block_tables", [](const FlatRows& rows) {
        return py::array_t<int32_t>({rows.num_groups, rows.num_rows(), rows.table_width},
                                    rows.block_table.data());
      });
  module.def("flatten_rows", &flatten_with_ids, py::arg("rows"), py::arg("limits"),
             py::arg("last_ids").noconvert(), py::arg("positions").noconvert() = py::none(),
             py::arg("drafts") = std::vector<std::vector<int32_t>>(),
             "Return a plan's rows as arrays, each integer checked.");
}

}  // namespace tgi
