// Selects each token's experts and computes their weights. Included only by the step_<isa>.cpp
// files.
#pragma once

#include <cmath>
#include <limits>

#include "../team.h"
#include "simd_math.h"
#include "step.h"

namespace tgi::cpu::step {
namespace {

// Up to this many tokens are routed by a single member, which is cheaper than a barrier.
constexpr int64_t kSingleMemberTokens = 4;

constexpr float kNever = -std::numeric_limits<float>::infinity();

inline float largest(const float* values, int64_t size) {
  float found = values[0];
  for (int64_t i = 1; i < size; ++i) found = values[i] > found ? values[i] : found;
  return found;
}

// Computes e^(logits - top), zero past the last; returns the sum. Reads and writes whole vectors.
template <class S>
inline float exp_shifted(const float* logits, int64_t size, float top, float* out) {
  auto sum = S::zero();
  for (int64_t i = 0; i < size; i += 16) {
    const auto x = S::mul(S::sub(S::load(logits + i), S::set1(top)), S::set1(kFloatLog2E));
    auto power = exp2<S, false>(x);
    if (size - i < 16) power = S::select_head(static_cast<int>(size - i), power, S::zero());
    S::store(out + i, power);
    sum = S::add(sum, power);
  }
  return S::reduce_add(sum);
}

template <class S>
inline void make_scores(const RouteParams& p, const float* logits, float* scores) {
  const int64_t size = p.out.num_experts;
  if (p.kind == RouteKind::kSoftmax) {
    const auto factor = S::set1(1.0f / exp_shifted<S>(logits, size, largest(logits, size), scores));
    for (int64_t i = 0; i < size; i += 16)
      S::store(scores + i, S::mul(S::load(scores + i), factor));
    return;
  }
  const auto one = S::set1(1.0f);
  for (int64_t i = 0; i < size; i += 16) {
    const auto e = exp2<S, false>(S::mul(S::load(logits + i), S::set1(-kFloatLog2E)));
    S::store(scores + i, S::div(one, S::add(one, e)));
  }
}

// Finds the `count` best of `size` keys, best first; among equals the lowest id wins.
inline void best_of(const float* keys, int64_t size, int64_t count, int32_t* ids) {
  int64_t found = 0;
  for (int64_t i = 0; i < size; ++i) {
    int64_t place = found < count ? found : count - 1;
    if (found == count && !(keys[i] > keys[ids[place]])) continue;
    for (; place > 0 && keys[i] > keys[ids[place - 1]]; --place) ids[place] = ids[place - 1];
    ids[place] = static_cast<int32_t>(i);
    found += found < count;
  }
}

// Returns the score of a group of experts.
inline float group_score(const float* keys, int64_t size, bool sums_top_two) {
  if (!sums_top_two || size == 1) return largest(keys, size);
  int32_t best[2];
  best_of(keys, size, 2, best);
  return keys[best[0]] + keys[best[1]];
}

// Keeps only the keys of the best groups.
inline void keep_groups(const RouteParams& p, float* keys) {
  const int64_t size = p.out.num_experts / p.num_groups;
  float scores[kMaxExperts];
  int32_t best[kMaxExperts];
  bool is_selected[kMaxExperts] = {};
  for (int64_t g = 0; g < p.num_groups; ++g) {
    scores[g] = group_score(keys + g * size, size, p.sums_top_two);
  }
  best_of(scores, p.num_groups, p.top_groups, best);
  for (int64_t i = 0; i < p.top_groups; ++i) is_selected[best[i]] = true;
  for (int64_t i = 0; i < p.out.num_experts; ++i) {
    if (!is_selected[i / size]) keys[i] = kNever;
  }
}

// scores: of experts, in whole vectors. A NaN score counts as the best, so it reaches the logits
// and is detected there.
inline void select_experts(const RouteParams& p, const float* scores, int32_t* ids,
                           float* weights) {
  const int64_t size = p.out.num_experts, top_k = p.out.top_k;
  float keys[kMaxExperts];
  for (int64_t i = 0; i < size; ++i) {
    const float key = p.correction == nullptr ? scores[i] : scores[i] + p.correction[i];
    keys[i] = key == key ? key : -kNever;
  }
  if (p.top_groups < p.num_groups) keep_groups(p, keys);
  best_of(keys, size, top_k, ids);
  float sum = 0;
  for (int64_t i = 0; i < top_k; ++i) sum += weights[i] = scores[ids[i]];
  const float factor = p.is_renormalised ? p.scale / (sum + p.eps) : p.scale;
  for (int64_t i = 0; i < top_k; ++i) weights[i] *= factor;
}

template <class S>
inline void sparse_mixer(const RouteParams& p, const float* logits, int32_t* ids, float* weights) {
  const int64_t size = p.out.num_experts;
  alignas(64) float left[kMaxExperts], near[kMaxExperts];
  for (int64_t i = 0; i < size; ++i) left[i] = logits[i] == logits[i] ? logits[i] : -kNever;
  best_of(left, size, p.out.top_k, ids);
  for (int64_t n = 0; n < p.out.top_k; ++n) {
    const float top = left[ids[n]];
    for (int64_t i = 0; i < size; ++i) {
      const float magnitude = std::fabs(logits[i]);
      const float distance = (top - logits[i]) / (magnitude > top ? magnitude : top);
      near[i] = distance > 2 * p.jitter ? kNever : left[i];
    }
    for (int64_t i = size; i % 16 != 0; ++i) near[i] = kNever;
    weights[n] = p.scale / exp_shifted<S>(near, size, top, near);
    left[ids[n]] = kNever;
  }
}

template <class S>
inline void route_token(const RouteParams& p, int64_t token) {
  const float* const logits = p.logits + token * p.stride;
  int32_t* const ids = p.out.ids + token * p.out.top_k;
  float* const weights = p.out.weights + token * p.out.top_k;
  if (p.kind == RouteKind::kSparseMixer) {
    sparse_mixer<S>(p, logits, ids, weights);
  } else {
    alignas(64) float scores[kMaxExperts];
    make_scores<S>(p, logits, scores);
    select_experts(p, scores, ids, weights);
  }
  if (p.expert_scales == nullptr) return;
  for (int64_t i = 0; i < p.out.top_k; ++i) weights[i] *= p.expert_scales[ids[i]];
}

template <class S>
void route(const RouteParams& p, const StepHeader& step, int member, int num_members) {
  const bool is_single_member = step.num_tokens <= kSingleMemberTokens;
  if (is_single_member && member > 0) return;
  const Range tokens =
      is_single_member ? Range{0, step.num_tokens} : split(step.num_tokens, member, num_members);
  for (int64_t token = tokens.begin; token < tokens.end; ++token) route_token<S>(p, token);
  if (!is_single_member) team_barrier();
  if (member == 0) sort_by_expert(p.out, step.num_tokens, step.num_generated);
}

}  // namespace
}  // namespace tgi::cpu::step
