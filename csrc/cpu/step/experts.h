// Routed experts: which experts a token selects, and one MLP per expert. Plain structs, as in
// step.h.
//
//   a token's routing      3: experts 5, 1    7: experts 1, 2        top_k = 2, best first
//   sorted by expert       1: tokens 3, 7     2: token 7     5: token 3
//
// An expert's tokens are in order, so sampled tokens come before prompt tokens.
//
// Source: Shazeer et al., Outrageously Large Neural Networks: The Sparsely-Gated Mixture-of-Experts
// Layer, arXiv 1701.06538; Fedus et al., Switch Transformers, arXiv 2101.03961.
#pragma once

#include <cstdint>

#include "packed.h"

namespace tgi::cpu::step {

constexpr int64_t kMaxExperts = 1024;  // per layer

// How a router's logits become scores.
enum class RouteKind : int32_t {
  kSoftmax,
  kSigmoid,
  // For each chosen expert, a softmax over itself and the experts not chosen yet, limited to those
  // whose logits are close to its own: Liu et al., GRIN: GRadient-INformed MoE, arXiv 2409.12136.
  kSparseMixer,
};

// One expert's part of the sorted lists.
struct ExpertTokens {
  int32_t expert;
  int32_t first;
  int32_t num_tokens;
  int32_t num_sampled;  // sampled tokens, which come first; the rest are prompt tokens
};

// The experts selected by a step's tokens.
struct ExpertRouting {
  int64_t num_experts, top_k;
  int32_t* ids;           // [tokens, top_k]; ids of num_experts or above are ignored
  float* weights;         // [tokens, top_k]
  int32_t* tokens;        // [tokens * top_k], grouped by expert
  float* token_weights;   // same shape
  ExpertTokens* experts;  // [num_experts]; the first `num_used` have tokens, ascending
  int64_t* num_used;
};

// Sorts the `ids` of `num_tokens` tokens by expert.
void sort_by_expert(const ExpertRouting& routing, int64_t num_tokens, int64_t num_sampled);

struct RouteParams {
  const float* logits;  // [num_tokens, stride]
  int64_t stride;
  RouteKind kind;
  const float* correction;  // [num_experts], added to scores only for the selection, or null
  int64_t num_groups;       // of neighbouring experts; only the best `top_groups` compete
  int64_t top_groups;
  bool sums_top_two;  // a group's score is the sum of its two best experts, else its best expert
  bool is_renormalised;
  float eps;                   // added to the sum that divides the weights
  float scale;                 // factor on the weights
  float jitter;                // for kSparseMixer
  const float* expert_scales;  // [num_experts], another factor on each expert's weight, or null
  ExpertRouting out;
};

// Clamped gate and up values: gate is limited to `limit` from above, up on both sides. The result
// is gate * sigmoid(slope * gate) * (up + offset). A limit of 0 disables this.
struct ClampedGate {
  float limit = 0;
  float slope = 1;
  float offset = 0;
};

// The matrices of all experts for one product.
struct ExpertMatrices {
  const PackedMatrix* weights;  // [num_experts], all of the same shape
  const float* const* biases;   // [num_experts] in packed order, or null
};

}  // namespace tgi::cpu::step
