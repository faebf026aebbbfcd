// The KV cache memory of all layers. All keys and values of a block are contiguous, so that
// consecutive blocks touch memory without holes, whatever the page size. A block belongs to one
// group of layers, which may be any group: all groups have the same block size, that of the
// largest.
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

// A layer's heads, as stored, and its group.
struct KvShape {
  int64_t num_kv_heads;
  int64_t head_dim;
  int64_t value_dim;
  int64_t group;
};

class KvPool {
 public:
  // With latents, the values of every layer are the first dims of its keys and are not stored
  // separately.
  KvPool(const std::vector<KvShape>& layers, int64_t num_blocks, int64_t block_size,
         const std::string& precision, bool has_latents = false);

  // Returns a layer's part: [block][keys, values][KV head].
  cpu::step::KvLayerView layer(int64_t index) const;
  int64_t num_layers() const { return static_cast<int64_t>(layers_.size()); }
  int64_t num_groups() const { return num_groups_; }
  int64_t num_blocks() const { return num_blocks_; }
  int64_t block_size() const { return block_size_; }
  int64_t block_bytes() const { return block_bytes_; }
  cpu::step::Precision precision() const { return precision_; }

  // Copies blocks (from, to) as if simultaneously. Throws if a block is both source and target, or
  // the target of two.
  void copy(const std::vector<std::pair<int64_t, int64_t>>& pairs);
  // Starts a thread that makes the system commit the first bytes before they are written.
  void supply(int64_t num_bytes);
  void wait_for_supply();
  void close_supply();
  uint8_t* data() const { return memory_.get(); }

 private:
  int64_t num_blocks_, block_size_, block_bytes_ = 0, num_groups_ = 0;
  cpu::step::Precision precision_;
  std::vector<cpu::step::KvLayerView> layers_;
  cpu::Memory memory_;
  std::unique_ptr<cpu::PageSupply> supply_;
};

void bind_kv_pool(py::module_& module);

}  // namespace tgi
