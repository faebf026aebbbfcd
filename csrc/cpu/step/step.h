// The operators of a recorded step: what each reads and writes. A step's sizes and index arrays
// come from its header; everything else is fixed when the step is recorded. Plain structs without
// torch, shared by all instruction sets.
#pragma once

#include <atomic>
#include <cstdint>

#include "../sample.h"
#include "adapter.h"
#include "experts.h"
#include "kv_layer.h"
#include "packed.h"
#include "shares.h"
#include "states.h"

namespace tgi::cpu::step {

// A point in the flat list of attention work: row tiles ordered by (sequence, KV head, tile), and
// within a tile the chunk of context.
struct AttentionPoint {
  int32_t sequence;
  int32_t head;
  int32_t tile;
  int32_t chunk;
};

// What changes from step to step. The arrays are written before the step starts and do not change
// while it runs.
struct StepHeader {
  int64_t num_tokens;
  int64_t num_generated;  // sampled tokens, which come first; the rest are prompt tokens
  int64_t num_sequences;
  int64_t num_rows;          // rows of logits
  const int32_t* ids;        // [num_tokens]
  const int32_t* positions;  // [num_tokens]
  // [num_tokens]: each token's row of the rotary tables, mostly its position; -1 - i: row i of the
  // step's own table, for tokens whose positions have several axes (those of images).
  const int32_t* rotary;
  const float* cosines;  // [rows, columns of the rotary tables] or null, the step's own table
  const float* sines;    // same shape
  // Layers of a group share a block table; each group has its own.
  int64_t num_groups;
  const int64_t* slots;        // [num_groups, num_tokens], block * block_size + offset
  const int32_t* query_start;  // [num_sequences + 1]
  const int32_t* context_len;  // [num_sequences], including the step's own tokens
  const int32_t* block_table;  // [num_groups, num_sequences, block_table_stride]
  int64_t block_table_stride;
  const int32_t* rows;                    // [num_rows], token indices
  const AttentionPoint* attention_split;  // [kinds][members + 1], see AttentionParams::split
  // [num_tokens] or null: number of positions a token may see, if that is more than those up to its
  // own (tokens of an image see each other).
  const int32_t* visible_until;
  // Rows of images, which take the place of their tokens' embeddings or are added to the residual.
  const int32_t* image_tokens;  // [num_image_rows], ascending
  const float* image_rows;      // [levels][num_image_rows, columns of the residual]
  int64_t num_image_rows;
  // Tokens with a LoRA adapter, ascending; empty if no row of the step has one.
  const AdapterSpan* adapters;
  int64_t num_adapters;
  // How sequences advance their recurrent states. The spans of one sequence are consecutive.
  const StateSpan* state_spans;
  int64_t num_state_spans;

  int64_t slot(int64_t group, int64_t token) const { return slots[group * num_tokens + token]; }
  const int32_t* table(int64_t group, int64_t sequence) const {
    return block_table + (group * num_sequences + sequence) * block_table_stride;
  }
};

// A row of an activation, in the part that holds tokens of its kind (sampled or prompt).
struct ActivationRow {
  Activation part;
  int64_t row;
};

inline ActivationRow row_of(const Activation& activation, const StepHeader& step, int64_t token) {
  if (!activation.is_by_kind() || token < step.num_generated) return {activation, token};
  return {activation.of_prompts(), token - step.num_generated};
}

// Which positions of its sequence a token sees, including its own.
struct AttentionRule {
  int64_t window = INT64_MAX;  // number of positions, its own being the last
  int64_t chunk = INT64_MAX;   // positions per chunk; only its own chunk is seen
  bool sees_ahead = true;      // tokens also see up to the header's `visible_until`

