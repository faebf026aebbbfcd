// Divides the attention of a step among the members of a team.
#pragma once

#include <cstdint>

#include "step.h"

namespace tgi::cpu::step {

// How a model's query heads share KV heads; attention reads each KV head for `tile_rows` rows at a
// time.
struct HeadSplit {
  int64_t num_heads;
  int64_t num_kv_heads;
  int64_t tile_rows;

  int64_t group() const { return num_heads / num_kv_heads; }
  bool operator==(const HeadSplit& other) const {
    return num_heads == other.num_heads && num_kv_heads == other.num_kv_heads &&
           tile_rows == other.tile_rows;
  }
};

// What determines how the attention of a layer is divided among members.
struct AttentionKind {
  AttentionRule rule;
  HeadSplit heads;

  bool operator==(const AttentionKind& other) const {
    return rule == other.rule && heads == other.heads;
  }
};

// Divides a step's attention among members by the number of context positions read. Writes
// num_members + 1 points to `split`.
void split_attention(const StepHeader& step, const AttentionKind& kind, int num_members,
                     AttentionPoint* split);

}  // namespace tgi::cpu::step
