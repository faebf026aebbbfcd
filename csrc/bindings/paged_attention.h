// Attention for models that compute in torch: one call per layer, from heads as tensors to tensors.
// Checks and work splits that all layers of a batch share are done once.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "bindings/attention_spec.h"
#include "bindings/float_tensors.h"
#include "bindings/kv_pool.h"
#include "bindings/rows.h"
#include "cpu/step/segment.h"

namespace tgi {

class PagedAttention {
 public:
  explicit PagedAttention(int64_t max_context);

  // Sets the batch of the following calls of `run`. visible_until: [num_tokens], where the visible
  // positions of each token end, if it sees more than those up to its own.
  void begin(const FlatRows& batch, const std::optional<Array<int32_t>>& visible_until);

  // q: [num_tokens, heads, head_dim]; k, v: [num_tokens, KV heads, head_dim and value_dim], or none
  // if they are in the cache already; out: [num_tokens, heads, value_dim], contiguous.
  void run(const KvPool& pool, int64_t layer, const FloatArray& q,
           const std::optional<FloatArray>& k, const std::optional<FloatArray>& v, FloatArray& out,
           const AttentionSpec& spec);
  // Only writes k and v to the batch's slots.
  void write(const KvPool& pool, int64_t layer, const FloatArray& k, const FloatArray& v);

 private:
  // How the current batch's work is split for layers of one kind.
  struct Split {
    cpu::step::AttentionKind kind;
    int num_members;
    std::vector<cpu::step::AttentionPoint> points;
  };
  struct Call {
    cpu::step::StoreHeadsParams store;
    cpu::step::AttentionParams attention;
  };

  void check_batch() const;
  void check_pool(const KvPool& pool);
  // Sets and checks the keys and values of a call.
  static void take_keys(const FloatArray& k, const FloatArray& v, int64_t num_tokens,
                        cpu::step::StoreHeadsParams& store);
  const cpu::step::AttentionPoint* split(const cpu::step::AttentionParams& params,
                                         int64_t tile_rows, int num_members);
  void run_locked(const KvPool& pool, Call& call);

  const int64_t max_context_;
  std::mutex mutex_;
  bool has_begun_ = false;
  FlatRows batch_;
  std::vector<int32_t> visible_until_;
  cpu::step::StepHeader header_ = {};
  // Of the pool that the batch was checked against.
  int64_t checked_blocks_ = 0, checked_block_size_ = 0;
  std::vector<Split> splits_;  // entries of earlier batches are reused
  size_t num_splits_ = 0;
  int64_t num_pairs_ = 0;  // upper bound on the query-key pairs
  Workspace queries_;
  std::unique_ptr<cpu::step::AttentionWorkspace> partials_;
  int64_t partials_rows_ = 0, partials_dim_ = 0;
  int partials_members_ = 0;
};

void bind_paged_attention(py::module_& module);

}  // namespace tgi
