// The buffers of a recorded step, and the operands of its operators as Python gives them.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>

#include "bindings/kv_pool.h"
#include "bindings/matrix.h"
#include "bindings/state_pool.h"
#include "cpu/step/step.h"

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
  bool is_whole;    // over all heads together
  bool is_last;     // applied after the rotation
  bool has_values;  // values are normalised, too, without a weight
};

// How heads are normalised and rotated, and which layer of which pool they belong to.
struct Heads {
  PoolPtr pool;
  int64_t layer;
  int64_t num_heads;
  int64_t true_dim;
  std::optional<double> scale;           // of the softmax; none: queries are not scaled
  std::optional<Floats> cosines, sines;  // [positions, rotated pairs of a head, padded]
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

// Channels with a state each, see ChannelScanParams.
struct ChannelScan {
  int64_t num_channels, state_size;
  Floats a;              // [channels / 16, state_size, 16]
  Floats d;              // [channels]
  int64_t parts_column;  // first column of B and C in their rows
  int64_t gate_column;   // first column of the gates in their rows
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
  int64_t gate_width;  // columns that share a gate
};

}  // namespace tgi
