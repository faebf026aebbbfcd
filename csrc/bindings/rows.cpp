#include "bindings/rows.h"

#include <algorithm>
#include <string>

namespace tgi {

namespace py = pybind11;

namespace {

// The names of a row's attributes, made once: looking one up by a C string makes a new str.
struct Names {
  PyObject* slot = PyUnicode_InternFromString("slot");
  PyObject* token_ids = PyUnicode_InternFromString("token_ids");
  PyObject* start = PyUnicode_InternFromString("start");
  PyObject* block_table = PyUnicode_InternFromString("block_table");
  PyObject* samples = PyUnicode_InternFromString("samples");
};

py::object attribute(PyObject* object, PyObject* name) {
  PyObject* const value = PyObject_GetAttr(object, name);
  if (value == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(value);
}

std::string bounds(const char* name, int64_t stop) {
  return std::string("a ") + name + " must be in [0, " + std::to_string(stop) + ")";
}

int64_t integer(PyObject* value, const char* name, int64_t stop) {
  const int64_t found = PyLong_AsLongLong(value);
  if (found == -1 && PyErr_Occurred() != nullptr) {
    if (PyErr_ExceptionMatches(PyExc_OverflowError) == 0) throw py::error_already_set();
    PyErr_Clear();
    throw PlanError(bounds(name, stop));
  }
  if (found < 0 || found >= stop)
    throw PlanError(bounds(name, stop) + ", got " + std::to_string(found));
  return found;
}

// A list or tuple as it is, any other sequence as a list.
class Items {
 public:
  explicit Items(py::handle sequence)
      : items_(py::reinterpret_steal<py::object>(
            PySequence_Fast(sequence.ptr(), "a plan's rows, ids and blocks are sequences"))) {
    if (!items_) throw py::error_already_set();
  }
  int64_t size() const { return PySequence_Fast_GET_SIZE(items_.ptr()); }
  PyObject* operator[](int64_t index) const {
    return PySequence_Fast_GET_ITEM(items_.ptr(), index);
  }

 private:
  py::object items_;
};

int32_t narrow(int64_t value) { return static_cast<int32_t>(value); }

}  // namespace

cpu::step::StepHeader FlatRows::header() const {
  cpu::step::StepHeader header = {};
  header.num_tokens = static_cast<int64_t>(ids.size());
  header.num_sequences = num_rows();
  header.num_rows = static_cast<int64_t>(draws.size());
  header.ids = ids.data();
  header.positions = positions.data();
  header.slots = slots.data();
  header.query_start = query_start.data();
  header.context_len = context_len.data();
  header.block_table = block_table.data();
  header.block_table_stride = table_width;
  header.rows = draws.data();
  return header;
}

FlatRows flatten(py::handle rows, const RowLimits& limits) {
  static const Names names;
  const Items items(rows);
  FlatRows flat;
  std::vector<Items> tables;
  std::vector<bool> is_taken(static_cast<size_t>(limits.max_rows));
  flat.query_start.push_back(0);
  for (int64_t index = 0; index < items.size(); ++index) {
    PyObject* const row = items[index];
    const int64_t slot = integer(attribute(row, names.slot).ptr(), "slot", limits.max_rows);
    if (is_taken[static_cast<size_t>(slot)]) throw PlanError("two rows of a step have one slot");
    is_taken[static_cast<size_t>(slot)] = true;
    const int64_t start =
        integer(attribute(row, names.start).ptr(), "position", limits.max_context);
    const py::object token_ids = attribute(row, names.token_ids);
    if (token_ids.is_none()) {
      flat.ids.push_back(0);
      flat.from_slot.push_back(narrow(slot));
    } else {
      const Items ids(token_ids);
      for (int64_t i = 0; i < ids.size(); ++i)
        flat.ids.push_back(narrow(integer(ids[i], "token id", limits.vocab_size)));
      flat.from_slot.push_back(-1);
    }
    const auto stop = static_cast<int64_t>(flat.ids.size());
    const int64_t context = start + stop - flat.query_start.back();
    if (stop > limits.max_tokens)
      throw PlanError("a step has at most " + std::to_string(limits.max_tokens) + " tokens");
    if (context == start || context > limits.max_context)
      throw PlanError("a row has no token, or leaves the context of " +
                      std::to_string(limits.max_context));
    for (int64_t position = start; position < context; ++position)
      flat.positions.push_back(narrow(position));
    flat.query_start.push_back(narrow(stop));
    flat.context_len.push_back(narrow(context));
    tables.emplace_back(attribute(row, names.block_table));
    const int64_t num_blocks = (context + limits.block_size - 1) / limits.block_size;
    if (tables.back().size() < num_blocks)
      throw PlanError(std::to_string(num_blocks) + " blocks are needed, got " +
                      std::to_string(tables.back().size()));
    flat.table_width = std::max(flat.table_width, num_blocks);
    const int samples = PyObject_IsTrue(attribute(row, names.samples).ptr());
    if (samples < 0) throw py::error_already_set();
    if (samples != 0) {
      flat.draws.push_back(narrow(stop - 1));
      flat.draw_slots.push_back(narrow(slot));
      flat.draw_rows.push_back(narrow(index));
    }
  }
  flat.block_table.resize(tables.size() * static_cast<size_t>(flat.table_width));
  flat.slots.resize(flat.ids.size());
  for (size_t row = 0; row < tables.size(); ++row) {
    int32_t* const table = flat.block_table.data() + row * static_cast<size_t>(flat.table_width);
    const int64_t context = flat.context_len[row];
    for (int64_t i = 0; i * limits.block_size < context; ++i)
      table[i] = narrow(integer(tables[row][i], "block", limits.num_blocks));
    for (int32_t token = flat.query_start[row]; token < flat.query_start[row + 1]; ++token) {
      const int64_t position = flat.positions[static_cast<size_t>(token)];
      flat.slots[static_cast<size_t>(token)] =
          table[position / limits.block_size] * limits.block_size + position % limits.block_size;
    }
  }
  return flat;
}

}  // namespace tgi
