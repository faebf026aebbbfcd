// The CUDA operators: for each a plain struct of device pointers and sizes, and a launcher that
// returns the launch's error. Activations, queries and the cache are 16 bits wide (the cache may
// have 8), the residual stream is float32. The bindings check everything that a kernel relies on,
// except data on the device: kernels clamp ids and lengths there.
#pragma once

#include <cstdint>

#include "params.h"

#ifdef __CUDACC__
#include <cuda_runtime.h>
#elif defined(TGI_CUDA)
#include <cuda_runtime_api.h>
#else
#include "cuda_emu.h"
#endif

namespace tgi::cuda {

enum class Type : int32_t { kBfloat16 = 0, kFloat16 = 1, kFloat8 = 2 };

// Completes the inputs of a step. Of `num_sequences` sequences, the first `num_decodes` have one
// token each, which are the first of `ids`: their slots' last, where they have one. The block table
// of a sequence is the one that its slot keeps, up to column `table_firsts`; from there on it is
// new, in `entries` from `table_starts` on, and the slot keeps it, too.
struct BeginStepParams {
  const ::tgi::SampleSlot* records;  // [num_slots], or null: no slots
  const int32_t* from_slot;          // [num_decodes]; out of range: the token is in `ids` already
  const int32_t* context_len;        // [num_sequences]
  const int32_t* table_slots;        // [num_sequences], all different; out of range: no table
  const int32_t* table_firsts;       // [num_sequences]
  const int32_t* table_starts;       // [num_sequences]
  const int32_t* entries;            // [num_entries], where indices are clamped to
  int32_t* ids;                      // [num_decodes or more]
  int32_t* kept;                     // [num_tables, stride]
  int32_t* tables;                   // [num_sequences, stride]; written up to `context_len`
  int64_t num_slots;
  int64_t num_decodes;
  int64_t num_sequences;
  int64_t num_entries;  // at least 1
  int64_t num_tables;
  int64_t stride;
  int64_t block_size;
};
cudaError_t begin_step(const BeginStepParams& p, cudaStream_t stream);

struct EmbedParams {
  const int32_t* ids;  // [num_tokens], clamped to the table
  const void* table;   // [num_rows, hidden] of type
  float* out;          // [num_tokens, hidden]
  int64_t num_tokens;
  int64_t num_rows;
  int64_t hidden;  // multiple of 8
  Type type;
};
cudaError_t embed(const EmbedParams& p, cudaStream_t stream);

// RMSNorm, or LayerNorm with a bias. Without `rows`, `out` may be x.
struct NormParams {
  const float* x;       // [num_tokens, hidden]
  const float* weight;  // [hidden]
  const float* bias;    // [hidden], or null
  const int32_t* rows;  // [num_rows] rows of x, clamped; or null: all, in order
  void* out;            // [num_rows, hidden] of type, or float32
  int64_t num_tokens;
  int64_t num_rows;
  int64_t hidden;  // multiple of 8, at most kMaxHidden
  float eps;
  float factor;      // factor of the addend
  int32_t is_wide;   // out is float32
  int32_t is_added;  // add to out, which is float32
  Type type;
};
constexpr int64_t kMaxHidden = 16384;
cudaError_t norm(const NormParams& p, cudaStream_t stream);

// out = f(gate) * up, or f(x) without a gate.
struct ActivateParams {
  const void* x;  // [num_tokens, 2 * intermediate] of type: gate, then up; or [.., intermediate]
  void* out;      // [num_tokens, intermediate] of type
  int64_t num_tokens;
  int64_t intermediate;  // multiple of 8
  MlpActivation activation;
  float above;  // xIELU's two numbers
  float below;
  int32_t is_gated;
  Type type;
};
cudaError_t activate(const ActivateParams& p, cudaStream_t stream);

// The norm of heads (Qwen3), the rotation of dimension i with i + rotary_dim / 2, and the write to
// the cache. Head norms are RMSNorm, or LayerNorm with a bias. The cache of a layer is [num_blocks,
// 2 (key, value), num_kv_heads, block_size, head_dim] of kv_type.
struct RopeParams {
  const void* qkv;           // [num_tokens, num_heads + 2 * num_kv_heads, head_dim] of type
  const int32_t* positions;  // [num_tokens], clamped to the tables
  const int64_t* slots;      // [num_tokens] block * block_size + offset; outside of the pool: not
                             // written
  const float* cos;          // [num_positions, rotary_dim / 2]
  const float* sin;          // the same
  const float* q_norm;       // [head_dim] or [num_heads, head_dim], or null: no norm
  const float* k_norm;       // the same for keys
  const float* q_bias;       // like q_norm, or null
  const float* k_bias;
  void* q;  // [num_tokens, num_heads, head_dim] of type
  void* kv;
  int64_t num_tokens;
  int64_t num_positions;
  int64_t num_heads;
  int64_t num_kv_heads;
  int64_t head_dim;    // multiple of 16
  int64_t rotary_dim;  // multiple of 4, at most head_dim
  int64_t num_blocks;
  int64_t block_size;
  int64_t norm_stride;   // elements between the norms of two heads: head_dim, or 0 if all share one
  int32_t is_norm_last;  // heads are normalised after the rotation (Hunyuan)
  float eps;
  float key_scale;  // keys and values are divided by these; 1 unless the cache is 8 bits wide
  float value_scale;
  Type type;
  Type kv_type;
};
cudaError_t rope_kv_write(const RopeParams& p, cudaStream_t stream);

// A sequence's queries are its last tokens: query i of n sees the last `window` of the positions
// below context_len - n + i + 1.
struct AttentionParams {
  const void* q;               // [num_tokens, num_heads, head_dim] of type
  const void* kv;              // see RopeParams
  const int32_t* query_start;  // [num_sequences + 1]; unused by decode, which has one token per
                               // sequence
  const int32_t* context_len;  // [num_sequences], queries included; 0: padding, output is 0
  const int32_t* block_table;  // [num_sequences, block_table_stride], clamped to the pool
  void* out;                   // [num_tokens, num_heads, head_dim] of type
  const float* sinks;          // [num_heads] attention sinks: scores without a value, or null
  const float* slopes;         // [num_heads] ALiBi slopes, or null
  int32_t* plan;               // decode: [num_sequences + 1], written by attention_plan
  void* workspace;             // decode: attention_workspace_bytes
  int64_t num_tokens;
  int64_t num_sequences;
  int64_t max_query_len;  // prefill: maximum over the sequences
  int64_t num_heads;
  int64_t num_kv_heads;  // divides num_heads; decode: at most 16 heads share one
  int64_t head_dim;      // 64, 80, 96, 128 or 256
  int64_t num_blocks;
  int64_t block_size;  // multiple of 16
  int64_t block_table_stride;
  int64_t window;  // 0: all positions
  float scale;
  float soft_cap;   // scores become soft_cap * tanh(score / soft_cap); 0: off
  float key_scale;  // divisor used when the cache was written
  float value_scale;
  Type type;
  Type kv_type;  // type or kFloat8
};
// For one token per sequence. The plan depends only on the lengths and the window, and serves all
// layers of a step with this window.
cudaError_t attention_plan(const AttentionParams& p, cudaStream_t stream);
cudaError_t attention_decode(const AttentionParams& p, cudaStream_t stream);
cudaError_t attention_prefill(const AttentionParams& p, cudaStream_t stream);
int64_t attention_workspace_bytes(int64_t num_sequences, int64_t block_table_stride,
                                  int64_t block_size, int64_t num_heads, int64_t head_dim);

// A sequence's keys and values in contiguous memory, for a library's attention.
struct AttentionGatherParams {
  const void* kv;              // see RopeParams
  const int32_t* block_table;  // the sequence's row, clamped to the pool
  void* out;                   // [2 (key, value), num_kv_heads, capacity, head_dim] of type
  int64_t context_len;         // the block table has at least its blocks
  int64_t num_rows;  // of each head are written, at most capacity; past context_len: zeros
  int64_t capacity;
  int64_t num_kv_heads;
  int64_t head_dim;  // multiple of 8
  int64_t num_blocks;
  int64_t block_size;
  Type type;
  Type kv_type;  // type or kFloat8
};
cudaError_t attention_gather(const AttentionGatherParams& p, cudaStream_t stream);

// Attention over all keys from that over parts of them, times value_scale.
constexpr int kMaxMergedParts = 16;
struct AttentionMergeParams {
  const void* parts[16];  // kMaxMergedParts, each [num_tokens, num_heads, head_dim] of type
  const float* lses[16];  // log of the sum of exp(score): row h, token t at h * lse_strides + t
  int64_t lse_strides[16];
  void* out;  // [num_tokens, num_heads, head_dim] of type
  int64_t num_parts;
  int64_t num_tokens;
  int64_t num_heads;
  int64_t head_dim;  // multiple of 8
  float value_scale;
  Type type;
};
cudaError_t attention_merge(const AttentionMergeParams& p, cudaStream_t stream);

// out = a W^T (+ bias), or out += that. For few tokens: above 64, each tile of 64 tokens streams W
// again. A token's result does not depend on the other tokens.
struct LinearParams {
  const void* a;       // [num_tokens, num_columns] of type
  const void* weight;  // [num_rows, num_columns] of type
  const float* bias;   // [num_rows], or null
  void* out;           // [num_tokens, num_rows] of type, or float32
  int64_t num_tokens;
  int64_t num_rows;
  int64_t num_columns;  // multiple of 8
  int32_t is_wide;      // out is float32
  int32_t is_added;     // add to out, which is float32
  Type type;
};
cudaError_t linear(const LinearParams& p, cudaStream_t stream);

// A weight is scale * (code - zero) + offset, or scale * code if the codes are floats: E4M3, or
// E2M1 with exponents as scales (E8M0). The order of codes is drawn in codes.cuh.
struct QuantMatrix {
  const void* codes;    // [num_rows, num_columns] of `bits` bits, 16-byte aligned
  const void* scales;   // [num_columns / group, scale_stride] float16, float32 or E8M0, 16-byte
                        // aligned
  const void* offsets;  // the same, or null: none
  int64_t num_rows;
  int64_t num_columns;
  int64_t group;         // columns per group; a multiple of 32 (4 bits) or 16 (8 bits) that divides
                         // num_columns
  int64_t scale_stride;  // num_rows or more, a multiple of 16
  int32_t bits;          // 4 or 8
  int32_t zero;
  int32_t has_wide_scales;
  int32_t has_float_codes;  // 8 bits: E4M3, wide scales, no zero; 4 bits: E2M1, no zero, no offsets
};

struct QuantLinearParams {
  QuantMatrix weight;
  const void* a;       // [num_tokens, num_columns] of type
  const float* bias;   // [num_rows], or null
  void* out;           // [num_tokens, num_rows] of type, or float32
  int64_t num_tokens;  // the codes are read again, from L2, for every 32 tokens
  int32_t is_wide;     // out is float32
  int32_t is_added;    // add to out, which is float32
  Type type;
};
cudaError_t quant_linear(const QuantLinearParams& p, cudaStream_t stream);

struct DequantiseParams {
  QuantMatrix weight;
  void* out;  // [num_rows, num_columns] of type
  Type type;
};
cudaError_t dequantise(const DequantiseParams& p, cudaStream_t stream);

// x as codes times scales, in the layout of torch's products of FP8: one scale per token, or per
// 128 columns of each token, for a number of tokens that is a multiple of kTokenMultiple.
struct QuantiseParams {
  const void* x;   // [num_tokens, num_columns] of type
  uint8_t* codes;  // [num_tokens, num_columns] E4M3, at multiples of 8 bytes
  float* scales;   // [num_tokens], or [num_columns / 128, num_tokens rounded up]
  int64_t num_tokens;
  int64_t num_columns;  // multiple of 8, at most kMaxQuantised; or a multiple of 128
  int32_t has_groups;
  Type type;
};
constexpr int64_t kMaxQuantised = 32768;
constexpr int64_t kTokenMultiple = 4;
cudaError_t quantise(const QuantiseParams& p, cudaStream_t stream);

// Routed experts: `route` selects each token's experts, `experts_plan` sorts the (token, expert)
// pairs by expert, two `experts_product`s compute each pair's gates and ups, then downs, and
// `experts_sum` adds a token's results. A pair is token * top_k + place, and the row of its
// results.
constexpr int64_t kMaxExperts = 1024;  // per layer

enum class RouteKind : int32_t { kSoftmax = 0, kSigmoid = 1, kSparseMixer = 2 };

// See tgi_asgi.ops.RouteSpec.
struct RouteParams {
  const float* logits;      // [num_tokens, num_experts]
  const int64_t* slots;     // [num_tokens] slots of the cache; negative: padding, without experts
  const float* correction;  // [num_experts], or null
  int32_t* ids;             // [num_tokens, top_k] ascending; padding: num_experts
  float* weights;           // [num_tokens, top_k]; padding: 0
  int64_t num_tokens;
  int64_t num_experts;  // at most kMaxExperts
  int64_t top_k;
  int64_t num_groups;  // divides num_experts
  int64_t top_groups;
  int32_t sums_top_two;
  int32_t is_renormalised;
  float eps;
  float scale;
  float jitter;
  RouteKind kind;
};
cudaError_t route(const RouteParams& p, cudaStream_t stream);

// Sorts pairs by expert, in order of tokens, and cuts each expert's pairs into tiles.
struct ExpertsPlanParams {
  const int32_t* ids;  // [num_pairs]; outside of [0, num_experts): in no list
  int32_t* pairs;      // [num_pairs]
  int32_t* tiles;      // [1 + experts_max_tiles, 4]: the number of tiles, then for each its expert,
                       // its first index in `pairs` and its number of pairs; 16-byte aligned
  int64_t num_pairs;   // below 2^31
  int64_t num_experts;  // at most kMaxExperts
  int32_t is_streamed;  // as in the products that use the plan
};
cudaError_t experts_plan(const ExpertsPlanParams& p, cudaStream_t stream);
int64_t experts_max_tiles(int64_t num_pairs, int64_t num_experts, bool is_streamed);

// out = a W^T (+ bias) with each pair's matrix; if gated, f(gate) * up of that. Reads a matrix that
// has pairs once for each of its tiles.
struct ExpertsProductParams {
  QuantMatrix weight;    // of all experts, stacked by rows; `bits` 16: elements of type, no scales
  const void* a;         // [num_pairs / pairs_per_row, num_columns] of type
  const float* bias;     // [num_experts, rows], or null
  const int32_t* pairs;  // of the plan
  const int32_t* tiles;
  void* out;  // [num_pairs, rows], or [num_pairs, rows / 2] if gated, of type; rows of pairs in no
              // list are not written
  int64_t num_pairs;
  int64_t num_experts;
  int64_t pairs_per_row;  // top_k if a has a row per token, 1 if per pair
  int32_t is_gated;       // an expert's rows are its gate, then its up
  int32_t is_streamed;    // one order of additions for any number of pairs
  MlpActivation activation;
  float limit;  // above 0: gates are clamped from above, ups on both sides, and the result is
                // gate * sigmoid(slope * gate) * (up + offset)
  float slope;
  float offset;
  Type type;
};
cudaError_t experts_product(const ExpertsProductParams& p, cudaStream_t stream);

// x += factor * the sum of a token's rows times their weights, in order.
struct ExpertsSumParams {
  const void* rows;      // [num_tokens, top_k, hidden] of type
  const int32_t* ids;    // [num_tokens, top_k]; outside of [0, num_experts): skipped
  const float* weights;  // [num_tokens, top_k]
  float* x;              // [num_tokens, hidden]
  int64_t num_tokens;
  int64_t num_experts;
  int64_t top_k;
  int64_t hidden;  // multiple of 8
  float factor;
  Type type;
};
cudaError_t experts_sum(const ExpertsSumParams& p, cudaStream_t stream);

// x += factor * rows
struct ResidualAddParams {
  const void* rows;      // [num_elements] of type
  float* x;              // [num_elements]
  int64_t num_elements;  // multiple of 8
  float factor;
  Type type;
};
cudaError_t residual_add(const ResidualAddParams& p, cudaStream_t stream);

// x += factor * sigmoid(gate) * rows
struct GatedAddParams {
  const float* rows;  // [num_tokens, hidden]
  const float* gate;  // [num_tokens]
  float* x;           // [num_tokens, hidden]
  int64_t num_tokens;
  int64_t hidden;  // multiple of 4
  float factor;
};
cudaError_t gated_add(const GatedAddParams& p, cudaStream_t stream);

// A product's adapters: a pool of slots with one adapter each, and the slot of each token. An
// adapter has matrices of its own rank: down [pieces * rank, num_columns], then up [rows, rank].
// Pieces are the matrices stacked in a product, such as q, k and v: three at most.
struct LoraProduct {
  const int32_t* adapters;  // [num_tokens] slot of each token's adapter; outside of the pool: none
  const int32_t* places;    // [num_slots, num_products, 2] the rank, a multiple of 8 or 0 for no
                            // change, and where the matrices begin in the slot, in 8 elements
  const void* pool;         // [num_slots, slot_stride] of type
  int64_t num_tokens;
  int64_t num_slots;
  int64_t num_products;
  int64_t product;      // index of this one
  int64_t slot_stride;  // multiple of 8
  int64_t num_columns;  // multiple of 8
  int64_t rank;         // maximum of an adapter, a multiple of 8
  Type type;
};

// inner = down x, of the tokens with an adapter; inner values beyond its rank are not written.
struct LoraDownParams {
  LoraProduct product;
  const void* x;      // [num_tokens, num_columns] of type
  float* inner;       // [num_tokens, num_inner]
  int64_t num_inner;  // `rank` for each piece
};
cudaError_t lora_down(const LoraDownParams& p, cudaStream_t stream);

// out += factor * (up inner), of the tokens with an adapter. Rows from first_end use the inner
// values of the product's second piece, rows from second_end those of the third.
struct LoraUpParams {
  LoraProduct product;
  const float* inner;  // [num_tokens, num_inner]
  void* out;           // [num_tokens, num_rows] of type, or float32
  int64_t num_rows;    // even, and so are the ends
  int64_t num_inner;
  int64_t first_end;
  int64_t second_end;
  float factor;
  int32_t is_wide;  // out is float32
};
cudaError_t lora_up(const LoraUpParams& p, cudaStream_t stream);

// A row whose slot is outside of [0, num_slots) is padding: it samples 0 and changes nothing.
struct SampleParams {
  ::tgi::SampleParams base;  // its mask is [num_masks, ceil(vocab / 32)], or null
  const int32_t* mask_rows;  // [num_rows] each row's index in the mask; out of range: no mask
  float* scratch;            // [num_rows, vocab]
  void* workspace;           // sample_workspace_bytes, 16-byte aligned
  int64_t num_masks;
  int64_t num_rows;
  int64_t num_slots;
};
constexpr int64_t kMaxSampledRows = 65535;
cudaError_t sample(const SampleParams& p, cudaStream_t stream);
int64_t sample_workspace_bytes(int64_t num_rows);

// Slots to sample from after drafts. All arrays have spare slots behind those of the sequences.
// Before `sample`, draft_slots makes spare slots copies of a sequence's as if it had sampled its
// drafts up to the spare's; after it, accept_drafts moves the sequence's slot on to the last copy
// whose drafts have all been sampled:
//
//     slot 5, drafts a b     spare 0: slot 5, then a     spare 1: slot 5, then a b
//     sampled  a                      x                           y
//     slot 5 has sampled a x, because x is not b; nothing is left of y
//
// Spares whose slot is no sequence's are not used.
struct DraftSlotsParams {
  ::tgi::SampleSlot* records;  // [num_slots + num_spares]
  int32_t* counts;             // [num_slots + num_spares, vocab]
  int32_t* biased_ids;         // [num_slots + num_spares, biased_stride]
  float* biased_values;        // the same shape
  int32_t* masked_ids;         // [num_slots + num_spares, masked_stride]
  const int32_t* slots;   // [num_spares] the sequence's slot; its spares are adjacent, in order
  const int32_t* ahead;   // [num_spares] 1 for a sequence's first draft, 2 for the next, ...
  const int32_t* drafts;  // [num_spares] token ids
  int64_t num_slots;
  int64_t num_spares;
  int64_t vocab;
  int64_t biased_stride;
  int64_t masked_stride;
};
cudaError_t draft_slots(const DraftSlotsParams& p, cudaStream_t stream);
cudaError_t accept_drafts(const DraftSlotsParams& p, cudaStream_t stream);

struct TokenLogprobsParams {
  ::tgi::TokenLogprobsParams base;
  int64_t num_rows;
};
cudaError_t token_logprobs(const TokenLogprobsParams& p, cudaStream_t stream);

}  // namespace tgi::cuda