  bool operator==(const AttentionRule& other) const {
    return window == other.window && chunk == other.chunk && sees_ahead == other.sees_ahead;
  }
  // The end of the positions seen by the step's token of this index, at `position`.
  int64_t end_seen(const StepHeader& step, int64_t token, int64_t position) const {
    const int64_t end = position + 1;
    if (!sees_ahead || step.visible_until == nullptr) return end;
    return step.visible_until[token] > end ? step.visible_until[token] : end;
  }
  // The first position seen by a token at `position`.
  int64_t first_seen(int64_t position) const {
    const int64_t by_window = position >= window ? position - window + 1 : 0;
    const int64_t by_chunk = position >= chunk ? position / chunk * chunk : 0;
    return by_window > by_chunk ? by_window : by_chunk;
  }
};

// Up to this many tokens, every member makes its own copy of a norm's output, which is cheaper than
// a barrier.
constexpr int64_t kPrivateTokens = 2;

struct EmbedParams {
  PackedMatrix table;
  float factor;            // multiplies every value (Gemma, Granite)
  float* x;                // [num_tokens, table.num_columns]
  const float* positions;  // [positions, table.num_columns], added per position, or null (GPT-2)
};

// A norm of rows: LayerNorm if there is a bias, else RMSNorm.
struct NormParams {
  const float* x;       // [num_tokens, out.num_columns]; zero past `width`
  const float* weight;  // [out.num_columns]; zero past `width`
  const float* bias;    // same shape as weight, or null
  int64_t width;        // columns that count
  float eps;
  bool for_logits;  // norm the header's `rows` instead of all tokens
  Activation out;
  bool is_private;  // with few rows, each member has a copy in its own tile, see kPrivateTokens
};

// Adds rows of a table to existing rows: rows += factor * table[ids].
struct EmbedAddParams {
  PackedMatrix table;
  float factor;
  float* scratch;  // [members, table.num_columns]
  float* rows;     // [num_tokens, table.num_columns]
};

// Writes images' rows of a level in place of their tokens' rows of x, or adds them to these.
struct ImageRowsParams {
  int64_t level;
  bool adds;
  int64_t num_columns;
  float* x;  // [num_tokens, num_columns]
};

// Adds the norm of rows to the residual, or to other rows: x = scale * (x + factor * norm(rows)).
struct NormAddParams {
  const float* rows;    // [num_tokens, num_columns]
  const float* weight;  // [num_columns]; zero past `width`
  const float* bias;    // same shape as weight, or null
  int64_t num_columns;
  int64_t width;
  float eps;
  float factor;
  float scale;
  float* x;  // [num_tokens, num_columns]
};

// Packs rows as the input of a product.
struct PackParams {
  const float* rows;  // [num_tokens, stride]
  int64_t stride;
  int64_t width;  // existing columns, followed by zeros up to out.num_columns
  Activation out;
};

// Writes the columns of an activation in another order, for a weight whose columns are sorted by
// group: column k is the value at places[k] of the token's row in float32 tiles.
struct ReorderParams {
  Activation in;          // float32
  bool is_private;        // with few tokens, each member has its own copy of the input
  const int32_t* places;  // [out.num_columns], floats from the row's first one
  Activation out;
};

// The norm of rows, written as rows; `out` may be `x`. A row may consist of groups of `width`
// columns, each of which is normalised by itself with the same weight.
struct NormRowsParams {
  const float* x;  // [num_tokens, stride]
  int64_t stride;
  const float* weight;  // [width]
  const float* bias;    // [width], or null
  int64_t width;
  int64_t num_groups;
  float eps;
  float* out;  // [num_tokens, out_stride]
  int64_t out_stride;
};

struct LinearParams {
  PackedMatrix weight;
  const float* bias;  // [num_rows] in packed order, or null
  Activation in;
  bool is_private;  // with few tokens, each member has its own copy of the input
  // A member's work memory: a unit's weights, decoded or as float32, or tile sums; null if the
  // product needs none.
  float* scratch;
  int64_t scratch_floats;  // from one member's memory to the next
  int64_t prompt_scratch;  // floats of a member's memory before the part that prompt tokens use
  AdapterPlace adapter = {};
};

// A product written as rows: out = in @ W.T (+ bias).
struct LinearRowsParams {
  LinearParams linear;
  float* out;  // [num_tokens, stride]; the product's rows are the first columns
  int64_t stride;
};

// Softmax and sigmoid use powers of two.
constexpr double kLog2E = 1.4426950408889634;

// What happens to heads of queries, keys and values once they are computed. A head has
// kv.num_strips() strips of 32 rows in packed order, zero in rows without a dim.
struct HeadParams {
  int64_t num_heads;
  int64_t true_dim;       // dims that a norm's mean is taken over
  int64_t rotary_strips;  // the first ones, which have pairs that are rotated
  const float* cosines;   // [positions, rotary_strips * 16], or null: no rotation
  const float* sines;     // same shape
  const float* q_norm;    // in packed order: [strips * 32], or for all heads; null: no norm
  const float* k_norm;
  const float* q_bias;  // biases of the norms in the same order if they are LayerNorms, or null
  const float* k_bias;
  int64_t norm_stride;  // floats from one head's weights to the next head's; 0: shared by all heads
  bool is_norm_last;    // heads are normalised after rotation
  bool norms_values;    // values are RMS-normalised, too, without a weight
  float clip;           // q, k and v are first clipped to [-clip, clip]; 0: no clipping
  float eps;
  float q_scale;              // softmax scale times log2(e), or 1
  const float* query_scales;  // [positions], an additional factor on queries, or null
  void* q;                    // [num_tokens, num_heads, kv.query_bytes()]
  KvLayerView kv;
};

// Queries, optionally with keys and values.
struct QkvParams {
  LinearParams parts[3];  // the rows of q, k, v: one matrix, or several if their formats differ
  int32_t num_parts;
  HeadParams heads;  // norms are per head
};

// The same from existing rows: queries, optionally followed by keys and values.
struct HeadRowsParams {
  const float* rows;   // [num_tokens, stride]: heads of q, of k, of v
  int64_t stride;      // floats
  bool has_keys;       // else there are only queries
  bool is_whole_norm;  // norms are over all heads of q, or of k, together
  HeadParams heads;
};

// A separate product per head: head h's columns of the input times head h's rows of the weight.
struct HeadsLinearParams {
  LinearParams linear;  // the weight has one head's columns; each head owns whole strips of rows
  int64_t num_heads;
  float* out;  // [num_tokens, stride]; the weight's rows are the first columns
  int64_t stride;
};

// Queries against latents, and the token's own latent, which goes to the cache. Each has a part
// without positions, as wide as the values, followed by a rotated part.
struct LatentQkvParams {
  const float* absorbed;  // [num_tokens, stride], the first part of each query head
  int64_t absorbed_stride;
  const float* rotary;  // [num_tokens, stride], the second part of each head, to be rotated
  int64_t rotary_stride;
  const float* latents;  // [num_tokens, stride], the first part, to be normalised, and the second
  int64_t latent_stride;
  const float* norm;  // [value_dim]
  float eps;
  const float* cosines;  // [positions, half of the rotated dims]
  const float* sines;    // same shape
  int64_t num_heads;
  float q_scale;  // softmax scale times log2(e)
  float* q;       // [num_tokens, num_heads, head_dim]
  KvLayerView kv;
};

// Heads already computed and rotated elsewhere, dims in their own order: [num_tokens, heads, dim].
struct PlainHeads {
  const float* data;
  int64_t token_stride;  // floats
  int64_t head_stride;
  int64_t dim;
};

// Brings queries into the layout that attention reads and writes keys and values, if there are any,
// to the cache. Queries and keys keep one common order of dims, which is all that their products
// need.
struct StoreHeadsParams {
  PlainHeads q, k, v;
  float q_scale;  // softmax scale times log2(e)
  void* out;      // [num_tokens, num_heads, kv.query_bytes()]
  int64_t num_heads;
  KvLayerView kv;
};

// A row tile's partial results when its chunks are split over members. The member that arrives last
// merges them in order.
struct AttentionPartial {
  float* data;  // [chunk][row]: value_dim sums, then maximum and total
  std::atomic<int32_t>* arrived;
};

// How scores are modified before the softmax, all in units of log2(e).
struct ScoreParams {
  float cap;            // score = cap * tanh(score / cap), 0: none
  const float* slopes;  // [num_heads] or null (ALiBi): score += slope * (key - query position)
  const float* sinks;   // [num_heads] or null: scores that only enter the sum of weights

