#include "bindings/cuda/program.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <pybind11/stl.h>
#include <torch/csrc/Dtype.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>
#include <utility>

#include "bindings/cuda/without_gil.h"
#include "cuda/dependent_launch.h"

namespace tgi::cuda {

namespace py = pybind11;
using at::Tensor;
using c10::IValue;
using c10::TypeKind;

namespace {

bool is_operand(const py::handle& value) { return py::isinstance<Operand>(value); }

// Returns the type of an argument, and whether it may be None.
std::pair<c10::TypePtr, bool> type_of(const c10::Argument& argument) {
  const c10::TypePtr& type = argument.type();
  if (type->kind() != TypeKind::OptionalType) return {type, false};
  return {type->containedType(0), true};
}

// Converts a Python constant to an operator's argument; returns none if the argument has another
// type.
std::optional<IValue> to_value(const py::handle& value, const c10::Argument& argument) {
  const auto [type, is_optional] = type_of(argument);
  PyObject* object = value.ptr();
  if (value.is_none()) return is_optional ? std::optional<IValue>(IValue()) : std::nullopt;
  switch (type->kind()) {
    case TypeKind::TensorType:
      if (THPVariable_Check(object)) return IValue(THPVariable_Unpack(object));
      break;
    case TypeKind::BoolType:
      if (PyBool_Check(object)) return IValue(object == Py_True);
      break;
    case TypeKind::IntType:
    case TypeKind::SymIntType:
      if (THPDtype_Check(object)) {
        return IValue(static_cast<int64_t>(reinterpret_cast<THPDtype*>(object)->scalar_type));
      }
      if (PyLong_Check(object) && !PyBool_Check(object)) return IValue(value.cast<int64_t>());
      break;
    case TypeKind::FloatType:
      if (PyFloat_Check(object) || PyLong_Check(object)) return IValue(value.cast<double>());
      break;
    case TypeKind::NumberType:
      if (PyFloat_Check(object)) return IValue(value.cast<double>());
      if (PyLong_Check(object)) return IValue(value.cast<int64_t>());
      break;
    case TypeKind::StringType:
      if (PyUnicode_Check(object)) return IValue(value.cast<std::string>());
      break;
    default:
      break;
  }
  return std::nullopt;
}

bool takes(const c10::Argument& argument, const Operand& operand) {
  const TypeKind kind = type_of(argument).first->kind();
  if (!operand.is_size) return kind == TypeKind::TensorType;
  return kind == TypeKind::IntType || kind == TypeKind::SymIntType || kind == TypeKind::NumberType;
}

// Returns whether two tensors are the same view of the same memory, or both undefined.
bool have_same_layout(const Tensor& one, const Tensor& other) {
  if (!one.defined() || !other.defined()) return one.defined() == other.defined();
  return one.storage().is_alias_of(other.storage()) &&
         one.storage_offset() == other.storage_offset() && one.dtype() == other.dtype() &&
         one.sizes() == other.sizes() && one.strides() == other.strides();
}

int64_t find(const std::vector<std::string>& names, const std::string& name) {
  const auto found = std::find(names.begin(), names.end(), name);
  if (found == names.end()) throw py::key_error(name);
  return found - names.begin();
}

}  // namespace

// One run: the step's tensors, and the views made so far.
class Program::Run {
 public:
  Run(const Program& program, const std::vector<int64_t>& sizes, const std::vector<Tensor>& tensors)
      : program_(program), sizes_(sizes), tensors_(tensors) {
    tensors_.resize(tensors.size() + program.views_.size());
  }

  void call_all() {
    bool was_library = true;  // what ran before the program
    for (const Entry& entry : program_.entries_) {
      if (entry.when.size) {
        const int64_t size = sizes_[entry.when.size->index];
        if (size < entry.when.min || size > entry.when.max) continue;
      }
      if (was_library) follow_library();
      was_library = entry.is_library;
      if (!entry.op) {
        call_python(entry);
        continue;
      }
      stack_.clear();
      for (const IValue& value : entry.arguments) stack_.push_back(value);
      for (const Hole& hole : entry.holes) {
        if (hole.operand.is_size) {
          stack_[hole.place] = sizes_[hole.operand.index];
        } else {
          stack_[hole.place] = tensor(hole.operand.index);
        }
      }
      entry.op->callBoxed(&stack_);
    }
  }

