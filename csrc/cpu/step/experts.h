// Routed experts: which experts a token goes to, and an MLP of each. Plain structs, as in step.h.
//
//   a token's choice       3: experts 5, 1    7: experts 1, 2        top_k = 2, in order of choice
//   sorted by expert       1: tokens 3, 7     2: token 7     5: token 3
//
// An expert's tokens are in order, so those that were drawn come before those of prompts.
//
// Source: Shazeer et al., Outrageously Large Neural Networks: The Sparsely-Gated Mixture-of-Experts
// Layer, arXiv 1701.06538; Fedus et al., Switch Transformers, arXiv 2101.03961.
#pragma once

#include <cstdint>

#include "packed.h"

namespace tgi::cpu::step {

constexpr int64_t kMaxExperts = 1024;  // of a layer

// How scores are made of a router's logits.
enum class RouteKind : int32_t {
  kSoftmax,
  kSigmoid,
  // Of each expert the softmax over itself, those not yet chosen, and of these only those whose
  // logit is near its own: Liu et al., GRIN: GRadient-INformed MoE, arXiv 2409.12136.
  kSparseMixer,
};

// One expert's part of the sorted lists.
struct ExpertTokens {
  int32_t expert;
  int32_t first;
  int32_t num_tokens;
  int32_t num_drawn;  // the first so many; the others are prompts'
};

// What a step's tokens go to.
struct Choice {
  int64_t num_experts, top_k;
  int32_t* ids;           // [tokens, top_k], below num_experts; others are no expert
  float* weights;         // [tokens, top_k]
  int32_t* tokens;        // [tokens * top_k], expert after expert
  float* token_weights;   // the same
  ExpertTokens* experts;  // [num_experts], of which the first `num_used` have tokens, ascending
  int64_t* num_used;
};

// Sorts `ids` of so many tokens by expert.
void sort_by_expert(const Choice& choice, int64_t num_tokens, int64_t num_drawn);

struct RouteParams {
  const float* logits;  // [num_tokens, stride]
  int64_t stride;
  RouteKind kind;
  const float* correction;  // [num_experts], added to scores for the choice alone, or null
  int64_t num_groups;       // of neighbours, of which the best `top_groups` are looked at; 1: none
  int64_t top_groups;
  bool adds_two_best;  // a group is as good as its two best experts together, else as its best
  bool is_renormalised;
  float eps;     // added to the sum that weights are divided by
  float scale;   // on weights
  float jitter;  // of kSparseMixer
  Choice out;
};

// A gate's and an up's values are first bounded: gate by `limit` from above, up on both sides. Then
// gate * sigmoid(slope * gate) * (up + offset). A limit of 0: none of this.
struct ClampedGate {
  float limit = 0;
  float slope = 1;
  float offset = 0;
};

// A product of every expert.
struct ExpertMatrices {
  const PackedMatrix* weights;  // [num_experts], all of one shape
  const float* const* biases;   // [num_experts] in packed order, or null
};

}  // namespace tgi::cpu::step
