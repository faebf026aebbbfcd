// Steps on their way from the event loop to the compute thread and back. Steps that need no Python
// run here one after another, without the GIL; the event loop learns of finished steps from a file
// descriptor that it watches.
#pragma once

#include <pybind11/pybind11.h>

#include <chrono>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>

#include "bindings/item_queue.h"
#include "bindings/program.h"
#include "bindings/rows.h"
#include "bindings/sample.h"
#include "cpu/drafter.h"

namespace tgi {

// `push`, `push_rows`, `done` and `close` are for the event loop, `compute_rows` and `set_sampling`
// for a single compute thread, `finish` for any thread. The caller chooses the step numbers; `done`
// returns them in the order of completion.
class StepQueue {
 public:
  // Without a program, steps cannot be pushed as rows. After `idle_s` without a step, the compute
  // thread returns the memory of dropped tensors. Throws std::runtime_error if there is no file
  // descriptor left.
  StepQueue(std::shared_ptr<Program> program, std::optional<RowLimits> limits, double idle_s);

  // Readable while there are finished steps that `done` has not returned.
  int fileno() const { return done_.fd(); }
  // Queues a step that `compute_rows` returns.
  void push(int64_t number);
  // Queues a step that `compute_rows` computes: none of its slots starts, and no row has a grammar.
  // The token cost decides how many drafts pay off. Throws PlanError.
  void push_rows(int64_t number, pybind11::handle rows, double cost_base, double cost_token);
  // Makes further pushes throw std::runtime_error; `compute_rows` returns none once the queue is
  // empty.
  void close();
  // Returns the steps finished since the last call as (number, outcome). The outcome is None for a
  // step that `compute_rows` returned, an exception, or (rows, further, drafted): for each row None
  // or its first sampled token; a dict of the tokens that rows sampled after the first; and the
  // number of rows with drafts with the number of drafts. A sampled token is (token id,
  // log-probability or None, the most probable tokens or None, whether the logits were finite).
  pybind11::list done();

  // Computes steps pushed as rows until one comes that was not, and returns its number. Waits if
  // the queue is empty. None: the queue is closed and empty. Call it without the GIL.
  std::optional<int64_t> compute_rows();
  // Reports that the step which `compute_rows` returned is finished.
  void finish(int64_t number);
  // Sets the sampling state for the next steps.
  void set_sampling(std::shared_ptr<SampleArrays> state);
  // Sets the drafter of their rows; call it before the first step.
  void set_drafter(std::shared_ptr<cpu::Drafter> drafter);

 private:
  // A step with its results, one per row.
  struct Step {
    PlannedRows planned;
    cpu::StepCost cost = {};
    FlatRows rows;
    Samples samples;
    std::string error;  // why the step failed
    bool has_failed = false;
    bool is_out_of_memory = false;
  };
  struct Item {
    int64_t number;
    std::unique_ptr<Step> step;  // null: a step for Python
  };

  void compute(Step& step);
  void run_and_sample(Step& step);
  // Does what HostRunner._discard_later_states does for a failed step.
  void discard_later_states(const PlannedRows& planned);
  static pybind11::object outcome_of(const Item& item);

  const std::shared_ptr<Program> program_;
  const std::optional<RowLimits> limits_;
  const std::chrono::duration<double> idle_;
  std::shared_ptr<SampleArrays> sampling_;
  std::shared_ptr<cpu::Drafter> drafter_;  // or null
  ItemQueue<Item> queued_;
  EndedItems<Item> done_;
};

void bind_step_queue(pybind11::module_& module);

}  // namespace tgi
