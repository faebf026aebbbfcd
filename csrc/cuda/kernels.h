// The CUDA operators: one plain struct of device pointers and sizes each, and a launcher that
// returns the launch's error. Activations, queries and the cache are 16 bits wide here (or 8, the
// cache), the residual is float32. The bindings check everything a kernel trusts, but for what lies
// on the device: ids and lengths there are clamped.
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

// Lets kernels of a step begin while the one before still runs, where the device can; off at first.
void set_dependent_launches(bool is_on);

enum class Type : int32_t { kBfloat16 = 0, kFloat16 = 1, kFloat8 = 2 };

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

// RMSNorm, or with a bias LayerNorm. Without `rows`, `out` may be x.
struct NormParams {
  const float* x;       // [num_tokens, hidden]
  const float* weight;  // [hidden]
  const float* bias;    // [hidden], or null
  const int32_t* rows;  // [num_rows] rows of x, clamped; or null: all in order
  void* out;            // [num_rows, hidden] of type, or float32
  int64_t num_tokens;
  int64_t num_rows;
  int64_t hidden;  // multiple of 8, at most kMaxHidden
  float eps;
  float factor;      // of what is added
  int32_t is_wide;   // out is float32
  int32_t is_added;  // to what out holds, which is float32
  Type type;
};
constexpr int64_t kMaxHidden = 16384;
cudaError_t norm(const NormParams& p, cudaStream_t stream);

// out = f(gate) * up, or f(x) where there is no gate.
struct ActivateParams {
  const void* x;  // [num_tokens, 2 * intermediate] of type: gate, then up; or [.., intermediate]
  void* out;      // [num_tokens, intermediate] of type
  int64_t num_tokens;
  int64_t intermediate;  // multiple of 8
  MlpActivation activation;
  float above;  // xIELU's
  float below;
  int32_t is_gated;
  Type type;
};
cudaError_t activate(const ActivateParams& p, cudaStream_t stream);

// The norm of heads (Qwen3), the rotation of dimension i with i + rotary_dim / 2, and the write
// into the cache. Norms of heads are RMSNorm, or with a bias LayerNorm. The cache of a layer is
// [num_blocks, 2 (key, value), num_kv_heads, block_size, head_dim] of kv_type.
struct RopeParams {
  const void* qkv;           // [num_tokens, num_heads + 2 * num_kv_heads, head_dim] of type
  const int32_t* positions;  // [num_tokens], clamped to the tables
  const int64_t* slots;  // [num_tokens] block * block_size + offset; out of the pool: not written
  const float* cos;      // [num_positions, rotary_dim / 2]
  const float* sin;      // the same
  const float* q_norm;   // [head_dim] or [num_heads, head_dim], or null: heads are not normed
  const float* k_norm;   // the same of keys
  const float* q_bias;   // as q_norm, or null
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
  int64_t
      norm_stride;  // elements from one head's norm to the next: head_dim, or 0 for all the same
  int32_t is_norm_last;  // heads are normed once they are rotated (Hunyuan)
  float eps;
  float key_scale;  // keys and values are divided by these: 1 unless the cache is 8 bits wide
  float value_scale;
  Type type;
  Type kv_type;
};
cudaError_t rope_kv_write(const RopeParams& p, cudaStream_t stream);

