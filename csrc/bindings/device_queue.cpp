#include "bindings/device_queue.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <cstdlib>
#include <stdexcept>
#include <utility>

namespace tgi {

namespace py = pybind11;

// A prepared step, and what it has sampled.
struct DeviceQueue::Step {
  const DeviceCalls* calls;
  py::object owner;
  DeviceResults results;
  int64_t num_rows;                  // of the plan
  std::vector<int64_t> sampling;     // those that sample
  std::vector<int64_t> result_rows;  // of each of them
  Samples samples = {};

  void collect();
};

namespace {

// Makes one of a step's calls; returns why it failed, or nothing.
std::string call(const DeviceCalls& calls, char* (*function)(void*)) {
  char* const error = function(calls.self);
  if (error == nullptr) return {};
  std::string text = *error == '\0' ? "a call of the device failed" : error;
  std::free(error);
  return text;
}

// Checks that the results lie in their memory.
void check_results(const DeviceResults& results) {
  const int64_t rows = results.num_rows, top = results.max_top;
  check(rows >= 0 && rows < INT32_MAX && top >= 0 && top < INT32_MAX,
        "results must have less than ", INT32_MAX, " rows and entries, got ", rows, " and ", top);
  const std::array<int64_t, kNumResults> bytes = {4 * rows,       rows,           4 * rows,
                                                  4 * rows * top, 4 * rows * top, 4 * rows};
  const int64_t room = results.memory.nbytes();
  for (size_t i = 0; i < bytes.size(); ++i) {
    const int64_t first = results.firsts[i];
    check(first >= 0 && first % 4 == 0 && first <= room && bytes[i] <= room - first, "result ", i,
          " has ", bytes[i], " bytes from ", first, " on, the memory ", room);
  }
}

}  // namespace

void DeviceQueue::Step::collect() {
  const auto result = [&](DeviceResult which) {
    return results.memory.data() + results.firsts[which];
  };
  const auto* const ids = reinterpret_cast<const int32_t*>(result(kResultTokenIds));
  const uint8_t* const are_finite = result(kResultIsFinite);
  const auto* const logprobs = reinterpret_cast<const float*>(result(kResultLogprobs));
  const auto* const top_ids = reinterpret_cast<const int32_t*>(result(kResultTopIds));
  const auto* const top_logprobs = reinterpret_cast<const float*>(result(kResultTopLogprobs));
  const auto* const num_top = reinterpret_cast<const int32_t*>(result(kResultNumTop));
  const size_t count = result_rows.size(), max_top = static_cast<size_t>(results.max_top);
  samples.max_top = results.max_top;
  samples.is_finite = std::make_unique<bool[]>(count);
  for (size_t i = 0; i < count; ++i) {
    const auto row = static_cast<size_t>(result_rows[i]);
    samples.token_ids.push_back(ids[row]);
    samples.is_finite[i] = are_finite[row] != 0;
    samples.logprobs.push_back(logprobs[row]);
    const int32_t wanted = max_top == 0 ? 0 : num_top[row];
    samples.num_top.push_back(std::min(std::max(wanted, 0), static_cast<int32_t>(max_top)));
    for (size_t k = 0; k < max_top; ++k) {
      samples.top_ids.push_back(top_ids[row * max_top + k]);
      samples.top_logprobs.push_back(top_logprobs[row * max_top + k]);
    }
  }
}

DeviceQueue::~DeviceQueue() = default;

void DeviceQueue::push(int64_t number) { queued_.push({number, nullptr, {}}); }

void DeviceQueue::push_prepared(int64_t number, const DeviceCalls* calls, py::object owner,
                                const DeviceRows& rows, int64_t num_decodes,
                                DeviceResults results) {
  check(calls != nullptr, "a prepared step has calls");
  check_results(results);
  const int64_t gap = num_decodes - rows.num_decodes;
  check(gap >= 0 && rows.num_rows() + gap <= results.num_rows,
        "the rows do not fit the results of the step");
  auto step = std::make_unique<Step>(
      Step{calls, std::move(owner), std::move(results), rows.num_rows(), rows.sampling, {}});
  for (const int64_t row : step->sampling)
    step->result_rows.push_back(row < rows.num_decodes ? row : row + gap);
  queued_.push({number, std::move(step), {}});
}

void DeviceQueue::close() { queued_.close(); }

std::optional<DeviceQueue::Item> DeviceQueue::take() {
  while (std::optional<Item> item = queued_.take()) {
    if (item->step == nullptr) return item;
    item->error = call(*item->step->calls, item->step->calls->submit);
    if (!item->error.empty()) return item;
    add_launched(std::move(*item));
  }
  return std::nullopt;
}

void DeviceQueue::launched(int64_t number) { add_launched({number, nullptr, {}}); }

void DeviceQueue::add_launched(Item item) {
  {
    const std::lock_guard<std::mutex> guard(lock_);
    ++num_open_;
  }
  launched_.push(std::move(item));
}

void DeviceQueue::close_launched() { launched_.close(); }

bool DeviceQueue::is_idle() {
  const std::lock_guard<std::mutex> guard(lock_);
  return num_open_ == 0;
}

void DeviceQueue::wait_until_idle() {
  std::unique_lock<std::mutex> guard(lock_);
  is_idle_.wait(guard, [&] { return num_open_ == 0; });
}

std::optional<DeviceQueue::Item> DeviceQueue::next() {
  while (std::optional<Item> item = launched_.take()) {
    if (item->step == nullptr) return item;
    item->error = call(*item->step->calls, item->step->calls->wait);
    if (!item->error.empty()) return item;
    try {
      item->step->collect();
    } catch (const std::exception& error) {  // such as no memory
      item->error = error.what();
      return item;
    }
    end(std::move(*item));
  }
  return std::nullopt;
}

void DeviceQueue::finish(int64_t number) { end({number, nullptr, {}}); }

void DeviceQueue::end(Item item) {
  {
    const std::lock_guard<std::mutex> guard(lock_);
    --num_open_;
  }
  is_idle_.notify_all();
  done_.push(std::move(item));
}

py::list DeviceQueue::done() { return outcomes(done_.take_all(), outcome_of); }

py::object DeviceQueue::outcome_of(const Item& item) {
  if (item.step == nullptr) return py::none();
  const Step& step = *item.step;
  py::list rows(static_cast<size_t>(step.num_rows));
  for (size_t row = 0; row < rows.size(); ++row) rows[row] = py::none();
  for (size_t i = 0; i < step.sampling.size(); ++i)
    rows[static_cast<size_t>(step.sampling[i])] = sampled_of(step.samples, i);
  return py::make_tuple(std::move(rows), py::dict(), py::make_tuple(0, 0));
}

namespace {

// Waits in a call without the GIL; returns (number, why it failed or None), or None.
template <class Wait>
py::object waited(const Wait& wait) {
  std::optional<DeviceQueue::Item> item;
  {
    const py::gil_scoped_release release;
    item = wait();
  }
  if (!item) return py::none();
  py::object error = py::none();
  if (!item->error.empty()) error = py::str(item->error);
  return py::make_tuple(item->number, std::move(error));
}

}  // namespace

void bind_device_queue(py::module_& module) {
  py::class_<DeviceQueue>(module, "DeviceQueue", "See csrc/bindings/device_queue.h.")
      .def(py::init<>())
      .def("fileno", &DeviceQueue::fileno)
      .def("push", &DeviceQueue::push, py::arg("number"))
      .def(
          "push_prepared",
          [](DeviceQueue& self, int64_t number, uintptr_t calls, py::object owner,
             const DeviceRows& rows, int64_t num_decodes, Array<uint8_t> results,
             const std::array<int64_t, kNumResults>& firsts, int64_t num_rows, int64_t max_top) {
            self.push_prepared(number, reinterpret_cast<const DeviceCalls*>(calls),
                               std::move(owner), rows, num_decodes,
                               {std::move(results), firsts, num_rows, max_top});
          },
          py::arg("number"), py::arg("calls"), py::arg("owner"), py::arg("rows"),
          py::arg("num_decodes"), py::arg("results").noconvert(), py::arg("firsts"),
          py::arg("num_rows"), py::arg("max_top"))
      .def("close", &DeviceQueue::close)
      .def("done", &DeviceQueue::done)
      .def("take", [](DeviceQueue& self) { return waited([&] { return self.take(); }); })
      .def("launched", &DeviceQueue::launched, py::arg("number"))
      .def("close_launched", &DeviceQueue::close_launched)
      .def_property_readonly("is_idle", &DeviceQueue::is_idle)
      .def("wait_until_idle", &DeviceQueue::wait_until_idle,
           py::call_guard<py::gil_scoped_release>())
      .def("next", [](DeviceQueue& self) { return waited([&] { return self.next(); }); })
      .def("finish", &DeviceQueue::finish, py::arg("number"));
}

}  // namespace tgi
