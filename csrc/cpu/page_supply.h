// Memory that is to be there before it is first written.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>

namespace tgi::cpu {

// A thread of the lowest priority that has the system supply the pages of [data, data + bytes), two
// MiB at a time; their contents stay. First writes would do it in the middle of a step: 0.1 ms for
// two MiB, and 5 in a virtual machine whose host has not supplied them yet. A thread of Python's
// would come back for the interpreter's lock, which ends the process if that is at its end.
class PageSupply {
 public:
  PageSupply(void* data, int64_t bytes);
  ~PageSupply() { close(); }
  PageSupply(const PageSupply&) = delete;
  PageSupply& operator=(const PageSupply&) = delete;

  // Waits until all is there.
  void wait();
  // Ends the thread where it is.
  void close();

 private:
  std::atomic<bool> is_closed_{false};
  std::thread thread_;
};

}  // namespace tgi::cpu
