#include "page_supply.h"

#include <algorithm>

#include "platform.h"

namespace tgi::cpu {

PageSupply::PageSupply(void* data, int64_t bytes) {
  thread_ = std::thread([this, data, bytes] {
    constexpr int64_t kPart = int64_t{2} << 20;
    name_thread("tgi-supply");
    nice_thread(19);
    for (int64_t begin = 0; begin < bytes && !is_closed_.load(std::memory_order_relaxed);
         begin += kPart) {
      supply_pages(static_cast<char*>(data) + begin, std::min(kPart, bytes - begin));
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
