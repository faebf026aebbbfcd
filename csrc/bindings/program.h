// The recorded step as Python holds it, tgi_asgi._C.Program: its buffers, operators and runs.
// Operands are checked when they are recorded (program.cpp), a step's arrays before each run
// (program_run.cpp); the kernels rely on both.
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
#include "bindings/rows.h"
#include "bindings/sample.h"
#include "bindings/shards.h"
#include "bindings/state_pool.h"
#include "cpu/step/segment.h"

namespace tgi {

// Rows of float32, one per token (or per row of logits); columns are padded to whole blocks.
struct RowsBuffer {
  cpu::Memory memory;
  int64_t num_rows;
  int64_t num_columns;
  std::optional<int64_t> turn = std::nullopt;  // the sum's, if the rows are a shard's partial sum
  float* data() const { return reinterpret_cast<float*>(memory.get()); }
};

// The input of products.
struct ActivationBuffer {
  cpu::Memory memory;
  // For prompt tokens, if these are multiplied in another precision; else null.
  cpu::Memory prompt_memory;
  int64_t num_rows;
  step::Activation view;
  int64_t tile_tokens;
  int64_t num_tiles;
  // Whether the last write left a private copy per member, see kPrivateTokens.
  bool is_private = false;

  int64_t tile_bytes() const { return view.tile_bytes(tile_tokens); }
};

// Queries, in the cache's layout.
struct QueryBuffer {
  cpu::Memory memory;
  int64_t num_rows;
  int64_t num_heads;
  int64_t row_bytes;
};

using RowsPtr = std::shared_ptr<RowsBuffer>;
using ActivationPtr = std::shared_ptr<ActivationBuffer>;
using QueryPtr = std::shared_ptr<QueryBuffer>;
using PoolPtr = std::shared_ptr<KvPool>;
using StatesPtr = std::shared_ptr<StatePool>;
using Floats = Array<float>;

// A product's operands: its weight, and the input in the precision of the multiplication.
struct Product {
  const Matrix& weight;
  ActivationPtr in;
  std::optional<Floats> bias;      // in the order of the packed rows
  std::optional<int64_t> adapter;  // its index in the adapter layout, if adapters may change it
};

// A norm of rows or heads: RMSNorm, or LayerNorm if there is a bias.
struct Norm {
  Floats weight;
  std::optional<Floats> bias;  // same shape as the weight
  int64_t width;               // number of values that count; heads use their own true_dim
  double eps;
};

// The norms of queries and keys, in packed order: one for all heads, or one per head.
struct HeadNorms {
  Norm query, key;
  bool is_whole;  // over all heads together
  bool is_last;   // applied after the rotation
};

// How heads are normalised and rotated, and which layer of which pool they belong to.
struct Heads {
  PoolPtr pool;
  int64_t layer;
  int64_t num_heads;
  int64_t true_dim;
  std::optional<double> scale;           // of the softmax; none: queries are not scaled
  std::optional<Floats> cosines, sines;  // [positions, padded pairs of a head]
  std::optional<HeadNorms> norms;
  double clip;  // q, k and v are first clipped to [-clip, clip]; 0: no clipping
  std::optional<Floats> query_scales;  // [positions], additional factors of the queries
};

// The parameters of latent attention (MLA): the norm of latents, the rotation, and which layer of
// which pool they belong to.
struct LatentHeads {
  PoolPtr pool;
  int64_t layer;
  int64_t num_heads;
  double scale;  // of the softmax
  Floats norm;   // [values of a latent]
  double eps;
  Floats cosines, sines;  // [positions, rotated pairs]
  int64_t rotary_column;  // first column of the rotated query parts in their rows
};

// A short convolution over columns of rows, see ShortConvParams.
struct ShortConv {
  Floats weight;               // [taps, padded channels]
  std::optional<Floats> bias;  // [padded channels]
  int64_t first_column;
  std::optional<int64_t> in_gate, out_gate;  // their first columns, in the same rows
  bool has_silu;
};

// State spaces of heads, see SelectiveScanParams; the vectors have one element per head.
struct SelectiveScan {
  int64_t num_heads, head_dim, num_groups, state_size;
  Floats a, d, dt_bias;
  int64_t dt_column;  // first column of the heads' time steps in their rows
  double dt_scale, dt_low, dt_high;
};

// Heads of the gated delta rule, see DeltaRuleParams; the vectors have one element per head.
struct DeltaRule {
  int64_t num_heads, head_dim, num_key_heads, key_dim;
  bool is_tiled;
  Floats a, dt_bias;
};

// A norm of groups of columns and a gate, see GatedNormParams.
struct GatedNorm {
  int64_t width, group_width;
  std::optional<Floats> weight;  // [width]
  double eps;
  bool is_gate_first, is_sigmoid;
  double gate_scale;
  int64_t gate_column;  // first column of the gates in their rows
};

class Program {
 public:
  Program(int64_t max_tokens, int64_t max_sequences, int64_t max_rows, int64_t max_context);

