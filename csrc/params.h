// One plain struct an operator, shared by the CPU and the CUDA kernels: pointers, int64 sizes and
// strides in elements. The bindings (or the recorded program) have checked everything that a kernel
// trusts.
#pragma once

#include <cstdint>

namespace tgi {

// What a pool of keys and values holds; also the storage type of other 16- or 32-bit float buffers.
enum class FloatType : int32_t { kFloat32 = 0, kBfloat16 = 1 };

struct EmbedParams {
  const int32_t* ids;  // [num_tokens], each in [0, rows of table)
  const void* table;   // [rows, hidden] of table_type
  float* out;          // [num_tokens, hidden]
  int64_t hidden;
  FloatType table_type;
};

struct RmsNormParams {
  const float* x;       // [num_tokens, hidden]
  const float* weight;  // [hidden]
  const int32_t* rows;  // [num_rows] rows of x to take, or null: all in order
  float* out;           // [num_rows, hidden]
  int64_t hidden;
  float eps;
};

// Neox rotation: dimension i turns with i + rotary_dim / 2; those from rotary_dim on pass
// unchanged.
struct RopeParams {
  const float* qkv;          // [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim]
  const int32_t* positions;  // [num_tokens], each below the tables' length
  const int64_t* slots;      // [num_tokens] block * block_size + offset, each in the pool
  const float* cos;          // [max_positions, rotary_dim / 2]
  const float* sin;          // the same
  float* q;                  // [num_tokens, num_heads, head_dim]
  void* kv;                  // a layer's part of the pool, see cpu/kv_layout.h
  int64_t num_heads;
  int64_t num_kv_heads;
  int64_t head_dim;
  int64_t rotary_dim;
  int64_t block_stride;  // of kv
  int64_t block_size;
  FloatType kv_type;
};

struct AttentionParams {
  const float* q;              // [num_tokens, num_heads, head_dim]
  const void* kv;              // a layer's part of the pool, see cpu/kv_layout.h
  const int32_t* query_start;  // [num_sequences + 1], ascending from 0 to num_tokens
  const int32_t* context_len;  // [num_sequences], the queries' own positions included
  const int32_t* block_table;  // [num_sequences, block_table_stride]
  float* out;                  // [num_tokens, num_heads, head_dim]
  int64_t num_sequences;
  int64_t num_heads;
  int64_t num_kv_heads;
  int64_t head_dim;      // multiple of 16, at most 256
  int64_t block_stride;  // of kv
  int64_t block_size;    // 16, 32 or 64
  int64_t block_table_stride;
  float scale;
  FloatType kv_type;
};

enum class Activation : int32_t { kSilu = 0, kGeluTanh = 1 };

struct ActMulParams {
  const float* gate_up;  // [num_tokens, 2 * intermediate]: gate, then up
  float* out;            // [num_tokens, intermediate]
  int64_t intermediate;
  Activation activation;
};

// One slot's sampling parameters and place; tgi_asgi/ops/sample_state.py has the same record in
// numpy.
struct SampleSlot {
  float temperature;  // 0: greedy
  int32_t top_k;      // 0: off
  float top_p;        // (0, 1]
  float min_p;        // [0, 1]
  float typical_p;    // (0, 1]
  float repetition_penalty;
  float frequency_penalty;
  float presence_penalty;
  uint64_t seed;
  int64_t position;      // of the token to be drawn next
  int64_t masked_until;  // the masked ids cannot be drawn at positions below this one
  int32_t choice;
  int32_t last_id;  // drawn last
  int32_t num_biased;
  int32_t num_masked;
  int32_t num_top;  // top log-probabilities wanted
  int32_t flags;    // SampleFlag bits
};
static_assert(sizeof(SampleSlot) == 80, "the record is shared with numpy");

enum SampleFlag : int32_t {
  kWantsLogprobs = 1,
  kIsProcessed = 2,  // log-probabilities of the distribution drawn from; else of the raw logits
};

struct SampleParams {
  const float* logits;         // [num_rows, vocab]
  const int32_t* slots;        // [num_rows], all different
  SampleSlot* records;         // [num_slots]
  int32_t* counts;             // [num_slots, vocab]: 2 * count in the output + (1 if in the prompt)
  const int32_t* biased_ids;   // [num_slots, biased_stride], each in [0, vocab)
  const float* biased_values;  // the same shape
  const int32_t* masked_ids;   // [num_slots, masked_stride], each in [0, vocab)
  const int32_t* mask;         // [num_rows, ceil(vocab / 32)] bits, set where allowed; or null
  int32_t* token_ids;          // [num_rows]
  bool* is_finite;             // [num_rows]
  float* logprobs;             // [num_rows]
  int32_t* top_ids;            // [num_rows, max_top]
  float* top_logprobs;         // [num_rows, max_top]
  int32_t* num_top;            // [num_rows] entries filled
  int64_t vocab;
  int64_t biased_stride;
  int64_t masked_stride;
  int64_t max_top;
};

struct TokenLogprobsParams {
  const float* logits;       // [num_rows, vocab]
  const int32_t* token_ids;  // [num_rows], each in [0, vocab)
  float* logprobs;           // [num_rows]
  int32_t* top_ids;          // [num_rows, num_top]
  float* top_logprobs;       // [num_rows, num_top]
  int64_t vocab;
  int64_t num_top;
};

}  // namespace tgi
