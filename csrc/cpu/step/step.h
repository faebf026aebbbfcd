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

// A place in the flat list of attention work: row tiles in order of (sequence, KV head, tile), and
// inside a tile the chunk of context.
struct AttentionPoint {
  int32_t sequence;
  int32_t head;
  int32_t tile;
  int32_t chunk;
};

// What changes from step to step. The arrays are written before the step starts and not during it.
struct StepHeader {
  int64_t num_tokens;
  int64_t num_generated;  // the first so many tokens were drawn; the others are prompts'
  int64_t num_sequences;
  int64_t num_rows;          // rows of logits
  const int32_t* ids;        // [num_tokens]
  const int32_t* positions;  // [num_tokens]
  // Layers of a group share a block table; each group has its own.
  int64_t num_groups;
  const int64_t* slots;        // [num_groups, num_tokens], block * block_size + offset
  const int32_t* query_start;  // [num_sequences + 1]
  const int32_t* context_len;  // [num_sequences], the step's own tokens included
  const int32_t* block_table;  // [num_groups, num_sequences, block_table_stride]
  int64_t block_table_stride;
  const int32_t* rows;                    // [num_rows], indices of tokens
  const AttentionPoint* attention_split;  // [rules][members + 1], see AttentionParams::split
  // [num_tokens] or null: how many positions a token may see, where that is more than up to its own
  // (tokens of an image see each other).
  const int32_t* visible_until;
  // Tokens that have an adapter, ascending; none where no row of the step has one.
  const AdapterSpan* adapters;
  int64_t num_adapters;
  // How sequences go through their states: those of one follow each other.
  const StateSpan* state_spans;
  int64_t num_state_spans;

  int64_t slot(int64_t group, int64_t token) const { return slots[group * num_tokens + token]; }
  const int32_t* table(int64_t group, int64_t sequence) const {
    return block_table + (group * num_sequences + sequence) * block_table_stride;
  }
};

// A row of an activation, in the part that is for its token's kind.
struct ActivationRow {
  Activation part;
  int64_t row;
};

inline ActivationRow row_of(const Activation& activation, const StepHeader& step, int64_t token) {
  if (!activation.is_by_kind() || token < step.num_generated) return {activation, token};
  return {activation.of_prompts(), token - step.num_generated};
}

// Which positions of its sequence a token sees, its own among them.
struct AttentionRule {
  int64_t window = INT64_MAX;  // so many, its own the last
  int64_t chunk = INT64_MAX;   // those of its chunk of so many positions

  bool operator==(const AttentionRule& other) const {
    return window == other.window && chunk == other.chunk;
  }
  // The first position that a token at this one sees.
  int64_t first_seen(int64_t position) const {
    const int64_t by_window = position >= window ? position - window + 1 : 0;
    const int64_t by_chunk = position >= chunk ? position / chunk * chunk : 0;
    return by_window > by_chunk ? by_window : by_chunk;
  }
};

// Up to this many tokens every member makes its own copy of a norm's output: cheaper than a
// barrier.
constexpr int64_t kPrivateTokens = 2;

struct EmbedParams {
  PackedMatrix table;
  float factor;            // on every value (Gemma, Granite)
  float* x;                // [num_tokens, table.num_columns]
  const float* positions;  // [positions, table.num_columns] what a position adds, or null (GPT-2)
};

// A norm of rows: RMSNorm, or where there is a bias LayerNorm.
struct NormParams {
  const float* x;       // [num_tokens, out.num_columns]; zero behind `width`
  const float* weight;  // [out.num_columns]; zero behind `width`
  const float* bias;    // the same, or null
  int64_t width;        // columns that count
  float eps;
  bool for_logits;  // rows of the header's `rows` instead of all tokens
  Activation out;
  bool is_private;  // few rows: each member has a copy, in a tile of its own, see kPrivateTokens
};