// A sequence's queries are its last tokens: query i of n sees the positions below context_len - n +
// i + 1, and of these the last `window`.
struct AttentionParams {
  const void* q;               // [num_tokens, num_heads, head_dim] of type
  const void* kv;              // see RopeParams
  const int32_t* query_start;  // [num_sequences + 1]; decode does not read it: one token a sequence
  const int32_t* context_len;  // [num_sequences], queries included; 0: padding, output is 0
  const int32_t* block_table;  // [num_sequences, block_table_stride], clamped to the pool
  void* out;                   // [num_tokens, num_heads, head_dim] of type
  const float* sinks;          // [num_heads] scores that have no value, or null
  const float* slopes;         // [num_heads] of ALiBi, or null
  int32_t* plan;               // decode: [num_sequences + 1], which attention_plan writes
  void* workspace;             // decode: attention_workspace_bytes
  int64_t num_tokens;
  int64_t num_sequences;
  int64_t max_query_len;  // prefill: of any sequence
  int64_t num_heads;
  int64_t num_kv_heads;  // divides num_heads; decode: at most 16 heads share one
  int64_t head_dim;      // 64, 80, 96, 128 or 256
  int64_t num_blocks;
  int64_t block_size;  // multiple of 16
  int64_t block_table_stride;
  int64_t window;  // 0: all positions
  float scale;
  float soft_cap;   // of scores: they become soft_cap * tanh(score / soft_cap); 0: they do not
  float key_scale;  // what was divided by when the cache was written
  float value_scale;
  Type type;
  Type kv_type;  // type or kFloat8
};
// One token a sequence. The plan depends on the lengths and the window only and serves all layers
// of a step that have this window.
cudaError_t attention_plan(const AttentionParams& p, cudaStream_t stream);
cudaError_t attention_decode(const AttentionParams& p, cudaStream_t stream);
cudaError_t attention_prefill(const AttentionParams& p, cudaStream_t stream);
int64_t attention_workspace_bytes(int64_t num_sequences, int64_t block_table_stride,
                                  int64_t block_size, int64_t num_heads, int64_t head_dim);

// out = a W^T (+ bias), or that is added to out. For few tokens: more are computed in tiles of 64,
// each of which streams W. A token's result does not depend on the others.
struct LinearParams {
  const void* a;       // [num_tokens, num_columns] of type
  const void* weight;  // [num_rows, num_columns] of type
  const float* bias;   // [num_rows], or null
  void* out;           // [num_tokens, num_rows] of type, or float32
  int64_t num_tokens;
  int64_t num_rows;
  int64_t num_columns;  // multiple of 8
  int32_t is_wide;      // out is float32
  int32_t is_added;     // to what out holds, which is float32
  Type type;
};
cudaError_t linear(const LinearParams& p, cudaStream_t stream);

// A weight is scale * (code - zero) + offset, or of codes that are floats (E4M3) scale * code;
// codes lie in the order of the columns, the first in the low bits.
struct QuantMatrix {
  const void* codes;    // [num_rows, num_columns] of `bits` bits, 16-byte aligned
  const void* scales;   // [num_rows, num_columns / group] float16, or float32
  const void* offsets;  // the same, or null: none
  int64_t num_rows;
  int64_t num_columns;
  int64_t group;  // columns; a multiple of 32 (4 bits) or 16 (8 bits) that divides num_columns
  int32_t bits;   // 4 or 8
  int32_t zero;
  int32_t has_wide_scales;
  int32_t has_float_codes;  // 8 bits, wide scales, no zero
};

struct QuantLinearParams {
  QuantMatrix weight;
  const void* a;       // [num_tokens, num_columns] of type
  const float* bias;   // [num_rows], or null
  void* out;           // [num_tokens, num_rows] of type, or float32
  int64_t num_tokens;  // the codes are read again for every eight
  int32_t is_wide;     // out is float32
  Type type;
};
cudaError_t quant_linear(const QuantLinearParams& p, cudaStream_t stream);

struct DequantiseParams {
  QuantMatrix weight;
  void* out;  // [num_rows, num_columns] of type
  Type type;
};
cudaError_t dequantise(const DequantiseParams& p, cudaStream_t stream);

// A row of slots outside of [0, num_slots) is padding: it draws 0 and changes nothing.
struct SampleParams {
  ::tgi::SampleParams base;  // its mask is [num_masks, ceil(vocab / 32)], or null
  const int32_t* mask_rows;  // [num_rows]: each row's own in the mask; if that is none, it has none
  float* scratch;            // [num_rows, vocab]
  void* workspace;           // sample_workspace_bytes, 16-byte aligned
  int64_t num_masks;
  int64_t num_rows;
  int64_t num_slots;
};
constexpr int64_t kMaxSampledRows = 65535;
cudaError_t sample(const SampleParams& p, cudaStream_t stream);
int64_t sample_workspace_bytes(int64_t num_rows);

struct TokenLogprobsParams {
  ::tgi::TokenLogprobsParams base;
  int64_t num_rows;
};
cudaError_t token_logprobs(const TokenLogprobsParams& p, cudaStream_t stream);

}  // namespace tgi::cuda
