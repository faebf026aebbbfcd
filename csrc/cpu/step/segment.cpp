#include "segment.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <functional>
#include <numeric>

#include "../team.h"

namespace tgi::cpu::step {

void Segment::run(const StepHeader& step, int64_t begin, int64_t end, int member, int num_members,
                  double* ends) const {
  for (int64_t i = begin; i < end; ++i) {
    const Operator& op = operators_[static_cast<size_t>(i)];
    const bool is_skipped = (op.sync == Sync::kOnlyAdapters && step.num_adapters == 0) ||
                            (op.sync == Sync::kOnlyImages && step.num_image_rows == 0);
    if (!is_skipped) op.call(op, step, member, num_members);
    const bool is_private =
        is_skipped ||
        (op.sync == Sync::kUnlessPrivateTokens && step.num_tokens <= kPrivateTokens) ||
        (op.sync == Sync::kUnlessPrivateRows && step.num_rows <= kPrivateTokens);
    if (op.sync == Sync::kShards) {
      shards_->barrier();
    } else if (!is_private) {
      team_barrier();
    }
    if (ends != nullptr && member == 0) {
      ends[i] = std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch())
                    .count();
    }
  }
}

void split_by_kinds(const StepHeader& step, const std::vector<AttentionKind>& kinds,
                    int num_members, std::vector<AttentionPoint>& split) {
  const auto points = static_cast<size_t>(num_members) + 1;
  split.resize(kinds.size() * points);
  for (size_t i = 0; i < kinds.size(); ++i) {
    split_attention(step, kinds[i], num_members, split.data() + i * points);
  }
}

bool LastRows::prepare(const StepHeader& step, const std::vector<AttentionKind>& kinds,
                       int64_t block_size, int num_members) {
  const int32_t* const rows = step.rows;
  const auto count = static_cast<size_t>(step.num_rows);
  if (step.num_rows == 0 || step.num_rows == step.num_tokens ||
      std::adjacent_find(rows, rows + count, std::greater_equal<>()) != rows + count) {
    return false;
  }
  for (size_t i = 0; step.visible_until != nullptr && i < count; ++i) {
    if (step.visible_until[rows[i]] > step.positions[rows[i]] + 1) return false;
  }
  const auto stride = static_cast<size_t>(step.block_table_stride);
  tokens_ = rows;
  counts_.resize(count + 1);
  std::iota(counts_.begin(), counts_.end(), 0);
  positions_.resize(count);
  rotary_.resize(count);
  context_len_.resize(count);
  const auto groups = static_cast<size_t>(step.num_groups);
  block_table_.resize(groups * count * stride);
  int64_t s = 0;
  for (size_t i = 0; i < count; ++i) {
    while (step.query_start[s + 1] <= rows[i]) ++s;
    positions_[i] = step.positions[rows[i]];
    rotary_[i] = step.rotary[rows[i]];
    context_len_[i] = step.context_len[s] - (step.query_start[s + 1] - 1 - rows[i]);
    const int64_t num_blocks = (context_len_[i] + block_size - 1) / block_size;
    for (size_t group = 0; group < groups; ++group) {
      std::copy_n(step.table(static_cast<int64_t>(group), s), num_blocks,
                  block_table_.begin() + static_cast<std::ptrdiff_t>((group * count + i) * stride));
    }
  }
  header_ = step;
  header_.num_tokens = header_.num_sequences = step.num_rows;
  header_.num_generated = std::lower_bound(rows, rows + count, step.num_generated) - rows;
  header_.query_start = header_.rows = counts_.data();
  header_.context_len = context_len_.data();
  header_.block_table = block_table_.data();
  header_.positions = positions_.data();
  header_.rotary = rotary_.data();
  header_.ids = nullptr;  // these are not needed any more
  header_.slots = nullptr;
  header_.visible_until = nullptr;
  header_.num_image_rows = 0;
  split_by_kinds(header_, kinds, num_members, split_);
  header_.attention_split = split_.data();
  prepare_adapters(step);
  return true;
}

void LastRows::prepare_adapters(const StepHeader& step) {
  adapters_.clear();
  const AdapterSpan *from = step.adapters, *const end = from + step.num_adapters;
  for (int32_t i = 0; i < header_.num_tokens; ++i) {
    while (from != end && from->end <= tokens_[i]) ++from;
    if (from == end || tokens_[i] < from->begin) continue;
    if (!adapters_.empty() && adapters_.back().end == i && adapters_.back().terms == from->terms) {
      adapters_.back().end = i + 1;
    } else {
      adapters_.push_back({i, i + 1, from->terms});
    }
  }
  header_.adapters = adapters_.data();
  header_.num_adapters = static_cast<int64_t>(adapters_.size());
}

void LastRows::gather(void* buffer, int64_t bytes) const {
  auto* const to = static_cast<uint8_t*>(buffer);
  // Tokens ascend, so none is overwritten before it is read.
  for (int64_t i = 0; i < header_.num_tokens; ++i) {
    if (tokens_[i] != i) std::memcpy(to + i * bytes, to + tokens_[i] * bytes, bytes);
  }
}

AttentionWorkspace::AttentionWorkspace(int num_members, int64_t max_context, int64_t tile_rows,
                                       int64_t value_dim) {
  const int64_t chunks = (max_context + kChunkTokens - 1) / kChunkTokens;
  const int64_t floats = chunks * tile_rows * (value_dim + 2);
  data_ = allocate(product_of_sizes({num_members, floats, sizeof(float)}));
  auto* const data = reinterpret_cast<float*>(data_.get());
  for (int member = 0; member < num_members; ++member) {
    arrived_.emplace_back(0);
    partials_.push_back({data + member * floats, &arrived_.back()});
  }
}

}  // namespace tgi::cpu::step