// Adds the norm of rows to the residual: x += factor * norm(rows).
struct NormAddParams {
  const float* rows;    // [num_tokens, num_columns]
  const float* weight;  // [num_columns]; zero behind `width`
  const float* bias;    // the same, or null
  int64_t num_columns;
  int64_t width;
  float eps;
  float factor;
  float* x;  // [num_tokens, num_columns]
};

// Rows as the input of a product.
struct PackParams {
  const float* rows;  // [num_tokens, stride]
  int64_t stride;
  int64_t width;  // columns that there are: zeros behind them, up to out.num_columns
  Activation out;
};

// The norm of rows, as rows, which may be the same.
struct NormRowsParams {
  const float* x;  // [num_tokens, stride]
  int64_t stride;
  const float* weight;  // [width]
  const float* bias;    // the same, or null
  int64_t width;
  float eps;
  float* out;  // [num_tokens, out_stride]
  int64_t out_stride;
};

struct LinearParams {
  PackedMatrix weight;
  const float* bias;  // [num_rows] in packed order, or null
  Activation in;
  bool is_private;  // of few tokens each member has a copy of the input
  // A member's work memory: a unit's weights taken apart or as float32, or sums of tiles; null
  // where the product needs none.
  float* scratch;
  int64_t scratch_floats;  // between members
  int64_t prompt_scratch;  // floats of a member's that come before what prompts' tokens need
  AdapterPlace adapter = {};
};

// A product as rows: out = in @ W.T (+ bias).
struct LinearRowsParams {
  LinearParams linear;
  float* out;  // [num_tokens, stride], of which the product's rows are the first columns
  int64_t stride;
};

// Softmax and sigmoid are of powers of two.
constexpr double kLog2E = 1.4426950408889634;

// What is done with heads of queries, keys and values once they are computed. A head has
// kv.num_strips() strips of 32 rows in packed order, zero where it has no dim.
struct HeadParams {
  int64_t num_heads;
  int64_t true_dim;      // dims that a norm's mean is over
  const float* cosines;  // [positions, strips * 16], or null: no rotation
  const float* sines;    // the same
  const float* q_norm;   // in packed order: [strips * 32], or of all heads; null: no norm
  const float* k_norm;
  const float* q_bias;  // of the norms, in the same order, where these are LayerNorms; or null
  const float* k_bias;
  int64_t norm_stride;  // floats from a head's weights to the next head's; 0: all have the same
  bool is_norm_last;    // heads are normalised once they are rotated
  float clip;           // q, k and v are cut to [-clip, clip] before all that; 0: they are not
  float eps;
  float q_scale;              // softmax scale times log2(e), or 1
  const float* query_scales;  // [positions] what queries are multiplied by as well, or null
  void* q;                    // [num_tokens, num_heads, kv.query_bytes()]
  KvLayerView kv;
};

struct QkvParams {
  LinearParams parts[3];  // the rows of q, k, v: one matrix, or several where formats differ
  int32_t num_parts;
  HeadParams heads;  // norms are of each head
};

// The same from rows that are there: queries, and keys and values if there are any.
struct HeadRowsParams {
  const float* rows;   // [num_tokens, stride]: heads of q, of k, of v
  int64_t stride;      // floats
  bool has_keys;       // else there are queries alone
  bool is_whole_norm;  // norms are over all heads of q, or of k, together
  HeadParams heads;
};

// A product of each head by itself: head h's columns of the input with head h's rows of the weight.
struct HeadsLinearParams {
  LinearParams linear;  // the weight has a head's columns; whole strips of rows are a head's
  int64_t num_heads;
  float* out;  // [num_tokens, stride], of which the weight's rows are the first columns
  int64_t stride;
};

