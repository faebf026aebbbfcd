// Memory that is to be there before it is first written.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>

namespace tgi::cpu {

// A thread of the lowest priority that touches the pages of [data, data + bytes), so that the
// system supplies them; their contents stay, whoever writes there meanwhile. First writes would do
// it in the middle of a step: 0.1 ms for two MiB, and 5 in a virtual machine whose host has not
// supplied them yet. It is no thread of Python's, which would come back for the interpreter's lock:
// that ends the process if the interpreter is at its end. And it makes no system call: in
// MADV_POPULATE_WRITE it would hold the lock that every mmap of the process waits for, for as long
// as busy cores keep a thread of this priority waiting (0.4 s were seen).
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
