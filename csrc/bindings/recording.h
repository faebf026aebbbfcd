// A step as it is recorded: the list of its operators, over buffers that it keeps alive. Operands
// are checked here, once, and the kernels rely on it. Nothing in a recording changes when it runs
// (program.h).
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "bindings/adapter.h"
#include "bindings/attention_spec.h"
#include "bindings/experts.h"
#include "bindings/kv_pool.h"
#include "bindings/matrix.h"
#include "bindings/operands.h"
#include "bindings/shards.h"
#include "bindings/state_pool.h"
#include "cpu/step/segment.h"

namespace tgi {

// After writing a partial sum all shards meet at a barrier.
inline step::Sync sync_after(const RowsPtr& out) {
  return out->turn ? step::Sync::kShards : step::Sync::kAlways;
}

class Recording {
 public:
  Recording(int64_t max_tokens, int64_t max_sequences, int64_t max_rows, int64_t max_context);

  // Must come before any operator: adapters of this layout may change products.
  void set_adapters(LayoutPtr layout);

  // Must come before any operator: makes this step one of several shards, whose embedding and head
  // hold the vocabulary ids from `first_vocab_id` on.
  void set_shards(ShardsPtr shards, int64_t first_vocab_id);

  // Buffers for all tokens, or for the rows of logits. An activation's precision may be "by_kind":
  // int8 for sampled tokens, bfloat16 for prompt tokens.
  RowsPtr rows(int64_t columns, bool for_logits) const;
  // min_tiles: allocates at least this many tiles, for rows that are not contiguous.
  ActivationPtr activation(int64_t columns, const std::string& precision, bool for_logits,
                           int64_t min_tiles = 0) const;
  // Returns this shard's partial sum of the next sum, which the next operator must write.
  RowsPtr partial_sum();
  RoutingPtr routing(int64_t num_experts, int64_t top_k) const;
  QueryPtr query(const KvPool& pool, int64_t layer, int64_t num_heads) const;

  // Operators. Each writes to `out` or adds to `x`.
  void embed(const Matrix& table, double factor, const std::optional<Floats>& positions,
             const RowsPtr& out);
  void embed_add(const Matrix& table, double factor, const RowsPtr& rows);
  // Writes images' rows of a level in place of their tokens' rows of x, or adds them to these.
  void image_rows(const RowsPtr& x, int64_t level, bool adds);
  // With few tokens no barrier follows a private norm: the next operator must not write to x.
  void norm(const RowsPtr& x, const Norm& norm, bool for_logits, bool is_private,
            const ActivationPtr& out);
  void norm_add(const RowsPtr& rows, const Norm& norm, double factor, double scale,
                const RowsPtr& x);
  // A norm that is narrower than x normalises groups of its columns, or only the columns from
  // `first_column` on, if one is given.
  void norm_in_place(const Norm& norm, const RowsPtr& x, std::optional<int64_t> first_column);
  // Packs the first `columns` of rows; by default as many as `out` has.
  void pack(const RowsPtr& rows, const ActivationPtr& out, std::optional<int64_t> columns);
  // Writes to `out` the columns [order] of a float32 activation, [columns] indices.
  void reorder(const ActivationPtr& in, const Array<int32_t>& order, const ActivationPtr& out);
  // Writes to the columns of `out` from `first_column` on.
  void linear(const Product& product, const RowsPtr& out, int64_t first_column);
  void linear_add(const Product& product, double factor, const RowsPtr& x);
  // x = factor * the sum of all shards' partial sums, or x += that.
  void sum_shards(const RowsPtr& partial_sum, double factor, bool adds, const RowsPtr& x);
  // products: q, or q, k and v, as one matrix, or as three of different formats.
  void qkv(const std::vector<Product>& products, const Heads& heads, bool has_keys,
           const QueryPtr& out);
  // The same for rows in packed order.
  void head_rows(const RowsPtr& rows, const Heads& heads, bool has_keys, const QueryPtr& out);
  // Multiplies each head's columns of the input by that head's rows of the weight.
  void heads_linear(const Product& product, int64_t num_heads, const RowsPtr& out);
  // Writes queries against latents, from their parts `absorbed` and `rotary`, and stores latents
  // in the cache.
  void latent_qkv(const RowsPtr& absorbed, const RowsPtr& rotary, const RowsPtr& latents,
                  const LatentHeads& heads, const QueryPtr& out);
  // Writes to an activation, or to rows if the head size is not a multiple of 32. The queries are
  // already scaled.
  void attention(const QueryPtr& q, const PoolPtr& pool, int64_t layer, int64_t true_dim,
                 const SpecPtr& spec, const ActivationPtr& out, const RowsPtr& rows);
  // alphas: xIELU's two numbers; other functions ignore them.
  void up(const Product& product, const std::string& activation,
          const std::pair<double, double>& alphas, const ActivationPtr& out);
  void gate_up(const Product& product, const std::string& activation, const ActivationPtr& out);
  // Reads the columns of `up` from `first_column` on.
  void act_mul(const RowsPtr& gate, const RowsPtr& up, int64_t first_column,
               const std::string& activation, const ActivationPtr& out);
  // Selects the experts of each token from a router's logits, and runs their MLPs. `gathered` and
  // `inner` hold the input rows, and the rows of the last product's input, of several experts at a
  // time.
  void route(const RowsPtr& logits, const RoutePtr& spec, const RoutingPtr& out);
  // out = factor * the weighted sum of each token's experts, or out += that.
  void experts(const ActivationPtr& in, const RoutingPtr& routing, const MlpsPtr& mlps,
               const ActivationPtr& gathered, const ActivationPtr& inner, double factor, bool adds,
               const RowsPtr& out);
  void gated_add(const RowsPtr& rows, const RowsPtr& gate, double factor, const RowsPtr& x);
  // Writes rows of the layer's channels.
  void short_conv(const RowsPtr& rows, const ShortConv& conv, const StatesPtr& states,
                  int64_t layer, const RowsPtr& out);
  // `in` holds x, B and C; `steps` holds each head's time step.
  void selective_scan(const RowsPtr& in, const RowsPtr& steps, const SelectiveScan& scan,
                      const StatesPtr& states, int64_t layer, const RowsPtr& out);
  // `parts` holds B and C; `steps` and `gate` hold a number for each channel.
  void channel_scan(const RowsPtr& x, const RowsPtr& steps, const RowsPtr& parts,
                    const RowsPtr& gate, const ChannelScan& scan, const StatesPtr& states,
                    int64_t layer, const RowsPtr& out);
  // `in` holds queries, keys and values; `steps` holds the inputs of rates and decays.
  void delta_rule(const RowsPtr& in, const RowsPtr& steps, const DeltaRule& rule,
                  const StatesPtr& states, int64_t layer, const RowsPtr& out);
  void gated_norm(const RowsPtr& rows, const RowsPtr& gate, const GatedNorm& norm,
                  const RowsPtr& out);
  void logits(const Product& product, int64_t vocab_size, double scale, double cap);
  // Declares that no later operator writes keys, values or states. A step without rows of logits
  // ends here. A step with such rows continues with these only, if everything that it still needs
  // per token is in `rows` and `query` (`can_gather`).
  void end_cache_writes(bool can_gather, const std::vector<RowsPtr>& rows, const QueryPtr& query);

