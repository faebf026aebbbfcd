#include "bindings/tensor_memory.h"

#include <array>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "cpu/memory.h"

namespace tgi {

namespace {

struct Block {
  cpu::Memory memory;
  size_t size_log2;
};

using Blocks = std::vector<std::unique_ptr<Block>>;

// The free blocks, by size.
struct FreeBlocks {
  std::mutex mutex;
  std::array<Blocks, 63> of_size;
};

FreeBlocks& free_blocks() {
  static auto& blocks = *new FreeBlocks;  // never destroyed: arrays may outlive the module
  return blocks;
}

std::unique_ptr<Block> take_block(size_t size_log2) {
  {
    FreeBlocks& free = free_blocks();
    const std::lock_guard<std::mutex> lock(free.mutex);
    Blocks& blocks = free.of_size[size_log2];
    if (!blocks.empty()) {
      std::unique_ptr<Block> block = std::move(blocks.back());
      blocks.pop_back();
      return block;
    }
  }
  // Only the pages that rows touch are committed.
  return std::make_unique<Block>(Block{cpu::allocate(int64_t{1} << size_log2), size_log2});
}

void put_back(void* pointer) {
  std::unique_ptr<Block> block(static_cast<Block*>(pointer));
  FreeBlocks& free = free_blocks();
  const std::lock_guard<std::mutex> lock(free.mutex);
  free.of_size[block->size_log2].push_back(std::move(block));
}

}  // namespace

FloatArray new_rows(int64_t num_rows, int64_t columns) {
  check(num_rows > 0 && columns > 0, "rows must have a size, got ", num_rows, " x ", columns);
  const int64_t bytes = cpu::product_of_sizes({num_rows, columns, kFloatBytes});
  size_t size_log2 = 0;
  while (int64_t{1} << size_log2 < bytes) ++size_log2;
  std::unique_ptr<Block> block = take_block(size_log2);
  auto* const data = reinterpret_cast<float*>(block->memory.get());
  const py::capsule owner(block.get(), &put_back);
  block.release();  // the capsule owns it
  return FloatArray({num_rows, columns}, data, owner);
}

void return_free_rows() {
  std::array<Blocks, 63> freed;  // unmapped after the lock is released
  FreeBlocks& free = free_blocks();
  const std::lock_guard<std::mutex> lock(free.mutex);
  std::swap(freed, free.of_size);
}

void bind_tensor_memory(py::module_& module) {
  module.def("new_rows", &new_rows, py::arg("num_rows"), py::arg("columns"),
             "Return an array [num_rows, columns] whose values are arbitrary.");
}

}  // namespace tgi
