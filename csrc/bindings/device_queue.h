// Steps on their way through a device: from the event loop to the thread that launches them, from
// there to the thread that waits for them, and back. Steps that are prepared for it need no Python
// and no GIL on the way.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "bindings/checks.h"
#include "bindings/device_calls.h"
#include "bindings/device_rows.h"
#include "bindings/item_queue.h"
#include "bindings/sample.h"

namespace tgi {

// The results of sampling, in the order in which `push_prepared` takes their places.
enum DeviceResult {
  kResultTokenIds,
  kResultIsFinite,
  kResultLogprobs,
  kResultTopIds,
  kResultTopLogprobs,
  kResultNumTop,
  kNumResults,
};

// Where a step's results are in the host's memory once the device has done it: `num_rows` rows, of
// which the step's own are some.
struct DeviceResults {
  Array<uint8_t> memory;
  std::array<int64_t, kNumResults> firsts;  // byte of each result
  int64_t num_rows, max_top;
};

// `push`, `push_prepared`, `done` and `close` are for the event loop, `take`, `launched`,
// `close_launched` and `wait_until_idle` for the thread that launches, `next` and `finish` for the
// one that waits. The caller chooses the steps' numbers.
class DeviceQueue {
 public:
  struct Step;
  struct Item {
    int64_t number;
    std::unique_ptr<Step> step;  // null: a step for Python
    std::string error;           // why a call of a prepared step failed
  };

  // Throws std::runtime_error if there is no file descriptor left.
  DeviceQueue() = default;
  ~DeviceQueue();

  // Readable while there are finished steps that `done` has not returned.
  int fileno() const { return done_.fd(); }
  // Queues a step that `take` returns.
  void push(int64_t number);
  // Queues a step that `take` launches and `next` completes.
  //
  // calls, owner: the calls, and what keeps them alive.
  // rows: the step's rows, which have been written for it.
  // num_decodes: its decodes, with padding.
  void push_prepared(int64_t number, const DeviceCalls* calls, pybind11::object owner,
                     const DeviceRows& rows, int64_t num_decodes, DeviceResults results);
  // Makes further pushes throw std::runtime_error; `take` returns none once the queue is empty.
  void close();
  // Returns the steps finished since the last call, as `StepQueue::done`.
  pybind11::list done();

  // Launches prepared steps until one comes that is not, or that cannot be launched: it is
  // returned. None: the queue is closed and empty. Call it without the GIL.
  std::optional<Item> take();
  // Reports that the step which `take` returned is launched, or has failed.
  void launched(int64_t number);
  // Makes `next` return none after the steps launched so far.
  void close_launched();
  // Whether all launched steps are finished.
  bool is_idle();
  void wait_until_idle();

  // Waits for launched steps, in order, until one comes that was not prepared, or fails: it is
  // returned. None: closed. Call it without the GIL.
  std::optional<Item> next();
  // Reports that the step which `next` returned is finished.
  void finish(int64_t number);

 private:
  static pybind11::object outcome_of(const Item& item);
  void add_launched(Item item);
  void end(Item item);

  ItemQueue<Item> queued_, launched_;
  EndedItems<Item> done_;
  std::mutex lock_;  // guards `num_open_`
  std::condition_variable is_idle_;
  int64_t num_open_ = 0;  // steps that are launched and not finished
};

void bind_device_queue(pybind11::module_& module);

}  // namespace tgi