// Queries against latents, and a token's own latent, which goes to the cache: a part without
// positions, as wide as values, and a rotated one behind it.
struct LatentQkvParams {
  const float* absorbed;  // [num_tokens, stride] of each head of a query the first part
  int64_t absorbed_stride;
  const float* turning;  // [num_tokens, stride] of each head the second, to be rotated
  int64_t turning_stride;
  const float* latents;  // [num_tokens, stride] of a token the first part, to be normalised, and
                         // the second
  int64_t latent_stride;
  const float* norm;  // [value_dim]
  float eps;
  const float* cosines;  // [positions, half of the rotated dims]
  const float* sines;    // the same
  int64_t num_heads;
  float q_scale;  // softmax scale times log2(e)
  float* q;       // [num_tokens, num_heads, head_dim]
  KvLayerView kv;
};

// Heads that others have computed and rotated, dims in their own order: [num_tokens, heads, dim].
struct PlainHeads {
  const float* data;
  int64_t token_stride;  // floats
  int64_t head_stride;
  int64_t dim;
};

// Brings queries into the layout that attention wants, and keys and values, if there are any, into
// the cache. Queries and keys keep one order of dims, which is all that their products need.
struct StoreHeadsParams {
  PlainHeads q, k, v;
  float q_scale;  // softmax scale times log2(e)
  void* out;      // [num_tokens, num_heads, kv.query_bytes()]
  int64_t num_heads;
  KvLayerView kv;
};

// A row tile's partial results, where its chunks are split over members: merged in order by who
// arrives last.
struct AttentionPartial {
  float* data;  // [chunk][row]: value_dim sums, then maximum and total
  std::atomic<int32_t>* arrived;
};

// What is done with scores before their softmax, all in units of log2(e).
struct ScoreParams {
  float cap;            // score = cap * tanh(score / cap), 0: none
  const float* slopes;  // [num_heads] score += slope * (position of key - of query), or null: ALiBi
  const float* sinks;   // [num_heads] a score that takes part in the sum of weights alone, or null

  bool changes_scores() const { return cap != 0 || slopes != nullptr; }
};

struct AttentionParams {
  const void* q;
  KvLayerView kv;
  int64_t num_heads;
  int64_t true_dim;  // of a head's result; the kept head may be wider
  AttentionRule rule;
  int64_t split;  // which of the header's splits is of this rule
  ScoreParams scores;
  Activation out;  // num_columns = num_heads * true_dim, where true_dim is a multiple of 32; else
  float* rows;     // [num_tokens, stride], and the activation is not written
  int64_t stride;
  const AttentionPartial*
      partials;  // one a member: of the tile that this member is the first to work on
};

struct LinearAddParams {
  LinearParams linear;
  float factor;  // x += factor * product
  float* x;      // [num_tokens, num_rows]
};

// An activation function; xIELU has two numbers of its own.
struct MlpFunction {
  MlpActivation kind;
  float positive = 0;
  float negative = 0;
};

// The half of an MLP that has no gate: f(in @ W.T (+ bias)).
struct UpParams {
  LinearParams linear;
  MlpFunction function;
  Activation out;
};

struct GateUpParams {
  LinearParams linear;  // strips of a gate panel and an up panel
  MlpFunction function;
  Activation out;
  float* rows;  // [num_tokens, stride] instead of the activation, or null
  int64_t stride;
  ClampedGate clamped = {};
};

// The same from rows that are there: f(gate) * up.
struct ActMulParams {
  const float* gate;  // [num_tokens, out.num_columns]
  const float* up;
  MlpFunction function;
  Activation out;
};

// A product of every expert: its weight, bias and input are put in as an expert's turn comes.
struct ExpertProduct {
  LinearParams linear;
  ExpertMatrices matrices;
};