  bool changes_scores() const { return cap != 0 || slopes != nullptr; }
};

struct AttentionParams {
  const void* q;
  KvLayerView kv;
  int64_t num_heads;
  int64_t true_dim;  // of a head's result; the stored head may be wider
  AttentionRule rule;
  int64_t split;  // index in the header of the split for this kind of attention
  ScoreParams scores;
  Activation out;  // num_columns = num_heads * true_dim, if true_dim is a multiple of 32; else
  float* rows;     // [num_tokens, stride] is written instead of the activation
  int64_t stride;
  // One per member: for the tile that this member is the first to work on.
  const AttentionPartial* partials;
};

struct LinearAddParams {
  LinearParams linear;
  float factor;  // x += factor * product
  float* x;      // [num_tokens, num_rows]
};

// An activation function; xIELU has two parameters of its own.
struct MlpFunction {
  MlpActivation kind;
  float positive = 0;
  float negative = 0;
};

// The first half of an MLP without a gate: f(in @ W.T (+ bias)).
struct UpParams {
  LinearParams linear;
  MlpFunction function;
  Activation out;
};

struct GateUpParams {
  LinearParams linear;  // each strip is a gate panel and an up panel
  MlpFunction function;
  Activation out;
  float* rows;  // [num_tokens, stride], written instead of the activation, or null
  int64_t stride;
  ClampedGate clamped = {};
};

// The same from existing rows: f(gate) * up.
struct ActMulParams {
  const float* gate;  // [num_tokens, out.num_columns]
  const float* up;    // [num_tokens, up_stride], of which the first out.num_columns are read
  int64_t up_stride;
  MlpFunction function;
  Activation out;
};

// The function of existing rows, written as rows.
struct ActivateParams {
  const float* x;  // [num_tokens, stride]
  int64_t stride;
  int64_t width;
  MlpFunction function;
  float* out;  // [num_tokens, width]
};

// One product for all experts: weight, bias and input are filled in for each expert in turn.
struct ExpertProduct {
  LinearParams linear;
  ExpertMatrices matrices;
};

// The weighted sum of the outputs of a token's routed experts, written as rows or added to the
// residual:
//   out = factor * sum of weight * down(f(gate) * up), or out += that
// Experts without gates compute down(f(up)).
struct ExpertsParams {
  ExpertRouting routing;
  Activation in;
  bool is_private;  // with few tokens, each member has its own copy of the input
  bool is_gated;
  ExpertProduct gate_up[2];  // one matrix, or separate gate and up if their formats differ; or up
  int32_t num_parts;
  ExpertProduct down;
  MlpFunction function;
  ClampedGate clamped;
  // Buffers for a pass of `num_tiles` tiles: rows of `in`, and the input of `down`.
  Activation gathered, inner;
  int64_t num_tiles;
  float* gates;         // with separate gate and up: a member's [tokens][32]
  int64_t gate_floats;  // from one member's gates to the next
  float factor;
  bool adds;   // to what `out` holds; else what it holds is not read
  float* out;  // [num_tokens, columns of down's weight]
};

// x += factor * sigmoid(gate) * rows, with one gate per token.
struct GatedAddParams {
  const float* rows;  // [num_tokens, num_columns]
  const float* gate;  // [num_tokens, gate_stride]; only the first column is read
  int64_t gate_stride;
  int64_t num_columns;
  float factor;
  float* x;  // [num_tokens, num_columns]
};

// The low-rank inner values that adapters compute from a product's input; the product reads them
// afterwards.
struct ShrinkParams {
  LinearParams linear;
};

struct LogitsParams {
  LinearParams linear;
  float* logits;  // [num_rows, vocab_size]
  int64_t vocab_size;
  float scale;  // multiplies every logit
  float cap;    // logits = cap * tanh(logits / cap), 0: none
};

// A set of kernels: the implementation for one instruction set, and its tile sizes. Each kernel
// does one member's part of the operator.
template <class Params>
using StepFunction = void (*)(const Params& params, const StepHeader& step, int member,
                              int num_members);

struct Kernels {
  const char* name;
  // How bf16 products round. Sets with the same value agree to the bit in everything they compute.
  const char* arithmetic;
  int64_t tile_tokens;  // of an activation
  // Query rows processed together by attention, by the cache's precision.
  int64_t (*attention_rows)(Precision precision);
  StepFunction<EmbedParams> embed;
  StepFunction<EmbedAddParams> embed_add;
  StepFunction<NormParams> norm;
  StepFunction<NormAddParams> norm_add;
  StepFunction<PackParams> pack;
  StepFunction<ReorderParams> reorder;
  StepFunction<NormRowsParams> norm_rows;
  StepFunction<LinearRowsParams> linear_rows;
  StepFunction<QkvParams> qkv;
  StepFunction<HeadRowsParams> head_rows;
  StepFunction<StoreHeadsParams> store_heads;
  StepFunction<HeadsLinearParams> heads_linear;
  StepFunction<LatentQkvParams> latent_qkv;
  StepFunction<AttentionParams> attention;
  StepFunction<LinearAddParams> linear_add;
  StepFunction<UpParams> up;
  StepFunction<GateUpParams> gate_up;
  StepFunction<ActMulParams> act_mul;
  StepFunction<ActivateParams> activate;
  StepFunction<LogitsParams> logits;
  StepFunction<ShrinkParams> shrink;
  StepFunction<RouteParams> route;
  StepFunction<ExpertsParams> experts;
  StepFunction<GatedAddParams> gated_add;
  StepFunction<ShortConvParams> short_conv;
  StepFunction<SelectiveScanParams> selective_scan;
  StepFunction<ChannelScanParams> channel_scan;
  StepFunction<DeltaRuleParams> delta_rule;
  StepFunction<GatedNormParams> gated_norm;
  // A member's work memory, in floats, for a product's units of `unit_strips` strips.
  int64_t (*scratch_floats)(const PackedMatrix& weight, Precision precision, int64_t unit_strips);
  // Runs the inner product's instruction `times` times on all registers, to measure its peak.
  // Returns the number of operations, two per multiply-add.
  double (*spin)(Precision precision, int64_t times);
  RowPasses rows;  // the passes that sampling is built from
};

// Whether data read from memory is best prefetched into the L1 cache, see stream.h.
extern const bool kStreamsIntoL1;

// How far ahead of its use a panel is prefetched into L2, in bytes.
constexpr int64_t kStreamDistance = 5120;

// How far ahead of its use a panel is prefetched into L1, in bytes; 0: the next unit's panels are
// prefetched instead, while this one's are read.
extern const int64_t kPanelDistance;

// Whether unpacking codes takes the ports that multiply, so that many tokens are better multiplied
// by bytes, see decoded_linear.h.
extern const bool kUnpackingIsSlow;

// Tokens of context whose softmax is taken at once. Chunks begin at multiples of it whatever the
// batch, so a split does not change a bit.
constexpr int64_t kChunkTokens = 256;

}  // namespace tgi::cpu::step
