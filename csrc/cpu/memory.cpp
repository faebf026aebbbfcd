#include "memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <new>

#include "platform.h"

namespace tgi::cpu {

namespace {

constexpr int64_t kMappedBytes = 1 << 16;  // from this size on mmap is used, which returns zeros
constexpr int64_t kPieceBytes = 64 << 20;
constexpr int64_t kAlignment = 64;
constexpr int64_t kMaxBytes = int64_t{1} << 60;

}  // namespace

Memory allocate(int64_t bytes) {
  if (bytes < 0) throw std::bad_alloc();
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

int64_t product_of_sizes(std::initializer_list<int64_t> sizes) {
  int64_t product = 1;
  for (const int64_t size : sizes) {
    if (__builtin_mul_overflow(product, size, &product) || product < 0 || product > kMaxBytes) {
      throw std::bad_alloc();
    }
  }
  return product;
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
