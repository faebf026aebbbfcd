// The recorded step as Python has it, tgi_asgi._C.Program: its buffers, its operators, its runs.
// Operands are checked when they are recorded (program.cpp), a step's arrays before each run
// (program_run.cpp); the kernels trust both.
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

// Rows of float32, one a token (or one a row of logits); columns are padded to whole blocks.
struct RowsBuffer {
  cpu::Memory memory;
  int64_t num_rows;
  int64_t num_columns;
  std::optional<int64_t> turn = std::nullopt;  // of a sum that they are this shard's part of
  float* data() const { return reinterpret_cast<float*>(memory.get()); }
};

// The input of products.
struct ActivationBuffer {
  cpu::Memory memory;
  cpu::Memory prompt_memory;  // of tokens of prompts, where these are multiplied otherwise, or null
  int64_t num_rows;
  step::Activation view;
  int64_t tile_tokens;
  int64_t num_tiles;
  // What was written last are copies of the members' own, see kPrivateTokens.
  bool is_private = false;

  int64_t tile_bytes() const { return view.tile_bytes(tile_tokens); }
};

// Queries, as a cache wants them.
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

// A product's operands: its weight, the input in the precision that the weight is multiplied in.
struct Product {
  const Matrix& weight;
  ActivationPtr in;
  std::optional<Floats> bias;      // in the order of the packed rows
  std::optional<int64_t> adapter;  // which product of the layout it is, if adapters may change it
};

// A norm of rows or heads: RMSNorm, or where there is a bias LayerNorm.
struct Norm {
  Floats weight;
  std::optional<Floats> bias;  // of the weight's shape
  int64_t width;               // values that count; of heads these say it
  double eps;
};

// The norms of queries and keys, in packed order: one for all heads, or for each.
struct HeadNorms {
  Norm query, key;
  bool is_whole;  // over all heads together
  bool is_last;   // once they are rotated
};

// How heads are normalised and rotated, and which layer of which pool they go to.
struct Heads {
  PoolPtr pool;
  int64_t layer;
  int64_t num_heads;
  int64_t true_dim;
  std::optional<double> scale;           // of the softmax; none: queries stay as they are
  std::optional<Floats> cosines, sines;  // [positions, padded pairs of a head]
  std::optional<HeadNorms> norms;
  double clip;                         // q, k and v are cut to [-clip, clip] first; 0: they are not
  std::optional<Floats> query_scales;  // [positions] what queries are multiplied by as well
};

// What latent attention does with rows: the norm of latents, angles, and which layer of which pool
// they go to.
struct LatentHeads {
  PoolPtr pool;
  int64_t layer;
  int64_t num_heads;
  double scale;  // of the softmax
  Floats norm;   // [values of a latent]
  double eps;
  Floats cosines, sines;   // [positions, rotated pairs]
  int64_t turning_column;  // where what is rotated of queries begins in its rows
};

// A short convolution of columns of rows, see ShortConvParams.
struct ShortConv {
  Floats weight;               // [taps, padded channels]
  std::optional<Floats> bias;  // [padded channels]
  int64_t first_column;
  std::optional<int64_t> in_gate, out_gate;  // their first columns, of the same rows
  bool has_silu;
};

// State spaces of heads, see SelectiveScanParams; their vectors have an element a head.
struct SelectiveScan {
  int64_t num_heads, head_dim, num_groups, state_size;
  Floats a, d, dt_bias;
  int64_t dt_column;  // where the heads' steps begin in their rows
  double dt_scale, dt_low, dt_high;
};

// Heads of the gated delta rule, see DeltaRuleParams; its vectors have an element a head.
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
  int64_t gate_column;  // where the gates begin in their rows
};

class Program {
 public:
  Program(int64_t max_tokens, int64_t max_sequences, int64_t max_rows, int64_t max_context);

  // Before anything is recorded: products may be changed by adapters of this layout.
  void use_adapters(LayoutPtr layout);

  // Before anything is recorded: this is one of several shards, with the words from `first_word` on
  // in its embedding and its head.
  void use_shards(ShardsPtr shards, int64_t first_word);

  // Buffers, for all tokens, or for the rows of logits. An activation's precision may be "by_kind":
  // int8 of tokens that were drawn, bfloat16 of those of prompts.
  RowsPtr rows(int64_t columns, bool for_logits) const;
  // More tiles than all tokens fill: for rows that lie apart.
  ActivationPtr activation(int64_t columns, const std::string& precision, bool for_logits,
                           int64_t min_tiles = 0) const;
  // This shard's part of the next sum: written by the operator that comes next.
  RowsPtr part();
  ChoicePtr choice(int64_t num_experts, int64_t top_k) const;
  QueryPtr query(const KvPool& pool, int64_t num_heads) const;

