// Parameter structs shared by the CPU and CUDA kernels: plain structs of pointers, and of int64
// sizes and strides in elements. The bindings (or the recorded program) check everything that a
// kernel relies on.
#pragma once

#include <cstdint>

namespace tgi {

enum class MlpActivation : int32_t {
  kSilu = 0,
  kGeluTanh = 1,
  kGelu = 2,
  kRelu = 3,
  kReluSquared = 4,
  kXielu = 5,  // with two learned numbers
};

// The sampling parameters and position of one slot; tgi_asgi/ops/sample_state.py defines the same
// record in numpy.
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
  int64_t position;      // of the next token to sample
  int64_t masked_until;  // masked ids cannot be sampled at positions below this one
  int32_t choice;
  int32_t last_id;  // the last sampled token
  int32_t num_biased;
  int32_t num_masked;
  int32_t num_top;  // number of top log-probabilities wanted
  int32_t flags;    // SampleFlag bits
};
static_assert(sizeof(SampleSlot) == 80, "the record is shared with numpy");

enum SampleFlag : int32_t {
  kWantsLogprobs = 1,
  kIsProcessed = 2,  // log-probabilities of the filtered distribution; otherwise of the raw logits
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
  int32_t* num_top;            // [num_rows] number of entries filled in
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
