#include "bindings/step_queue.h"

#include <pybind11/stl.h>

#include <new>
#include <stdexcept>
#include <utility>

#include "bindings/drafting.h"
#include "bindings/tensor_memory.h"
#include "cpu/team.h"

namespace tgi {

namespace py = pybind11;

StepQueue::StepQueue(std::shared_ptr<Program> program, std::optional<RowLimits> limits,
                     double idle_s)
    : program_(std::move(program)), limits_(limits), idle_(idle_s) {
  check((program_ != nullptr) == limits_.has_value(),
        "a queue that computes needs a program and limits");
}

void StepQueue::push(int64_t number) { queued_.push({number, nullptr}); }

void StepQueue::push_rows(int64_t number, py::handle rows, double cost_base, double cost_token) {
  check(program_ != nullptr, "this queue computes nothing");
  auto step = std::make_unique<Step>();
  step->planned = read_rows(rows, *limits_);
  step->cost = {cost_base, cost_token};
  check(!step->planned.rows.empty(), "a step has rows");
  queued_.push({number, std::move(step)});
}

void StepQueue::close() { queued_.close(); }

std::optional<int64_t> StepQueue::compute_rows() {
  while (std::optional<Item> item = queued_.take(idle_, return_free_rows)) {
    if (item->step == nullptr) return item->number;
    compute(*item->step);
    done_.push(std::move(*item));
  }
  return std::nullopt;
}

void StepQueue::finish(int64_t number) { done_.push({number, nullptr}); }

void StepQueue::set_sampling(std::shared_ptr<SampleArrays> state) {
  check(!limits_ || state->num_slots() >= limits_->max_rows,
        "the sampling state must have the slots of a queue's rows, got ", state->num_slots());
  sampling_ = std::move(state);
}

void StepQueue::set_drafter(std::shared_ptr<cpu::Drafter> drafter) {
  check(!limits_ || drafter->num_slots() >= limits_->max_rows,
        "the drafter must have the slots of a queue's rows, got ", drafter->num_slots());
  drafter_ = std::move(drafter);
}

void StepQueue::compute(Step& step) {
  const int64_t num_steps = program_->num_steps();
  try {
    cpu::team_wake();
    run_and_sample(step);
    return;
  } catch (const std::bad_alloc&) {
    step.is_out_of_memory = true;
    step.error = "no memory for a step";
  } catch (const std::exception& error) {
    step.error = error.what();
  }
  program_->roll_back_to(num_steps);
  discard_later_states(step.planned);
  step.has_failed = true;
}

void StepQueue::discard_later_states(const PlannedRows& planned) {
  if (sampling_ == nullptr) return;  // no slot was ever started
  for (const PlannedRows::Row& row : planned.rows) {
    const int64_t end = row.is_floating ? sampling_->record(row.slot).position - 1 : row.start;
    program_->discard_states(row.slot, end);
  }
}

void StepQueue::run_and_sample(Step& step) {
  check(sampling_ != nullptr, "no slot was ever started");
  const std::vector<SlotPosition> places = slot_positions(step.planned, *sampling_);
  std::vector<std::vector<int32_t>> drafts;
  if (drafter_ != nullptr) drafts = choose_drafts(step.planned, places, *drafter_, step.cost);
  step.rows = lay_out(step.planned, *limits_, places, drafts);
  if (step.rows.num_rows() == 0) return;
  step.samples.slots = step.rows.sample_slots;
  if (!drafts.empty()) step.samples.drafts = step.rows.drafts;
  SampleCall call(*sampling_, step.samples, nullptr);
  program_->run_and_sample_prepared(step.rows, step.rows.sample_after, call);
  if (drafter_ != nullptr) observe(*drafter_, step.samples);
}

py::list StepQueue::done() { return outcomes(done_.take_all(), outcome_of); }

py::object StepQueue::outcome_of(const Item& item) {
  if (item.step == nullptr) return py::none();
  const Step& step = *item.step;
  if (step.has_failed) {
    PyObject* const kind = step.is_out_of_memory ? PyExc_MemoryError : PyExc_RuntimeError;
    return py::reinterpret_borrow<py::object>(kind)(step.error);
  }
  py::list rows(step.planned.rows.size());
  for (size_t row = 0; row < rows.size(); ++row) rows[row] = py::none();
  py::dict further;
  int64_t num_drafted_rows = 0, num_drafts = 0;
  const Samples& samples = step.samples;
  for (size_t i = 0; i < samples.token_ids.size(); ++i) {
    const bool is_draft = step.rows.drafts[i] >= 0;
    num_drafts += is_draft;
    num_drafted_rows += is_draft && step.rows.drafts[i - 1] < 0;
    if (!samples.is_accepted[i]) continue;
    py::object sampled = sampled_of(samples, i);
    const int32_t row = step.rows.sample_plan_rows[i];
    if (!is_draft) {
      rows[static_cast<size_t>(row)] = std::move(sampled);
      continue;
    }
    const py::int_ key(row);
    if (!further.contains(key)) further[key] = py::list();
    further[key].cast<py::list>().append(std::move(sampled));
  }
  return py::make_tuple(std::move(rows), std::move(further),
                        py::make_tuple(num_drafted_rows, num_drafts));
}

void bind_step_queue(py::module_& module) {
  using release = py::call_guard<py::gil_scoped_release>;
  py::class_<StepQueue>(module, "StepQueue", "See csrc/bindings/step_queue.h.")
      .def(py::init<std::shared_ptr<Program>, std::optional<RowLimits>, double>(),
           py::arg("program") = nullptr, py::arg("limits") = std::nullopt, py::arg("idle_s") = 10.0)
      .def("fileno", &StepQueue::fileno)
      .def("push", &StepQueue::push)
      .def("push_rows", &StepQueue::push_rows, py::arg("number"), py::arg("rows"),
           py::arg("cost_base") = 0.0, py::arg("cost_token") = 0.0)
      .def("close", &StepQueue::close)
      .def("done", &StepQueue::done)
      .def("compute_rows", &StepQueue::compute_rows, release())
      .def("finish", &StepQueue::finish)
      .def("set_sampling", &StepQueue::set_sampling)
      .def("set_drafter", &StepQueue::set_drafter, py::arg("drafter").none(false));
}

}  // namespace tgi
