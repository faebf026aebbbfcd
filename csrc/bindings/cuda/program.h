// A recorded step: a list of calls of torch's dispatcher that runs without Python.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/ivalue.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <limits>
#include <optional>
#include <string>
#include <vector>

namespace tgi::cuda {

// A placeholder for an argument that differs from step to step: one of the step's sizes, or a
// tensor.
struct Operand {
  bool is_size;
  int64_t index;  // in sizes, or in tensors: the given ones, then views
};

// Makes an entry run only if a size is in [min, max].
struct Condition {
  std::optional<Operand> size;  // none: it always runs
  int64_t min = 0;
  int64_t max = std::numeric_limits<int64_t>::max();
};

// Calls of operators on fixed buffers and on a step's arguments: its sizes, its tensors, and the
// rows of either kind of tensor that the step uses. A view that several entries use is made once
// per run, when the first of them runs. Entries are added with the GIL held, and none after the
// first run; runs keep no state here, so any thread may run the program.
class Program {
 public:
  Program(std::vector<std::string> sizes, std::vector<std::string> tensors);

  Operand size(const std::string& name) const;
  Operand tensor(const std::string& name) const;

  // Returns the rows of a tensor from one size (none: the first row) up to another (none: the last
  // row).
  Operand rows(const pybind11::handle& base, std::optional<Operand> first,
               std::optional<Operand> stop);

  // Adds a call of an operator, `namespace::name.overload`. Arguments are in the schema's order,
  // constants or operands; omitted trailing arguments have their defaults.
  void add(const std::string& name, const pybind11::sequence& arguments, const Condition& when);

  // Adds a call of a Python function, which acquires the GIL.
  void add_function(pybind11::object function, const pybind11::sequence& arguments,
                    const Condition& when);

  // Runs all entries whose condition holds, on the thread's current device and stream, and
  // propagates their exceptions. The caller must not hold the GIL.
  void run(const std::vector<int64_t>& sizes, const std::vector<at::Tensor>& tensors) const;

  // Checks the arguments of `run`; no entry can be added afterwards.
  void start(const std::vector<int64_t>& sizes, const std::vector<at::Tensor>& tensors);

  int64_t num_entries() const { return static_cast<int64_t>(entries_.size()); }

 private:
  struct View {
    at::Tensor base;  // undefined: the base is tensor number `given`
    int64_t given;
    int64_t first, stop;  // sizes; -1: the first row, or the end
  };

  struct Hole {
    size_t place;
    Operand operand;
  };

  struct Entry {
    std::optional<c10::OperatorHandle> op;
    std::vector<c10::IValue> arguments;  // holes are filled with None
    pybind11::object function;           // if there is no operator
    pybind11::tuple constants;           // the function's arguments
    std::vector<Hole> holes;
    Condition when;
    bool is_library = true;  // it launches other kernels than ours, as far as is known
  };

  class Run;

  void add_entry(Entry entry, const Condition& when);
  void check(const Operand& operand) const;

  std::vector<std::string> sizes_, tensors_;
  std::vector<View> views_;
  std::vector<Entry> entries_;
  bool has_run_ = false;
};

void bind_program(pybind11::module_& module);

}  // namespace tgi::cuda
