// A recorded step as a list of calls of torch's dispatcher, run without Python.
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

// What an argument stands for that is another in every step: one of its sizes, or a tensor.
struct Operand {
  bool is_size;
  int64_t index;  // of sizes, or of tensors: the given ones, then views
};

// An entry runs while a size is in [least, most].
struct Condition {
  std::optional<Operand> size;  // none: it always runs
  int64_t least = 0;
  int64_t most = std::numeric_limits<int64_t>::max();
};

// Calls of operators on fixed buffers, and on what a step brings: its sizes, its tensors, and the
// rows of either that it has. A view that several entries take is made once a run, when the first
// of them runs. Entries are added with the GIL held, none after the first run; runs hold no state
// here, so that any thread may run it.
class Program {
 public:
  Program(std::vector<std::string> sizes, std::vector<std::string> tensors);

  Operand size(const std::string& name) const;
  Operand tensor(const std::string& name) const;

  // The rows of a tensor from one size (none: the first) up to another (none: the last).
  Operand rows(const pybind11::handle& base, std::optional<Operand> first,
               std::optional<Operand> stop);

  // Adds a call of an operator, `namespace::name.overload`. Arguments are in the schema's order,
  // constants or operands; what is left out at the end has its default.
  void add(const std::string& name, const pybind11::sequence& arguments, const Condition& when);

  // Adds a call of a function of Python's, which takes the GIL.
  void add_function(pybind11::object function, const pybind11::sequence& arguments,
                    const Condition& when);

  // Runs all entries whose condition holds, on the thread's device and stream; what one of them
  // raises is raised. The caller does not hold the GIL.
  void run(const std::vector<int64_t>& sizes, const std::vector<at::Tensor>& tensors) const;

  // What `run` may be called with, and that no entry is added any more.
  void start(const std::vector<int64_t>& sizes, const std::vector<at::Tensor>& tensors);

  int64_t num_entries() const { return static_cast<int64_t>(entries_.size()); }

 private:
  struct View {
    at::Tensor base;  // undefined: `given` is
    int64_t given;
    int64_t first, stop;  // sizes; -1: the first row, behind the last
  };

  struct Hole {
    size_t place;
    Operand operand;
  };

  struct Entry {
    std::optional<c10::OperatorHandle> op;
    std::vector<c10::IValue> arguments;  // where None stands a hole may be
    pybind11::object function;           // where there is no operator
    pybind11::tuple constants;           // of the function
    std::vector<Hole> holes;
    Condition when;
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
