// Commits memory pages ahead of their first write.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>

namespace tgi::cpu {

// A lowest-priority thread that touches the pages of [data, data + bytes), so that the system
// commits them. It preserves their contents, including concurrent writes. Otherwise the first write
// would commit the page in the middle of a step: 0.1 ms for two MiB, and 5 ms in a virtual machine
// whose host has not committed the memory yet. A Python thread would not do: reacquiring the GIL
// during interpreter shutdown ends the process. The thread makes no system call to commit the
// pages: MADV_POPULATE_WRITE would hold the lock that every mmap of the process needs for as long
// as busy cores keep a thread of this priority waiting (0.4 s was observed).
class PageSupply {
 public:
  PageSupply(void* data, int64_t bytes);
  ~PageSupply() { close(); }
  PageSupply(const PageSupply&) = delete;
  PageSupply& operator=(const PageSupply&) = delete;

  // Waits until all pages are committed.
  void wait();
  // Stops the thread early.
  void close();

 private:
  std::atomic<bool> is_closed_{false};
  std::thread thread_;
};

}  // namespace tgi::cpu
