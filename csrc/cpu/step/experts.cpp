#include "experts.h"

namespace tgi::cpu::step {

// A counting sort, which is stable, so an expert's tokens stay in order.
void sort_by_expert(const ExpertRouting& routing, int64_t num_tokens, int64_t num_sampled) {
  ExpertTokens* const experts = routing.experts;
  for (int32_t e = 0; e < routing.num_experts; ++e) experts[e] = {e, 0, 0, 0};
  const int64_t size = num_tokens * routing.top_k, sampled = num_sampled * routing.top_k;
  const auto is_expert = [&](int32_t id) { return id < routing.num_experts; };
  for (int64_t i = 0; i < size; ++i) {
    if (!is_expert(routing.ids[i])) continue;
    ExpertTokens& its = experts[routing.ids[i]];
    ++its.num_tokens;
    its.num_sampled += i < sampled;
  }
  int32_t first = 0;
  for (int64_t e = 0; e < routing.num_experts; ++e) {
    experts[e].first = first;
    first += experts[e].num_tokens;
    experts[e].num_tokens = 0;  // counted again, as a cursor
  }
  for (int64_t i = 0; i < size; ++i) {
    if (!is_expert(routing.ids[i])) continue;
    ExpertTokens& its = experts[routing.ids[i]];
    const int32_t place = its.first + its.num_tokens++;
    routing.tokens[place] = static_cast<int32_t>(i / routing.top_k);
    routing.token_weights[place] = routing.weights[i];
  }
  int64_t num_used = 0;
  for (int64_t e = 0; e < routing.num_experts; ++e) {
    if (experts[e].num_tokens > 0) experts[num_used++] = experts[e];
  }
  *routing.num_used = num_used;
}

}  // namespace tgi::cpu::step
