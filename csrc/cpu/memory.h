// Memory of weights, buffers and the cache: aligned, and in huge pages where the system grants
// them.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <memory>

namespace tgi::cpu {

using Memory = std::shared_ptr<uint8_t>;

// `bytes` at a multiple of 64, zero where they were never written. The system commits large memory
// as it is first touched. Throws std::bad_alloc.
Memory allocate(int64_t bytes);

// The product of sizes. Throws std::bad_alloc where no memory has so many bytes: above 2^62, so
// that a little can be added to it.
int64_t product_of_sizes(std::initializer_list<int64_t> sizes);

// Memory in large pieces, so that huge pages hold what is smaller than one. What is taken lies in
// the order in which it was taken: a layer's weights after the other's, as a step reads them.
class Arena {
 public:
  Memory take(int64_t bytes);

 private:
  Memory piece_;
  int64_t used_ = 0, size_ = 0;
};

}  // namespace tgi::cpu