  // Must come before any recording: adapters of this layout may change products.
  void set_adapters(LayoutPtr layout);

  // Must come before any recording: makes this program one of several shards, whose embedding and
  // head hold the vocabulary ids from `first_vocab_id` on.
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
  QueryPtr query(const KvPool& pool, int64_t num_heads) const;

  // Recording. Each operator writes to `out` or adds to `x`.
  void embed(const Matrix& table, double factor, const std::optional<Floats>& positions,
             const RowsPtr& out);
  // With few tokens no barrier follows a private norm: the next operator must not write to x.
  void norm(const RowsPtr& x, const Norm& norm, bool for_logits, bool is_private,
            const ActivationPtr& out);
  void norm_add(const RowsPtr& rows, const Norm& norm, double factor, const RowsPtr& x);
  void norm_in_place(const Norm& norm, const RowsPtr& x);
  // Packs the first columns of rows, as many as `out` has.
  void pack(const RowsPtr& rows, const ActivationPtr& out);
  // Writes to the columns of `out` from `first_column` on.
  void linear(const Product& product, const RowsPtr& out, int64_t first_column);
  void linear_add(const Product& product, double factor, const RowsPtr& x);
  // x = factor * the sum of all shards' partial sums, or x += that.
  void sum_shards(const RowsPtr& partial_sum, double factor, bool adds, const RowsPtr& x);
  // products: q, k and v as one matrix, or as three of different formats.
  void qkv(const std::vector<Product>& products, const Heads& heads, const QueryPtr& out);
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
  void act_mul(const RowsPtr& gate, const RowsPtr& up, const std::string& activation,
               const ActivationPtr& out);
  // Selects the experts of each token from a router's logits, and runs their MLPs. `gathered` and
  // `inner` hold the input rows, and the rows of the last product's input, of several experts at a
  // time.
  void route(const RowsPtr& logits, const RoutePtr& spec, const RoutingPtr& out);
  void experts_add(const ActivationPtr& in, const RoutingPtr& routing, const MlpsPtr& mlps,
                   const ActivationPtr& gathered, const ActivationPtr& inner, double factor,
                   const RowsPtr& x);
  void gated_add(const RowsPtr& rows, const RowsPtr& gate, double factor, const RowsPtr& x);
  // Writes rows of the layer's channels.
  void short_conv(const RowsPtr& rows, const ShortConv& conv, const StatesPtr& states,
                  int64_t layer, const RowsPtr& out);
  // `in` holds x, B and C; `steps` holds each head's time step.
  void selective_scan(const RowsPtr& in, const RowsPtr& steps, const SelectiveScan& scan,
                      const StatesPtr& states, int64_t layer, const RowsPtr& out);
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

  // Running. Everything is checked before anything is computed; the GIL is released meanwhile.
  Floats run(const FlatRows& batch, const std::vector<int32_t>& rows);
  // Runs the same and samples one token per row, in one run of the team. Of tokens after which
  // nothing is sampled, only keys and values are computed. `run_head` is not possible afterwards.
  py::tuple run_and_sample(const FlatRows& batch, const std::vector<int32_t>& rows,
                           std::vector<int32_t> slots, SampleArrays& state,
                           const std::optional<Array<int32_t>>& mask, std::vector<int32_t> drafts);
  // The same for a prepared call, without the GIL.
  void run_and_sample_prepared(const FlatRows& batch, const std::vector<int32_t>& rows,
                               SampleCall& call);
  // Does the same as `run_and_sample` without sampling; returns the seconds per operator, barrier
  // included.
  std::vector<double> profile(const FlatRows& batch, const std::vector<int32_t>& rows);
  // The number of steps computed, up to and including the last one's states.
  int64_t num_steps() const { return num_steps_; }
  // Discards the states of a step that failed after it was computed, if it was computed after the
  // first `num_steps`.
  void roll_back_to(int64_t num_steps) {
    if (num_steps_ > num_steps && states_ != nullptr) states_->roll_back();
  }
  // Returns the logits of other rows of the last batch, which `run` must have computed.
  Floats run_head(const std::vector<int32_t>& rows);
  // Copies blocks of the pool (from, to), in all shards.
  void copy_blocks(const BlockPairs& pairs);
  // Computes what shard 0 sends, until it ends or the group is aborted. Call it without
  // the GIL.
  void follow();
  int64_t vocab() const { return vocab_; }

