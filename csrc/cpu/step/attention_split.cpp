// How a step's attention is divided among members.
#include "attention_split.h"

namespace tgi::cpu::step {

namespace {

// Calls visit(sequence, head, tile, first, seen) for every row tile, in work order: `first` is the
// first position that any of its rows sees, `seen` the end of the last.
template <class Visit>
void each_tile(const StepHeader& step, const AttentionKind& kind, const Visit& visit) {
  const auto& [rule, heads] = kind;
  const int64_t group = heads.group(), tile_rows = heads.tile_rows;
  for (int64_t s = 0; s < step.num_sequences; ++s) {
    const int64_t start = step.query_start[s], length = step.query_start[s + 1] - start;
    const int64_t before = step.context_len[s] - length;
    const int64_t rows = length * group;
    for (int64_t head = 0; head < heads.num_kv_heads; ++head) {
      for (int64_t row = 0; row < rows; row += tile_rows) {
        const int64_t first = row / group;
        const int64_t last = ((row + tile_rows < rows ? row + tile_rows : rows) - 1) / group;
        int64_t seen = before + last + 1;
        for (int64_t t = first; step.visible_until != nullptr && t <= last; ++t) {
          const int64_t end = rule.end_seen(step, start + t, before + t);
          seen = end > seen ? end : seen;
        }
        visit(s, head, row / tile_rows, rule.first_seen(before + first), seen);
      }
    }
  }
}

constexpr int64_t kTileOverhead = 64;  // set-up cost of a tile, in tokens of context

}  // namespace

void split_attention(const StepHeader& step, const AttentionKind& kind, int num_members,
                     AttentionPoint* split) {
  // Chunks are read whole, except the last.
  const auto first_read = [](int64_t first) { return first / kChunkTokens * kChunkTokens; };
  int64_t total = 0;
  each_tile(step, kind, [&](int64_t, int64_t, int64_t, int64_t first, int64_t seen) {
    total += seen - first_read(first) + kTileOverhead;
  });
  int64_t done = 0;
  int next = 0;
  // A member's part begins at the first chunk whose middle is at or past its share. A tile's first
  // visible chunk is number 0, even if chunks before it are hidden.
  each_tile(step, kind, [&](int64_t s, int64_t head, int64_t tile, int64_t first, int64_t seen) {
    const int64_t begin = first_read(first);
    for (int64_t at = begin; at < seen; at += kChunkTokens) {
      const int64_t left = seen - at, overhead = at == begin ? kTileOverhead : 0;
      const int64_t cost = (left < kChunkTokens ? left : kChunkTokens) + overhead;
      const int64_t middle = done + cost / 2, chunk = at == begin ? 0 : at / kChunkTokens;
      while (next < num_members && (next == 0 || middle * num_members >= total * next)) {
        split[next++] = {static_cast<int32_t>(s), static_cast<int32_t>(head),
                         static_cast<int32_t>(tile), static_cast<int32_t>(chunk)};
      }
      done += cost;
    }
  });
  const AttentionPoint end = {static_cast<int32_t>(step.num_sequences), 0, 0, 0};
  while (next <= num_members) split[next++] = end;
}

}  // namespace tgi::cpu::step
