#include "program.h"

#include <chrono>

#include "../team.h"

namespace tgi::cpu::step {

void Segment::run(const StepHeader& step, int member, int num_members, double* ends) const {
  for (const Operator& op : operators_) {
    op.call(op, step, member, num_members);
    const bool is_private =
        (op.sync == Sync::kUnlessPrivateTokens && step.num_tokens <= kPrivateTokens) ||
        (op.sync == Sync::kUnlessPrivateRows && step.num_rows <= kPrivateTokens);
    if (!is_private) team_barrier();
    if (ends != nullptr && member == 0) {
      *ends++ = std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch())
                    .count();
    }
  }
}

AttentionWorkspace::AttentionWorkspace(int num_members, int64_t max_context, int64_t head_dim) {
  const int64_t chunks = (max_context + kChunkTokens - 1) / kChunkTokens;
  const int64_t floats = chunks * kAttentionRows * (head_dim + 2);
  data_.resize(static_cast<size_t>(num_members * floats));
  for (int member = 0; member < num_members; ++member) {
    arrived_.emplace_back(0);
    partials_.push_back({data_.data() + member * floats, &arrived_.back()});
  }
}

}  // namespace tgi::cpu::step
