// What one thread hands to another: a queue whose reader waits, and a list whose reader, the event
// loop, is told by a file descriptor.
#pragma once

#include <pybind11/pybind11.h>

#include <chrono>
#include <condition_variable>
#include <deque>
#include <exception>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <utility>

#include "cpu/platform.h"

namespace tgi {

// Any thread may push and close; one thread takes.
template <class Item>
class ItemQueue {
 public:
  // Throws std::runtime_error if the queue is closed.
  void push(Item item) {
    {
      const std::lock_guard<std::mutex> guard(lock_);
      if (is_closed_) throw std::runtime_error("the queue of steps is closed");
      items_.push_back(std::move(item));
    }
    has_more_.notify_one();
  }

  // Makes further pushes throw.
  void close() {
    {
      const std::lock_guard<std::mutex> guard(lock_);
      is_closed_ = true;
    }
    has_more_.notify_one();
  }

  // Waits for the next item; none: the queue is closed and empty.
  std::optional<Item> take() {
    std::unique_lock<std::mutex> guard(lock_);
    has_more_.wait(guard, [&] { return is_closed_ || !items_.empty(); });
    return front();
  }

  // The same; calls a function if nothing comes for so long.
  template <class Function>
  std::optional<Item> take(std::chrono::duration<double> idle, const Function& be_idle) {
    std::unique_lock<std::mutex> guard(lock_);
    const auto has_more = [&] { return is_closed_ || !items_.empty(); };
    if (!has_more_.wait_for(guard, idle, has_more)) {
      guard.unlock();
      be_idle();
      guard.lock();
      has_more_.wait(guard, has_more);
    }
    return front();
  }

 private:
  // Returns the first item, if there is one. The lock must be held.
  std::optional<Item> front() {
    if (items_.empty()) return std::nullopt;
    std::optional<Item> item = std::move(items_.front());
    items_.pop_front();
    return item;
  }

  std::mutex lock_;  // guards the members below
  std::condition_variable has_more_;
  std::deque<Item> items_;
  bool is_closed_ = false;
};

// Any thread may push; one thread watches the descriptor and takes all.
template <class Item>
class EndedItems {
 public:
  // Readable while there are items.
  int fd() const { return signal_.fd(); }

  void push(Item item) {
    {
      const std::lock_guard<std::mutex> guard(lock_);
      items_.push_back(std::move(item));
    }
    signal_.raise();
  }

  std::deque<Item> take_all() {
    std::deque<Item> items;
    signal_.clear();  // first: an item that comes from here on raises it again
    const std::lock_guard<std::mutex> guard(lock_);
    items.swap(items_);
    return items;
  }

 private:
  cpu::Signal signal_;
  std::mutex lock_;  // guards `items_`
  std::deque<Item> items_;
};

// Returns the number and the outcome of each item. An outcome that cannot be made, such as for lack
// of memory, is the exception: the other results must not be lost.
template <class Item, class OutcomeOf>
pybind11::list outcomes(const std::deque<Item>& items, const OutcomeOf& outcome_of) {
  namespace py = pybind11;
  py::list found;
  for (const Item& item : items) {
    py::object outcome;
    try {
      outcome = outcome_of(item);
    } catch (py::error_already_set& error) {
      outcome = error.value();
    } catch (const std::exception& error) {
      outcome = py::reinterpret_borrow<py::object>(PyExc_RuntimeError)(error.what());
    }
    found.append(py::make_tuple(item.number, std::move(outcome)));
  }
  return found;
}

}  // namespace tgi
