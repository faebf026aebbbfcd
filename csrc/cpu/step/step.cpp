// How a step's attention is shared out.
#include "step.h"

namespace tgi::cpu::step {

namespace {

// Calls visit(sequence, head, tile, seen) for every row tile, in the order of work.
template <class Visit>
void each_tile(const StepHeader& step, int64_t group, int64_t num_kv_heads, const Visit& visit) {
  for (int64_t s = 0; s < step.num_sequences; ++s) {
    const int64_t length = step.query_start[s + 1] - step.query_start[s];
    const int64_t before = step.context_len[s] - length;
    const int64_t rows = length * group;
    for (int64_t head = 0; head < num_kv_heads; ++head) {
      for (int64_t first = 0; first < rows; first += kAttentionRows) {
        const int64_t last = (first + kAttentionRows < rows ? first + kAttentionRows : rows) - 1;
        visit(s, head, first / kAttentionRows, before + last / group + 1);
      }
    }
  }
}

constexpr int64_t kTileOverhead = 64;  // tokens of context that a tile's set-up costs

}  // namespace

void split_attention(const StepHeader& step, int64_t num_heads, int64_t num_kv_heads,
                     int num_members, AttentionPoint* split) {
  const int64_t group = num_heads / num_kv_heads;
  int64_t total = 0;
  each_tile(step, group, num_kv_heads,
            [&](int64_t, int64_t, int64_t, int64_t seen) { total += seen + kTileOverhead; });
  int64_t done = 0;
  int next = 0;
  // A member's part begins at the first chunk whose middle is at or past its share.
  each_tile(step, group, num_kv_heads, [&](int64_t s, int64_t head, int64_t tile, int64_t seen) {
    for (int64_t chunk = 0; chunk * kChunkTokens < seen; ++chunk) {
      const int64_t size =
          seen - chunk * kChunkTokens < kChunkTokens ? seen - chunk * kChunkTokens : kChunkTokens;
      const int64_t middle = done + (chunk == 0 ? size + kTileOverhead : size) / 2;
      while (next < num_members && (next == 0 || middle * num_members >= total * next)) {
        split[next++] = {static_cast<int32_t>(s), static_cast<int32_t>(head),
                         static_cast<int32_t>(tile), static_cast<int32_t>(chunk)};
      }
      done += chunk == 0 ? size + kTileOverhead : size;
    }
  });
  const AttentionPoint end = {static_cast<int32_t>(step.num_sequences), 0, 0, 0};
  while (next <= num_members) split[next++] = end;
}

}  // namespace tgi::cpu::step
