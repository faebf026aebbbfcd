#include "page_supply.h"

#include <unistd.h>

#include "platform.h"

namespace tgi::cpu {

namespace {

// Writes to a byte the value that it holds: zero if the page is fresh, otherwise the existing
// value. Not an `or` of zero, which a compiler may turn into a read; a read does not make the
// system commit the page.
void touch(char* byte) {
  char expected = 0;
  __atomic_compare_exchange_n(byte, &expected, char{0}, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
}

}  // namespace

PageSupply::PageSupply(void* data, int64_t bytes) {
  thread_ = std::thread([this, data, bytes] {
    name_thread("tgi-supply");
    nice_thread(19);
    const int64_t page = sysconf(_SC_PAGESIZE);
    for (int64_t at = 0; at < bytes && !is_closed_.load(std::memory_order_relaxed); at += page) {
      touch(static_cast<char*>(data) + at);
    }
  });
}

void PageSupply::wait() {
  if (thread_.joinable()) thread_.join();
}

void PageSupply::close() {
  is_closed_.store(true, std::memory_order_relaxed);
  wait();
}

}  // namespace tgi::cpu