 private:
  const Tensor& tensor(int64_t index) {
    Tensor& found = tensors_[index];
    if (!found.defined()) {
      const int64_t place = index - static_cast<int64_t>(program_.tensors_.size());
      found = cut(program_.views_[place]);
    }
    return found;
  }

  Tensor cut(const View& view) {
    const Tensor& base = view.base.defined() ? view.base : tensor(view.given);
    const int64_t first = view.first < 0 ? 0 : sizes_[view.first];
    const int64_t stop = view.stop < 0 ? base.size(0) : sizes_[view.stop];
    TORCH_CHECK_INDEX(0 <= first && first <= stop && stop <= base.size(0), "rows ", first, " to ",
                      stop, view.stop < 0 ? "" : " (" + program_.sizes_[view.stop] + ")",
                      " are wanted of a tensor that has ", base.size(0));
    return base.narrow(0, first, stop - first);
  }

  void call_python(const Entry& entry) {
    const py::gil_scoped_acquire gil;
    py::tuple arguments(entry.constants.size());
    for (size_t i = 0; i < arguments.size(); ++i) arguments[i] = entry.constants[i];
    for (const Hole& hole : entry.holes) {
      arguments[hole.place] =
          hole.operand.is_size
              ? py::object(py::int_(sizes_[hole.operand.index]))
              : py::reinterpret_steal<py::object>(THPVariable_Wrap(tensor(hole.operand.index)));
    }
    if (!py::reinterpret_steal<py::object>(
            PyObject_Call(entry.function.ptr(), arguments.ptr(), nullptr))) {
      throw python_error();
    }
  }