  // Recording. Each writes to `out`, or adds to `x`.
  // Positions: what each adds to its tokens' rows.
  void embed(const Matrix& table, double factor, const std::optional<Floats>& positions,
             const RowsPtr& out);
  // A private norm is followed by no barrier where tokens are few: the operator behind it must not
  // write to x.
  void norm(const RowsPtr& x, const Norm& norm, bool for_logits, bool is_private,
            const ActivationPtr& out);
  void norm_add(const RowsPtr& rows, const Norm& norm, double factor, const RowsPtr& x);
  void norm_in_place(const Norm& norm, const RowsPtr& x);
  // The first columns of rows: as many as `out` has.
  void pack(const RowsPtr& rows, const ActivationPtr& out);
  // To columns of `out` from `first_column` on.
  void linear(const Product& product, const RowsPtr& out, int64_t first_column);
  void linear_add(const Product& product, double factor, const RowsPtr& x);
  // x = factor * the sum of all shards' parts, or x += that.
  void sum_shards(const RowsPtr& part, double factor, bool adds, const RowsPtr& x);
  // Products: the rows of q, k and v as one matrix, or as three of different formats.
  void qkv(const std::vector<Product>& products, const Heads& heads, const QueryPtr& out);
  // Of rows in packed order.
  void head_rows(const RowsPtr& rows, const Heads& heads, bool has_keys, const QueryPtr& out);
  // Of each head's columns of the input the product with that head's rows of the weight.
  void heads_linear(const Product& product, int64_t num_heads, const RowsPtr& out);
  // Queries against latents of parts `absorbed` and `turning`; latents to the cache.
  void latent_qkv(const RowsPtr& absorbed, const RowsPtr& turning, const RowsPtr& latents,
                  const LatentHeads& heads, const QueryPtr& out);
  // To an activation, or to rows where a head is no multiple of 32. The queries are scaled already.
  void attention(const QueryPtr& q, const PoolPtr& pool, int64_t layer, int64_t true_dim,
                 const SpecPtr& spec, const ActivationPtr& out, const RowsPtr& rows);
  // Alphas: xIELU's two numbers; of other functions they say nothing.
  void up(const Product& product, const std::string& activation,
          const std::pair<double, double>& alphas, const ActivationPtr& out);
  void gate_up(const Product& product, const std::string& activation, const ActivationPtr& out);
  void act_mul(const RowsPtr& gate, const RowsPtr& up, const std::string& activation,
               const ActivationPtr& out);
  // Which experts tokens go to, by a router's logits; and their MLPs. `gathered` and `inner` have
  // room for rows of the input, and of the input of the last product, of several experts at a time.
  void route(const RowsPtr& logits, const RoutePtr& spec, const ChoicePtr& out);
  void experts_add(const ActivationPtr& in, const ChoicePtr& choice, const MlpsPtr& mlps,
                   const ActivationPtr& gathered, const ActivationPtr& inner, double factor,
                   const RowsPtr& x);
  void gated_add(const RowsPtr& rows, const RowsPtr& gate, double factor, const RowsPtr& x);
  // To rows of the layer's channels.
  void short_conv(const RowsPtr& rows, const ShortConv& conv, const StatesPtr& states,
                  int64_t layer, const RowsPtr& out);
  // `in` has x, B and C, `steps` each head's step.
  void selective_scan(const RowsPtr& in, const RowsPtr& steps, const SelectiveScan& scan,
                      const StatesPtr& states, int64_t layer, const RowsPtr& out);
  // `in` has queries, keys and values, `steps` those of rates and of decays.
  void delta_rule(const RowsPtr& in, const RowsPtr& steps, const DeltaRule& rule,
                  const StatesPtr& states, int64_t layer, const RowsPtr& out);
  void gated_norm(const RowsPtr& rows, const RowsPtr& gate, const GatedNorm& norm,
                  const RowsPtr& out);
  void logits(const Product& product, int64_t vocab_size, double scale, double cap);
  // Says that no operator behind writes keys, values or states: a step without rows of logits ends
  // here, one with some goes on with these alone, if what it still needs of tokens lies in `rows`
  // and `query`.
  void end_cache_writes(bool can_gather, const std::vector<RowsPtr>& rows, const QueryPtr& query);
  int64_t num_operators() const { return forward_.size() + head_.size(); }

  // Running. Everything is checked before anything is computed; the GIL is released meanwhile.
  // The forward pass of a batch and, if rows are asked for, their logits: [num_rows, vocab], valid
  // until the next call.
  Floats run(const FlatRows& batch, const std::vector<int32_t>& rows);
  // The same and a draw a row, in one run of the team; of tokens that are not drawn after only keys
  // and values are computed. `run_head` is not possible afterwards.
  py::tuple draw(const FlatRows& batch, const std::vector<int32_t>& rows,
                 std::vector<int32_t> slots, SampleArrays& state,
                 const std::optional<Array<int32_t>>& mask, std::vector<int32_t> drafts);
  // The same of a draw that others have prepared, without the GIL.
  void draw_batch(const FlatRows& batch, const std::vector<int32_t>& rows, SampleCall& call);
  // As `draw` without drawing; the seconds that each operator took, barrier included.
  std::vector<double> profile(const FlatRows& batch, const std::vector<int32_t>& rows);
  // How many steps have been computed, to the last one's states.
  int64_t num_steps() const { return num_steps_; }
  // Takes back the states of a step that was computed after so many, and then failed.
  void forget_since(int64_t num_steps) {
    if (num_steps_ > num_steps && states_ != nullptr) states_->forget();
  }
  // The logits of other rows of the last batch, which `run` has computed.
  Floats run_head(const std::vector<int32_t>& rows);
  // Copies blocks of the pool (from, to), in all shards.
  void copy_blocks(const BlockPairs& pairs);
  // Computes what the first shard sends, until it ends or the group is given up. Without the GIL.
  void follow();
  int64_t vocab() const { return vocab_; }