  int64_t num_operators() const { return forward_.size() + head_.size(); }

 protected:
  // A buffer from which the rest of a step reads rows.
  struct Gathered {
    uint8_t* data;
    int64_t row_bytes;
  };

  const int64_t max_tokens_, max_sequences_, max_rows_, max_context_;
  const int num_members_;

  step::Segment forward_, head_;
  int64_t num_ids_ = 0, vocab_ = 0;
  int64_t num_positions_ = INT32_MAX;  // positions for which every table has an entry
  bool has_positions_ = false;         // whether position embeddings are added
  int64_t num_image_levels_ = 0;       // of images' rows that operators read; 0: none do
  int64_t image_columns_ = 0;
  int64_t num_angles_ = 0;  // columns of the rotary tables; -1: they differ
  RowsPtr logits_;
  PoolPtr pool_;
  StatesPtr states_;
  LayoutPtr adapters_;
  ShardsPtr shards_;
  int64_t first_vocab_id_ = 0;

  std::vector<step::AttentionKind> kinds_;  // the distinct kinds of the layers' attention
  int64_t last_write_ = 0;  // number of operators up to the last that writes keys and values
  bool can_gather_ = false;
  std::vector<Gathered> gathered_;

 private:
  // Returns the parameters of an operator's `part`-th product, after recording the adapters'
  // operator that must precede it. The weight has the columns of one head of the input.
  step::LinearParams linear_params(const Product& product, int64_t unit_strips,
                                   bool for_logits = false, size_t part = 0, int64_t num_heads = 1);
  step::AdapterPlace adapter_place(const Product& product, size_t part);
  step::HeadParams head_params(const Heads& heads, bool has_values, const QueryPtr& out);
  void set_norms(const HeadNorms& norms, int64_t num_heads, step::HeadParams& params);
  void share_scratch(step::QkvParams& params);
  // Records, after the head, the copy of this shard's logits into the shared logits.
  void share_logits();

  step::KvLayerView use_pool(const PoolPtr& pool, int64_t layer, int64_t num_heads);
  void use_states(const StatesPtr& states);
  const float* keep(const Floats& array);
  // Keeps a norm's weight and bias (or null), which must have this shape.
  std::pair<const float*, const float*> keep(const Norm& norm, int64_t columns, const char* name);
  void keep(const ActivationBuffer& activation);
  void keep(const cpu::Memory& memory) { memories_.push_back(memory); }
  float* scratch_of(int64_t floats);

  void check_rows_buffer(const RowsPtr& rows, int64_t columns, const char* name) const;
  // Checks that a buffer has this program's size: kernels write all rows of a step.
  template <class Buffer>
  void check_num_rows(const Buffer& buffer, const char* name, bool for_logits = false) const {
    const int64_t wanted = for_logits ? max_rows_ : max_tokens_;
    check(buffer.num_rows == wanted, "`", name, "` must have the program's ", wanted, " ",
          for_logits ? "rows of logits" : "rows of tokens", ", got ", buffer.num_rows);
  }
  // Throws after `end_cache_writes`: a step that continues with its last rows has no per-token
  // inputs any more.
  void check_before_end(const char* name) const;

  bool has_ended_writes_ = false;
  int64_t num_partial_sums_ = 0;
  std::unique_ptr<step::AttentionWorkspace> workspace_;
  cpu::Memory inner_[3];  // adapters' inner values, by part of an operator
  int64_t inner_stride_ = 0;
  std::vector<std::pair<cpu::Memory, int64_t>> scratch_;

  // What operators point into.
  std::vector<cpu::Memory> memories_;
  std::vector<Floats> arrays_;
  std::vector<SpecPtr> specs_;
  std::vector<std::shared_ptr<void>> others_;
};

}  // namespace tgi
