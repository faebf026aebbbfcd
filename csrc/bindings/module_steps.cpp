// The part of tgi_asgi._C that is about steps: rows as arrays, the recorded program, the queue, and
// the cache's memory.
#include "bindings/module_steps.h"

#include <ATen/ops/from_blob.h>
#include <pybind11/numpy.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <exception>
#include <memory>
#include <vector>

#include "bindings/program.h"
#include "bindings/rows.h"
#include "bindings/step_queue.h"
#include "cpu/page_supply.h"

namespace tgi {

namespace {

template <class Value>
at::Tensor tensor_of(const std::vector<Value>& values, at::IntArrayRef shape) {
  const at::Tensor view = at::from_blob(const_cast<Value*>(values.data()), shape,
                                        c10::CppTypeToScalarType<Value>::value);
  return view.clone();
}

// The arrays of `StepHeader` in its order, from ids to block_table.
py::tuple flatten_to_tensors(py::handle rows, const RowLimits& limits,
                             const py::array_t<int32_t>& last_ids) {
  FlatRows flat = flatten(rows, limits);
  const auto ids = last_ids.unchecked<1>();
  flat.take_last_ids([&](int32_t slot) {
    if (slot >= ids.shape(0)) throw PlanError("a row's slot has no last id");
    return ids(slot);
  });
  const auto num_tokens = static_cast<int64_t>(flat.ids.size());
  return py::make_tuple(tensor_of(flat.ids, num_tokens), tensor_of(flat.positions, num_tokens),
                        tensor_of(flat.slots, num_tokens),
                        tensor_of(flat.query_start, flat.num_rows() + 1),
                        tensor_of(flat.context_len, flat.num_rows()),
                        tensor_of(flat.block_table, {flat.num_rows(), flat.table_width}));
}

void translate(std::exception_ptr pointer) {
  try {
    if (pointer) std::rethrow_exception(pointer);
  } catch (const c10::Error& error) {
    py::set_error(PyExc_RuntimeError, error.what_without_backtrace());
  }
}

void bind_program(py::module_& module) {
  using release = py::call_guard<py::gil_scoped_release>;
  py::class_<StepProgram, std::shared_ptr<StepProgram>>(module, "StepProgram",
                                                        "See tgi_asgi.ops.StepProgram.")
      .def(py::init<int64_t, int64_t, int64_t>())
      .def("activation_bytes", &StepProgram::activation_bytes)
      .def("query_bytes", &StepProgram::query_bytes)
      .def("embed", &StepProgram::embed)
      .def("norm", &StepProgram::norm)
      .def("qkv", &StepProgram::qkv)
      .def("attention", &StepProgram::attention)
      .def("linear_add", &StepProgram::linear_add)
      .def("gate_up", &StepProgram::gate_up)
      .def("logits", &StepProgram::logits)
      .def("run", &StepProgram::run, release())
      .def("draw", &StepProgram::draw, release())
      .def("profile", &StepProgram::profile, release())
      .def("run_head", &StepProgram::run_head, release())
      .def("num_operators", &StepProgram::num_operators);
}

// Keeps the memory alive.
struct TensorSupply {
  at::Tensor memory;
  cpu::PageSupply supply;

  TensorSupply(const at::Tensor& tensor, int64_t num_bytes)
      : memory(tensor), supply(bytes_of(tensor), std::min<int64_t>(num_bytes, tensor.nbytes())) {}
  static void* bytes_of(const at::Tensor& tensor) {
    TORCH_CHECK(tensor.is_contiguous(), "`memory` must be contiguous");
    return tensor.mutable_data_ptr();
  }
};

void bind_supply(py::module_& module) {
  using release = py::call_guard<py::gil_scoped_release>;
  py::class_<TensorSupply>(module, "PageSupply",
                           "A thread that has the system supply memory before it is written.")
      .def(py::init<const at::Tensor&, int64_t>(), py::arg("memory"), py::arg("num_bytes"))
      .def(
          "wait", [](TensorSupply& self) { self.supply.wait(); }, release())
      .def("close", [](TensorSupply& self) { self.supply.close(); }, release());
}

void bind_queue(py::module_& module) {
  using release = py::call_guard<py::gil_scoped_release>;
  py::class_<StepQueue>(module, "StepQueue", "See csrc/bindings/step_queue.h.")
      .def(py::init<std::shared_ptr<StepProgram>, std::optional<RowLimits>>(),
           py::arg("program") = nullptr, py::arg("limits") = std::nullopt)
      .def("fileno", &StepQueue::fileno)
      .def("push", &StepQueue::push)
      .def("push_rows", &StepQueue::push_rows)
      .def("close", &StepQueue::close)
      .def("done", &StepQueue::done)
      .def("take", &StepQueue::take, release())
      .def("finish", &StepQueue::finish)
      .def("set_sampling", &StepQueue::set_sampling);
}

}  // namespace

void bind_steps(py::module_& module) {
  py::register_local_exception_translator(&translate);
  py::register_local_exception<PlanError>(module, "PlanError", PyExc_ValueError);
  py::class_<RowLimits>(module, "RowLimits", "Bounds of a plan's integers.")
      .def(py::init([](int64_t vocab_size, int64_t num_blocks, int64_t block_size,
                       int64_t max_context, int64_t max_rows, int64_t max_tokens) {
             for (const int64_t limit :
                  {vocab_size, num_blocks, block_size, max_context, max_rows, max_tokens}) {
               TORCH_CHECK(limit > 0 && limit <= INT32_MAX, "limits must be in [1, ", INT32_MAX,
                           "], got ", limit);
             }
             return RowLimits{vocab_size,  num_blocks, block_size,
                              max_context, max_rows,   max_tokens};
           }),
           py::kw_only(), py::arg("vocab_size"), py::arg("num_blocks"), py::arg("block_size"),
           py::arg("max_context"), py::arg("max_rows"), py::arg("max_tokens"));
  module.def("flatten_rows", &flatten_to_tensors, py::arg("rows"), py::arg("limits"),
             py::arg("last_ids"), "Return the arrays of a plan's rows.");
  bind_program(module);
  bind_queue(module);
  bind_supply(module);
}

}  // namespace tgi