// Adds to the residual what a token's experts make of the activation:
// x += factor * sum of weight * down(f(gate) * up).
struct ExpertsAddParams {
  Choice choice;
  Activation in;
  bool is_private;           // of few tokens each member has a copy of the input
  ExpertProduct gate_up[2];  // one, or gate and up apart where their formats differ
  int32_t num_parts;
  ExpertProduct down;
  MlpFunction function;
  ClampedGate clamped;
  Activation
      gathered;  // room for so many tiles of rows of `in`, and of the input of `down`: a pass
  Activation inner;
  int64_t num_tiles;
  float* gates;         // of two parts: a member's [tokens][32]
  int64_t gate_floats;  // between members
  float factor;
  float* x;  // [num_tokens, columns of down's weight]
};

// x += factor * sigmoid(gate) * rows, of each token one gate.
struct GatedAddParams {
  const float* rows;  // [num_tokens, num_columns]
  const float* gate;  // [num_tokens, gate_stride], of which the first counts
  int64_t gate_stride;
  int64_t num_columns;
  float factor;
  float* x;  // [num_tokens, num_columns]
};

// What adapters make of a product's input: its inner values, which the product then reads.
struct ShrinkParams {
  LinearParams linear;
};

struct LogitsParams {
  LinearParams linear;
  float* logits;  // [num_rows, vocab_size]
  int64_t vocab_size;
  float scale;  // on every logit
  float cap;    // logits = cap * tanh(logits / cap), 0: none
};

// A set of kernels: what one instruction set does, in which pieces. Each kernel does the member's
// part of the operator.
template <class Params>
using StepFunction = void (*)(const Params& params, const StepHeader& step, int member,
                              int num_members);

struct Kernels {
  const char* name;
  // How products of bf16 round: sets that have the same agree to the bit in all that they compute.
  const char* arithmetic;
  int64_t tile_tokens;  // of an activation
  // Rows of queries that attend together, by the cache's precision.
  int64_t (*attention_rows)(Precision precision);
  StepFunction<EmbedParams> embed;
  StepFunction<NormParams> norm;
  StepFunction<NormAddParams> norm_add;
  StepFunction<PackParams> pack;
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
  StepFunction<LogitsParams> logits;
  StepFunction<ShrinkParams> shrink;
  StepFunction<RouteParams> route;
  StepFunction<ExpertsAddParams> experts_add;
  StepFunction<GatedAddParams> gated_add;
  StepFunction<ShortConvParams> short_conv;
  StepFunction<SelectiveScanParams> selective_scan;
  StepFunction<DeltaRuleParams> delta_rule;
  StepFunction<GatedNormParams> gated_norm;
  // Work memory of a member, in floats, for a product's units of so many strips.
  int64_t (*scratch_floats)(const PackedMatrix& weight, Precision precision, int64_t unit_strips);
  // Does the inner product's instruction so many times on all registers, for measuring its peak;
  // returns the operations, two a multiply-add.
  double (*spin)(Precision precision, int64_t times);
  RowPasses rows;  // what sampling is made of
};

// Whether what is read from memory is best fetched into the first level of cache, see stream.h.
extern const bool kStreamsIntoL1;

// How far ahead of its use a panel is fetched into the second level, in bytes; a K-quant's apart.
constexpr int64_t kStreamDistance = 5120;
extern const int64_t kSuperDistance;

// Tokens of context whose softmax is taken at once. Chunks begin at multiples of it whatever the
// batch, which is why a split does not change a bit.
constexpr int64_t kChunkTokens = 256;

// How a model's heads attend: queries share KV heads, and `tile_rows` of them each read.
struct HeadSplit {
  int64_t num_heads;
  int64_t num_kv_heads;
  int64_t tile_rows;

  int64_t group() const { return num_heads / num_kv_heads; }
  bool operator==(const HeadSplit& other) const {
    return num_heads == other.num_heads && num_kv_heads == other.num_kv_heads &&
           tile_rows == other.tile_rows;
  }
};

// Divides a step's attention among members by the positions of context that they read under this
// rule: `split` gets num_members + 1 points.
void split_attention(const StepHeader& step, const AttentionRule& rule, const HeadSplit& heads,
                     int num_members, AttentionPoint* split);

}  // namespace tgi::cpu::step
