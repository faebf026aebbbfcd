#include "memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <new>

#include "platform.h"

namespace tgi::cpu {

namespace {

constexpr int64_t kMappedBytes = 1 << 16;  // from here on by the system itself, which gives zeros
constexpr int64_t kPieceBytes = 64 << 20;
constexpr int64_t kAlignment = 64;

}  // namespace

Memory allocate(int64_t bytes) {
  const auto size = static_cast<size_t>(std::max<int64_t>(bytes, 1));
  if (bytes < kMappedBytes) {
    const size_t padded = (size + kAlignment - 1) / kAlignment * kAlignment;
    auto* const data = static_cast<uint8_t*>(std::aligned_alloc(kAlignment, padded));
    if (data == nullptr) throw std::bad_alloc();
    std::fill_n(data, padded, uint8_t{0});
    return {data, [](uint8_t* p) { std::free(p); }};
  }
  void* const data =
      mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (data == MAP_FAILED) throw std::bad_alloc();
  advise_huge_pages(data, bytes);
  return {static_cast<uint8_t*>(data), [size](uint8_t* p) { munmap(p, size); }};
}

Memory Arena::take(int64_t bytes) {
  if (used_ + bytes > size_) {
    size_ = std::max(bytes, kPieceBytes);
    piece_ = allocate(size_);
    used_ = 0;
  }
  Memory taken(piece_, piece_.get() + used_);
  used_ += (bytes + kAlignment - 1) / kAlignment * kAlignment;
  return taken;
}

}  // namespace tgi::cpu