 private:
  // Of the `part`-th product of an operator; what adapters need before it is recorded. The weight
  // has a head's columns of the input.
  step::LinearParams linear_params(const Product& product, int64_t unit_strips,
                                   bool for_logits = false, size_t part = 0, int64_t num_heads = 1);
  step::AdapterPlace adapter_place(const Product& product, size_t part);
  void check_adapters(const FlatRows& batch) const;
  step::HeadParams head_params(const Heads& heads, bool has_values, const QueryPtr& out);
  void use_norms(const HeadNorms& norms, int64_t num_heads, step::HeadParams& params);
  step::KvLayerView use_pool(const PoolPtr& pool, int64_t layer, int64_t num_heads);
  void use_states(const StatesPtr& states);
  const float* keep(const Floats& array);
  // A norm's weight and bias (or null), of this shape.
  std::pair<const float*, const float*> keep(const Norm& norm, int64_t columns, const char* name);
  void keep(const ActivationBuffer& activation);
  void keep(const cpu::Memory& memory) { memories_.push_back(memory); }
  float* scratch_of(int64_t floats);
  void check_rows_buffer(const RowsPtr& rows, int64_t columns, const char* name) const;
  // A buffer of this program's size: kernels write all rows of a step.
  template <class Buffer>
  void check_num_rows(const Buffer& buffer, const char* name, bool for_logits = false) const {
    const int64_t wanted = for_logits ? max_rows_ : max_tokens_;
    check(buffer.num_rows == wanted, "`", name, "` must have the program's ", wanted, " ",
          for_logits ? "rows of logits" : "rows of tokens", ", got ", buffer.num_rows);
  }
  void share_scratch(step::QkvParams& params);
  // What a step reads of its tokens alone is not there once it goes on with its last rows.
  void check_before_end(const char* name) const;

  // Sends the present step to the other shards, last before it runs.
  void send_step(const FlatRows& batch, const std::vector<int32_t>& rows, bool only_rows);
  // Every member's end of what was sent.
  void meet_shards() {
    if (shards_ != nullptr) shards_->meet();
  }
  // Throws std::runtime_error where another shard has not computed its part.
  void check_shards() const;
  void follow_one(ShardMail& mail);
  // Behind the head: this shard's logits go to those of all.
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
  int64_t num_positions_ = INT32_MAX;  // those that every table has an entry for
  bool has_positions_ = false;         // some are added to embeddings
  ShardsPtr shards_;
  int64_t first_word_ = 0;
  int64_t num_parts_ = 0;
  int64_t num_steps_ = 0;
  StatesPtr states_;
  PoolPtr pool_;
  step::KvLayerView kv_ = {};  // the first of its layers that was used: all have one shape
  step::HeadSplit heads_ = {};
  step::Segment forward_, head_;
  step::StepHeader header_ = {};
  std::vector<step::AttentionRule> rules_;  // of its layers, each once
  std::vector<step::AttentionPoint> split_;
  step::LastRows last_rows_;
  struct Gathered {
    uint8_t* data;
    int64_t row_bytes;
  };
  std::vector<Gathered> gathered_;  // buffers that the rest of a step reads rows of
  bool can_gather_ = false;
  bool has_ended_writes_ = false;
  bool can_run_head_ = false;   // what `run` has computed is there
  bool ends_early_ = false;     // the step ends with the last keys and values
  bool has_last_rows_ = false;  // behind these it goes on with the header's rows alone
  int64_t last_write_ = 0;      // operators up to the last that writes keys and values
  std::unique_ptr<step::AttentionWorkspace> workspace_;
  RowsPtr logits_;
  std::vector<int32_t> rows_;  // of the present step
  FlatRows batch_;             // and its arrays
  std::vector<cpu::Memory> memories_;
  std::vector<Floats> arrays_;
  std::vector<SpecPtr> specs_;
  std::vector<std::shared_ptr<void>> others_;  // what operators point into
  std::vector<std::pair<cpu::Memory, int64_t>> scratch_;
  LayoutPtr adapters_;
  cpu::Memory inner_[3];  // adapters' inner values, by the part of an operator
  int64_t inner_stride_ = 0;
};

void bind_program(py::module_& module);

}  // namespace tgi
