#include "bindings/cuda/submit.h"

#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime_api.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <exception>
#include <utility>
#include <variant>
#include <vector>

#include "bindings/cuda/without_gil.h"
#include "bindings/device_calls.h"

namespace tgi::cuda {

namespace py = pybind11;
using at::Tensor;

namespace {

// An event without timing, whose waiters sleep. It is created when it is first recorded, on that
// thread's device.
class Event {
 public:
  Event() = default;
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;
  ~Event() {
    if (event_ != nullptr) cudaEventDestroy(event_);
  }

  void record(cudaStream_t stream) {
    if (event_ == nullptr) {
      C10_CUDA_CHECK(
          cudaEventCreateWithFlags(&event_, cudaEventBlockingSync | cudaEventDisableTiming));
    }
    C10_CUDA_CHECK(cudaEventRecord(event_, stream));
  }

  void synchronize() const {
    if (event_ != nullptr) C10_CUDA_CHECK(cudaEventSynchronize(event_));
  }

 private:
  cudaEvent_t event_ = nullptr;
};

struct Graph {
  py::object owner;  // keeps `graph` alive
  cudaGraphExec_t graph;
};

struct Copy {
  void* target;
  const void* source;
  size_t num_bytes;
};

struct Call {
  PyObject* function;
};

using Command = std::variant<Copy, cudaGraphExec_t, Event*, Call>;

const Tensor& tensor(PyObject* value) {
  if (!THPVariable_Check(value)) throw py::type_error("a copy is between tensors");
  return THPVariable_Unpack(value);
}

// Reads (target, source, num_bytes), the `Copy` of runner/cuda_device.py.
Copy read_copy(const py::tuple& values) {
  if (values.size() != 3) throw py::type_error("a copy has three values");
  const Tensor& target = tensor(values[0].ptr());
  const Tensor& source = tensor(values[1].ptr());
  const auto num_bytes = values[2].cast<int64_t>();
  TORCH_CHECK(target.is_contiguous() && source.is_contiguous(), "copies are of contiguous tensors");
  const auto room = static_cast<int64_t>(std::min(target.nbytes(), source.nbytes()));
  TORCH_CHECK(num_bytes >= 0 && num_bytes <= room, num_bytes, " bytes are copied from ",
              source.nbytes(), " to ", target.nbytes());
  return {target.mutable_data_ptr(), source.const_data_ptr(), static_cast<size_t>(num_bytes)};
}

Command read(const py::handle& value) {
  if (PyTuple_Check(value.ptr())) return read_copy(py::reinterpret_borrow<py::tuple>(value));
  if (py::isinstance<Graph>(value)) return value.cast<const Graph&>().graph;
  if (py::isinstance<Event>(value)) return value.cast<Event*>();
  if (PyCallable_Check(value.ptr()) == 0) {
    throw py::type_error("a command is a copy, a graph, an event or a function");
  }
  return Call{value.ptr()};
}

struct Submit {
  cudaStream_t stream;

  void operator()(const Copy& copy) const {
    C10_CUDA_CHECK(
        cudaMemcpyAsync(copy.target, copy.source, copy.num_bytes, cudaMemcpyDefault, stream));
  }
  void operator()(cudaGraphExec_t graph) const { C10_CUDA_CHECK(cudaGraphLaunch(graph, stream)); }
  void operator()(Event* event) const { event->record(stream); }
  void operator()(Call call) const {
    const py::gil_scoped_acquire gil;
    if (!py::reinterpret_steal<py::object>(PyObject_CallNoArgs(call.function))) {
      throw python_error();
    }
  }
};

std::vector<Command> read_all(const py::tuple& commands) {
  std::vector<Command> all;
  all.reserve(commands.size());
  for (const py::handle& command : commands) all.push_back(read(command));
  return all;
}

// Submits to the thread's current stream.
void submit_all(const std::vector<Command>& commands) {
  const Submit visitor = {c10::cuda::getCurrentCUDAStream().stream()};
  for (const Command& command : commands) std::visit(visitor, command);
}

void submit(const py::sequence& commands) {
  const py::tuple held(commands);  // whatever becomes of the sequence meanwhile
  const std::vector<Command> all = read_all(held);
  without_gil([&] { submit_all(all); });
}

// Makes a call without the GIL; returns null, or why it failed.
template <class Function>
char* why_not(const Function& function) {
  try {
    function();
    return nullptr;
  } catch (python_error& error) {  // of a command that is a Python function
    const py::gil_scoped_acquire gil;
    error.restore();
    return strdup(py::error_already_set().what());
  } catch (const c10::Error& error) {
    return strdup(error.what_without_backtrace());
  } catch (const std::exception& error) {
    return strdup(error.what());
  }
}

// Commands that other code submits without Python. The last of them is an event.
class Prepared {
 public:
  explicit Prepared(const py::sequence& commands)
      : held_(commands),
        commands_(read_all(held_)),
        calls_{this, [](void* self) { return static_cast<Prepared*>(self)->submit(); },
               [](void* self) { return static_cast<Prepared*>(self)->wait(); }} {
    if (commands_.empty() || !std::holds_alternative<Event*>(commands_.back()))
      throw py::type_error("the last of prepared commands is an event");
  }
  Prepared(const Prepared&) = delete;
  Prepared& operator=(const Prepared&) = delete;

  const DeviceCalls* calls() const { return &calls_; }

 private:
  char* submit() const {
    return why_not([&] { submit_all(commands_); });
  }
  char* wait() const {
    return why_not([&] { std::get<Event*>(commands_.back())->synchronize(); });
  }

  const py::tuple held_;
  const std::vector<Command> commands_;
  const DeviceCalls calls_;
};

}  // namespace

void bind_submit(py::module_& module) {
  py::class_<Event>(module, "Event").def(py::init<>()).def("synchronize", [](const Event& event) {
    without_gil([&] { event.synchronize(); });
  });
  py::class_<Graph>(module, "Graph")
      .def(py::init([](py::object owner, uintptr_t graph) {
             return Graph{std::move(owner), reinterpret_cast<cudaGraphExec_t>(graph)};
           }),
           py::arg("owner"), py::arg("graph"))
      .def("__call__", [](const Graph& graph) {
        without_gil([&] { Submit{c10::cuda::getCurrentCUDAStream().stream()}(graph.graph); });
      });
  py::class_<Prepared>(module, "Prepared")
      .def(py::init<const py::sequence&>(), py::arg("commands"))
      .def_property_readonly("address", [](const Prepared& prepared) {
        return reinterpret_cast<uintptr_t>(prepared.calls());
      });
  module.def("submit", submit, py::arg("commands"));
}

}  // namespace tgi::cuda
