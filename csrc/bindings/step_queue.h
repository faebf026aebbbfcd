// Steps on their way from the event loop to the thread that computes them, and back. Those that
// need nothing of Python run here, one after the other, without the GIL; the loop learns of each by
// a file descriptor that it watches.
#pragma once

#include <pybind11/pybind11.h>

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "bindings/drafting.h"
#include "bindings/program.h"
#include "bindings/rows.h"
#include "bindings/sample.h"
#include "cpu/platform.h"

namespace tgi {

// `push`, `push_rows`, `done` and `close` are for the event loop, `compute_rows` and `set_sampling`
// for one thread that computes, `finish` for any. Numbers are the caller's, and leave in the order
// in which they are finished.
class StepQueue {
 public:
  // Without a program there can be no rows. Throws std::runtime_error where there is no descriptor.
  StepQueue(std::shared_ptr<Program> program, std::optional<RowLimits> limits);

  // Readable while something is done that `done` has not returned.
  int fileno() const { return signal_.fd(); }
  // Queues a step that `compute_rows` returns.
  void push(int64_t number);
  // Queues a step that `compute_rows` computes: no slot of it starts, and no row has a grammar.
  // What its tokens cost says how many drafts pay. Throws PlanError.
  void push_rows(int64_t number, pybind11::handle rows, double cost_base, double cost_token);
  // Takes nothing more; `compute_rows` returns none behind what is queued.
  void close();
  // What is done since the last call: (number, outcome), where the outcome is None of a step that
  // `compute_rows` returned, an exception, or (rows, further, drafted): for each row None or what
  // was drawn first, a dict of what rows have drawn behind that, and how many rows had drafts, and
  // how many. What was drawn is (token id, log-probability or None, the most probable or None,
  // whether the logits were finite).
  pybind11::list done();

  // Computes steps that were pushed as rows, until one comes that was not: returns its number.
  // Waits for more. None: the queue is closed and empty. Without the GIL.
  std::optional<int64_t> compute_rows();
  // Says that the step which `compute_rows` returned is done.
  void finish(int64_t number);
  // What the next steps draw with.
  void set_sampling(std::shared_ptr<SampleArrays> state);
  // What drafts their rows; before the first step.
  void set_drafter(std::shared_ptr<cpu::Drafter> drafter);

 private:
  // A step with its results, a row each.
  struct Step {
    PlannedRows planned;
    cpu::StepCost cost = {};
    FlatRows rows;
    Draws draws;
    std::string error;  // why it failed
    bool has_failed = false;
    bool is_out_of_memory = false;
  };
  struct Item {
    int64_t number;
    std::unique_ptr<Step> step;  // null: it is for Python
  };

  void enqueue(Item item);
  void end(Item item);
  void compute(Step& step);
  void draw(Step& step);
  static pybind11::object outcome_of(const Item& item);

  const std::shared_ptr<Program> program_;
  const std::optional<RowLimits> limits_;
  std::shared_ptr<SampleArrays> sampling_;
  std::shared_ptr<cpu::Drafter> drafter_;  // or null
  cpu::Signal signal_;
  std::mutex lock_;  // of what follows
  std::condition_variable has_more_;
  std::deque<Item> queued_, done_;
  bool is_closed_ = false;
};

void bind_step_queue(pybind11::module_& module);

}  // namespace tgi