 private:
  // Returns the parameters of an operator's `part`-th product, after recording the adapters'
  // operator that must precede it. The weight has the columns of one head of the input.
  step::LinearParams linear_params(const Product& product, int64_t unit_strips,
                                   bool for_logits = false, size_t part = 0, int64_t num_heads = 1);
  step::AdapterPlace adapter_place(const Product& product, size_t part);
  void check_adapters(const FlatRows& batch) const;
  step::HeadParams head_params(const Heads& heads, bool has_values, const QueryPtr& out);
  void set_norms(const HeadNorms& norms, int64_t num_heads, step::HeadParams& params);
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
  void share_scratch(step::QkvParams& params);
  // Throws after `end_cache_writes`: a step that continues with its last rows has no per-token
  // inputs any more.
  void check_before_end(const char* name) const;

  // Sends the current step to the other shards; the last action before it runs.
  void send_step(const FlatRows& batch, const std::vector<int32_t>& rows, bool only_rows);
  // Called by every member when it has finished the work that was sent.
  void shard_barrier() {
    if (shards_ != nullptr) shards_->barrier();
  }
  // Throws std::runtime_error if another shard has not computed its partial sums.
  void check_shards() const;
  void follow_one(ShardMail& mail);
  // Records, after the head, the copy of this shard's logits into the shared logits.
  void share_logits();

  void begin(const step::StepHeader& header, const FlatRows& batch);
  void check_tables(const step::StepHeader& header, int64_t sequence) const;
  void check_header(const step::StepHeader& header) const;
  void check_rows(const step::StepHeader& header) const;
  void check_members(int num_members) const;
  void prepare(int num_members, bool only_rows);
  void end();
  void run_step(int member, int num_members, double* ends = nullptr);
  Floats logits_view(int64_t rows);

  const int64_t max_tokens_, max_sequences_, max_rows_, max_context_;
  const int num_members_;
  int64_t num_ids_ = 0, vocab_ = 0;
  int64_t num_positions_ = INT32_MAX;  // positions for which every table has an entry
  bool has_positions_ = false;         // whether position embeddings are added
  ShardsPtr shards_;
  int64_t first_vocab_id_ = 0;
  int64_t num_partial_sums_ = 0;
  int64_t num_steps_ = 0;
  StatesPtr states_;
  PoolPtr pool_;
  step::KvLayerView kv_ = {};  // the first layer used: all have the same shape
  step::HeadSplit heads_ = {};
  step::Segment forward_, head_;
  step::StepHeader header_ = {};
  std::vector<step::AttentionRule> rules_;  // the distinct rules of the layers
  std::vector<step::AttentionPoint> split_;
  step::LastRows last_rows_;
  struct Gathered {
    uint8_t* data;
    int64_t row_bytes;
  };
  std::vector<Gathered> gathered_;  // buffers from which the rest of a step reads rows
  bool can_gather_ = false;
  bool has_ended_writes_ = false;
  bool can_run_head_ = false;   // whether the results of `run` are available
  bool ends_early_ = false;     // the step ends with the last keys and values
  bool has_last_rows_ = false;  // after these it continues with the header's rows only
  int64_t last_write_ = 0;      // number of operators up to the last that writes keys and values
  std::unique_ptr<step::AttentionWorkspace> workspace_;
  RowsPtr logits_;
  std::vector<int32_t> rows_;  // of the current step
  FlatRows batch_;             // and its arrays
  std::vector<cpu::Memory> memories_;
  std::vector<Floats> arrays_;
  std::vector<SpecPtr> specs_;
  std::vector<std::shared_ptr<void>> others_;  // objects that operators point into
  std::vector<std::pair<cpu::Memory, int64_t>> scratch_;
  LayoutPtr adapters_;
  cpu::Memory inner_[3];  // adapters' inner values, by part of an operator
  int64_t inner_stride_ = 0;
};

void bind_program(py::module_& module);

}  // namespace tgi
