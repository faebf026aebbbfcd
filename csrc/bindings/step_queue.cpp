#include "bindings/step_queue.h"

#include <algorithm>
#include <cmath>
#include <new>
#include <utility>

#include "cpu/team.h"

namespace tgi {

namespace py = pybind11;

StepQueue::StepQueue(std::shared_ptr<StepProgram> program, std::optional<RowLimits> limits)
    : program_(std::move(program)), limits_(limits) {
  TORCH_CHECK((program_ != nullptr) == limits_.has_value(),
              "a queue that computes needs a program and limits");
}

void StepQueue::push(int64_t number) { enqueue({number, nullptr}); }

void StepQueue::push_rows(int64_t number, py::handle rows) {
  TORCH_CHECK(program_ != nullptr, "this queue computes nothing");
  auto step = std::make_unique<Step>();
  step->rows = flatten(rows, *limits_);
  TORCH_CHECK(step->rows.num_rows() > 0, "a step has rows");
  enqueue({number, std::move(step)});
}

void StepQueue::enqueue(Item item) {
  {
    const std::lock_guard<std::mutex> guard(lock_);
    queued_.push_back(std::move(item));
  }
  has_more_.notify_one();
}

void StepQueue::close() {
  {
    const std::lock_guard<std::mutex> guard(lock_);
    is_closed_ = true;
  }
  has_more_.notify_one();
}

std::optional<int64_t> StepQueue::take() {
  for (;;) {
    std::unique_lock<std::mutex> guard(lock_);
    has_more_.wait(guard, [&] { return is_closed_ || !queued_.empty(); });
    if (queued_.empty()) return std::nullopt;
    Item item = std::move(queued_.front());
    queued_.pop_front();
    guard.unlock();
    if (item.step == nullptr) return item.number;
    compute(*item.step);
    end(std::move(item));
  }
}

void StepQueue::finish(int64_t number) { end({number, nullptr}); }

void StepQueue::end(Item item) {
  {
    const std::lock_guard<std::mutex> guard(lock_);
    done_.push_back(std::move(item));
  }
  signal_.raise();
}

void StepQueue::set_sampling(const at::Tensor& records, const at::Tensor& counts,
                             const at::Tensor& biased_ids, const at::Tensor& biased_values,
                             const at::Tensor& masked_ids, const at::Tensor& scratch) {
  sampling_ = check_sample_state(counts.size(1), records, counts, biased_ids, biased_values,
                                 masked_ids, scratch);
  num_slots_ = records.size(0);
  kept_ = {records, counts, biased_ids, biased_values, masked_ids, scratch};
}

void StepQueue::compute(Step& step) {
  try {
    cpu::team_wake();
    draw(step);
    return;
  } catch (const std::bad_alloc&) {
    step.is_out_of_memory = true;
    step.error = "no memory for a step";
  } catch (const c10::Error& error) {
    step.error = error.what_without_backtrace();
  } catch (const std::exception& error) {
    step.error = error.what();
  }
  step.has_failed = true;
}

void StepQueue::draw(Step& step) {
  TORCH_CHECK(sampling_.params.records != nullptr, "no slot was ever started");
  SampleCall call = sampling_;
  SampleParams& params = call.params;
  const SampleSlot* const records = params.records;
  const std::vector<int32_t>& slots = step.rows.draw_slots;
  for (const int32_t slot : slots) {
    TORCH_CHECK(slot < num_slots_, "slot ", slot, " of ", num_slots_);
    step.max_top = std::max<int64_t>(step.max_top, records[slot].num_top);
  }
  const size_t count = slots.size(), top = count * static_cast<size_t>(step.max_top);
  step.token_ids.resize(count);
  step.is_finite = std::make_unique<bool[]>(count);
  step.logprobs.resize(count);
  step.top_ids.resize(top);
  step.top_logprobs.resize(top);
  step.num_top.resize(count);
  call.num_rows = static_cast<int64_t>(count);
  params.slots = slots.data();
  params.token_ids = step.token_ids.data();
  params.is_finite = step.is_finite.get();
  params.logprobs = step.logprobs.data();
  params.top_ids = step.top_ids.data();
  params.top_logprobs = step.top_logprobs.data();
  params.num_top = step.num_top.data();
  params.max_top = step.max_top;
  check_sample_slots(params, call.num_rows, num_slots_);
  step.rows.take_last_ids([&](int32_t slot) {
    TORCH_CHECK(slot < num_slots_, "slot ", slot, " of ", num_slots_);
    return records[slot].last_id;
  });
  program_->draw_header(step.rows.header(), call);
}

py::list StepQueue::done() {
  std::deque<Item> items;
  signal_.clear();  // first: what ends from here on raises it again
  {
    const std::lock_guard<std::mutex> guard(lock_);
    items.swap(done_);
  }
  py::list found;
  for (const Item& item : items) found.append(py::make_tuple(item.number, outcome_of(item)));
  return found;
}

py::object StepQueue::outcome_of(const Item& item) {
  if (item.step == nullptr) return py::none();
  const Step& step = *item.step;
  if (step.has_failed) {
    PyObject* const kind = step.is_out_of_memory ? PyExc_MemoryError : PyExc_RuntimeError;
    return py::reinterpret_borrow<py::object>(kind)(step.error);
  }
  py::list rows(step.rows.num_rows());
  for (size_t row = 0; row < rows.size(); ++row) rows[row] = py::none();
  for (size_t i = 0; i < step.token_ids.size(); ++i) {
    py::object logprob = py::none(), top = py::none();
    if (!std::isnan(step.logprobs[i])) {  // the slot wants them
      logprob = py::float_(step.logprobs[i]);
      py::list pairs(step.num_top[i]);
      for (size_t k = 0; k < pairs.size(); ++k) {
        const size_t at = i * static_cast<size_t>(step.max_top) + k;
        pairs[k] = py::make_tuple(step.top_ids[at], step.top_logprobs[at]);
      }
      top = std::move(pairs);
    }
    rows[static_cast<size_t>(step.rows.draw_rows[i])] =
        py::make_tuple(step.token_ids[i], std::move(logprob), std::move(top), step.is_finite[i]);
  }
  return rows;
}

}  // namespace tgi
