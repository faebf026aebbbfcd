// The memory of keys and values of all layers. A block's lie together, so that the memory that
// consecutive blocks have touched has no holes, whatever the size of a page.
#pragma once

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "bindings/checks.h"
#include "cpu/memory.h"
#include "cpu/page_supply.h"
#include "cpu/step/step.h"

namespace tgi {

class KvPool {
 public:
  KvPool(int64_t num_layers, int64_t num_blocks, int64_t num_kv_heads, int64_t head_dim,
         int64_t value_dim, int64_t block_size, const std::string& precision);

  // A layer's part [block][keys, values][KV head].
  cpu::step::KvLayerView layer(int64_t index) const;
  int64_t num_layers() const { return num_layers_; }
  int64_t num_blocks() const { return view_.num_blocks; }
  int64_t block_size() const { return view_.block_size; }
  int64_t num_kv_heads() const { return view_.num_heads; }
  int64_t head_dim() const { return view_.head_dim; }
  int64_t value_dim() const { return view_.value_dim; }
  int64_t block_bytes() const { return view_.block_stride; }
  cpu::step::Precision precision() const { return view_.precision; }

  // Copies blocks (from, to), as if all at once: refuses one that is both, or copied to twice.
  void copy(const std::vector<std::pair<int64_t, int64_t>>& pairs);
  // Has the system supply the first bytes in a thread, before they are written.
  void supply(int64_t num_bytes);
  void wait_for_supply();
  void close_supply();
  uint8_t* data() const { return memory_.get(); }

 private:
  int64_t num_layers_;
  cpu::step::KvLayerView view_;  // of the first layer
  cpu::Memory memory_;
  std::unique_ptr<cpu::PageSupply> supply_;
};

void bind_kv_pool(py::module_& module);

}  // namespace tgi