  const Program& program_;
  const std::vector<int64_t>& sizes_;
  std::vector<Tensor> tensors_;  // the given tensors, then views; undefined: not made yet
  std::vector<IValue> stack_;
};

Program::Program(std::vector<std::string> sizes, std::vector<std::string> tensors)
    : sizes_(std::move(sizes)), tensors_(std::move(tensors)) {}

Operand Program::size(const std::string& name) const { return {true, find(sizes_, name)}; }

Operand Program::tensor(const std::string& name) const { return {false, find(tensors_, name)}; }

Operand Program::rows(const py::handle& base, std::optional<Operand> first,
                      std::optional<Operand> stop) {
  View view = {{}, -1, -1, -1};
  if (is_operand(base)) {
    const auto given = base.cast<Operand>();
    check(given);
    if (given.is_size) throw py::type_error("a size has no rows");
    view.given = given.index;
  } else if (THPVariable_Check(base.ptr())) {
    view.base = THPVariable_Unpack(base.ptr());
    if (view.base.dim() == 0) throw py::value_error("a tensor without dimensions has no rows");
  } else {
    throw py::type_error("rows are of a tensor");
  }
  for (auto [place, size] : {std::pair(&view.first, first), std::pair(&view.stop, stop)}) {
    if (!size) continue;
    check(*size);
    if (!size->is_size) throw py::type_error("rows are counted by a size");
    *place = size->index;
  }
  const auto is_same = [&](const View& other) {
    return have_same_layout(other.base, view.base) && other.given == view.given &&
           other.first == view.first && other.stop == view.stop;
  };
  const auto found = std::find_if(views_.begin(), views_.end(), is_same);
  const int64_t index = found - views_.begin();
  if (found == views_.end()) views_.push_back(std::move(view));
  return {false, static_cast<int64_t>(tensors_.size()) + index};
}

void Program::add(const std::string& name, const py::sequence& arguments, const Condition& when) {
  const size_t dot = std::min(name.find('.'), name.size());
  const std::string overload = name.substr(std::min(dot + 1, name.size()));
  const auto op = c10::Dispatcher::singleton().findSchema({name.substr(0, dot), overload});
  if (!op) throw py::value_error("there is no operator " + name);
  const std::vector<c10::Argument>& wanted = op->schema().arguments();
  if (arguments.size() > wanted.size()) {
    throw py::type_error(name + " takes " + std::to_string(wanted.size()) + " arguments, not " +
                         std::to_string(arguments.size()));
  }
  Entry entry;
  entry.op = *op;
  entry.is_library = name.rfind("tgi_cuda::", 0) != 0;
  for (size_t i = 0; i < wanted.size(); ++i) {
    std::optional<IValue> value;
    if (i >= arguments.size()) {
      value = wanted[i].default_value();
    } else if (const py::object given = arguments[i]; is_operand(given)) {
      const auto operand = given.cast<Operand>();
      check(operand);
      if (takes(wanted[i], operand)) value = IValue();
      entry.holes.push_back({i, operand});
    } else {
      value = to_value(given, wanted[i]);
    }
    if (!value) {
      throw py::type_error(name + ": `" + wanted[i].name() + "` must be " +
                           wanted[i].type()->str());
    }
    entry.arguments.push_back(*std::move(value));
  }
  add_entry(std::move(entry), when);
}

void Program::add_function(py::object function, const py::sequence& arguments,
                           const Condition& when) {
  Entry entry;
  entry.function = std::move(function);
  entry.constants = py::tuple(arguments);
  for (size_t i = 0; i < arguments.size(); ++i) {
    const py::object given = arguments[i];
    if (!is_operand(given)) continue;
    entry.holes.push_back({i, given.cast<Operand>()});
    check(entry.holes.back().operand);
  }
  add_entry(std::move(entry), when);
}

void Program::add_entry(Entry entry, const Condition& when) {
  if (has_run_) throw py::value_error("a program that has run takes no more entries");
  if (when.size) {
    check(*when.size);
    if (!when.size->is_size) throw py::type_error("an entry runs by a size");
  }
  entry.when = when;
  entries_.push_back(std::move(entry));
}

void Program::check(const Operand& operand) const {
  const size_t count = operand.is_size ? sizes_.size() : tensors_.size() + views_.size();
  if (operand.index < 0 || static_cast<size_t>(operand.index) >= count) {
    throw py::value_error("an operand of another program");
  }
}

void Program::start(const std::vector<int64_t>& sizes, const std::vector<Tensor>& tensors) {
  if (sizes.size() != sizes_.size() || tensors.size() != tensors_.size()) {
    throw py::value_error("a run has " + std::to_string(sizes_.size()) + " sizes and " +
                          std::to_string(tensors_.size()) + " tensors, not " +
                          std::to_string(sizes.size()) + " and " + std::to_string(tensors.size()));
  }
  for (size_t i = 0; i < sizes.size(); ++i) {
    if (sizes[i] < 0) throw py::value_error("`" + sizes_[i] + "` must not be negative");
  }
  has_run_ = true;
}

void Program::run(const std::vector<int64_t>& sizes, const std::vector<Tensor>& tensors) const {
  const at::AutoDispatchBelowADInplaceOrView guard;  // nothing here is differentiated
  Run(*this, sizes, tensors).call_all();
}

namespace {

std::vector<Tensor> unpack(const py::sequence& tensors) {
  std::vector<Tensor> found;
  for (const py::handle& tensor : tensors) {
    if (!THPVariable_Check(tensor.ptr())) throw py::type_error("a step's tensors are torch's");
    found.push_back(THPVariable_Unpack(tensor.ptr()));
  }
  return found;
}

void run(Program& program, const std::vector<int64_t>& sizes, const py::sequence& given) {
  const std::vector<Tensor> tensors = unpack(given);
  program.start(sizes, tensors);
  without_gil([&] { program.run(sizes, tensors); });
}

}  // namespace

void bind_program(py::module_& module) {
  py::class_<Operand>(module, "Operand");
  py::class_<Program>(module, "Program")
      .def(py::init<std::vector<std::string>, std::vector<std::string>>(), py::arg("sizes"),
           py::arg("tensors"))
      .def("size", &Program::size, py::arg("name"))
      .def("tensor", &Program::tensor, py::arg("name"))
      .def("rows", &Program::rows, py::arg("base"), py::arg("first"), py::arg("stop"))
      .def(
          "add",
          [](Program& self, const py::object& op, const py::sequence& arguments,
             const std::optional<Operand>& when, int64_t min, int64_t max) {
            const Condition condition = {when, min, max};
            if (py::isinstance<py::str>(op)) {
              self.add(op.cast<std::string>(), arguments, condition);
            } else {
              self.add_function(op, arguments, condition);
            }
          },
          py::arg("op"), py::arg("arguments"), py::arg("when"), py::arg("min"), py::arg("max"))
      .def("run", run, py::arg("sizes"), py::arg("tensors"))
      .def("__len__", &Program::num_entries);
}

}  // namespace tgi::cuda
