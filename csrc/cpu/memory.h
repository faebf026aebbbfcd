// Memory for weights, buffers and the cache: aligned, and in huge pages if the system grants them.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <memory>

namespace tgi::cpu {

using Memory = std::shared_ptr<uint8_t>;

// Allocates `bytes`, aligned to 64 and zero-initialised. The system commits large memory when it is
// first touched. Throws std::bad_alloc.
Memory allocate(int64_t bytes);

// Returns the product of sizes. Throws std::bad_alloc above 2^60, more than any machine has; the
// limit leaves headroom for a sum of up to seven.
int64_t product_of_sizes(std::initializer_list<int64_t> sizes);

// Allocates memory from large pieces, so that objects smaller than a huge page share one.
// Allocations are laid out in the order in which they are made: the weights of consecutive layers,
// in the order in which a step reads them.
class Arena {
 public:
  Memory take(int64_t bytes);

 private:
  Memory piece_;
  int64_t used_ = 0, size_ = 0;
};

}  // namespace tgi::cpu
