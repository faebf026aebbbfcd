// Compares the parts that split_attention assigns to each team member with a list of all chunks
// that are read, for random steps and rules. Prints the number of steps, or an error with status 1.
#include "cpu/step/attention_split.h"

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <random>
#include <tuple>
#include <vector>

using namespace tgi::cpu::step;

namespace {

struct Piece {
  AttentionPoint at;  // as in a point: chunk 0 is the first that a tile reads
  int64_t size;
};

bool before(const AttentionPoint& a, const AttentionPoint& b) {
  return std::tie(a.sequence, a.head, a.tile, a.chunk) <
         std::tie(b.sequence, b.head, b.tile, b.chunk);
}

// Whether a query sees a key position.
bool sees(const AttentionRule& rule, int64_t query, int64_t key, int64_t until) {
  if (key >= until) return false;
  if (rule.window != INT64_MAX && key <= query - rule.window) return false;
  return rule.chunk == INT64_MAX || key >= query / rule.chunk * rule.chunk;
}

std::vector<Piece> all_pieces(const StepHeader& step, const AttentionKind& kind) {
  const auto& [rule, heads] = kind;
  const int64_t group = heads.group(), tile_rows = heads.tile_rows;
  std::vector<Piece> pieces;
  for (int32_t s = 0; s < step.num_sequences; ++s) {
    const int64_t start = step.query_start[s], length = step.query_start[s + 1] - start;
    const int64_t context = step.context_len[s];
    for (int32_t head = 0; head < heads.num_kv_heads; ++head) {
      for (int32_t tile = 0; tile * tile_rows < length * group; ++tile) {
        int64_t first = context, end = 0;
        for (int64_t row = tile * tile_rows; row < std::min(length * group, (tile + 1) * tile_rows);
             ++row) {
          const int64_t query = context - length + row / group;
          const int64_t until =
              step.visible_until == nullptr ? query + 1 : step.visible_until[start + row / group];
          for (int64_t key = 0; key < context; ++key) {
            if (!sees(rule, query, key, until)) continue;
            first = std::min(first, key);
            end = std::max(end, key + 1);
          }
        }
        const int64_t begin = first / kChunkTokens * kChunkTokens;
        for (int64_t at = begin; at < end; at += kChunkTokens) {
          const auto chunk = static_cast<int32_t>(at == begin ? 0 : at / kChunkTokens);
          pieces.push_back({{s, head, tile, chunk}, std::min(kChunkTokens, end - at)});
        }
      }
    }
  }
  return pieces;
}

}  // namespace

int main() {
  std::mt19937 random(7);
  const auto below = [&](int64_t n) { return static_cast<int64_t>(random() % n); };
  const int kSteps = 300;
  for (int trial = 0; trial < kSteps; ++trial) {
    AttentionRule rule;
    if (below(2)) rule.window = 1 + below(600);
    if (below(3) == 0) rule.chunk = 1 + below(700);
    const int64_t kv_heads = 1 + below(3), group = 1 + below(7);
    const HeadSplit heads = {group * kv_heads, kv_heads, below(2) ? 6 : 16};
    std::vector<int32_t> starts = {0}, contexts, until;
    for (int64_t s = 0; s < 1 + below(4); ++s) {
      const int64_t length = below(2) ? 1 : 1 + below(40), context = length + below(1500);
      starts.push_back(static_cast<int32_t>(starts.back() + length));
      contexts.push_back(static_cast<int32_t>(context));
      for (int64_t t = 0; t < length; ++t) {
        until.push_back(static_cast<int32_t>(context - below(length - t)));
      }
    }
    StepHeader step = {};
    step.num_sequences = static_cast<int64_t>(contexts.size());
    step.num_tokens = starts.back();
    step.query_start = starts.data();
    step.context_len = contexts.data();
    if (below(2)) step.visible_until = until.data();
    const std::vector<Piece> pieces = all_pieces(step, {rule, heads});
    int64_t total = 0;
    for (const Piece& piece : pieces) total += piece.size + 64;
    const int members = static_cast<int>(1 + below(9));
    std::vector<AttentionPoint> split(members + 1);
    split_attention(step, {rule, heads}, members, split.data());
    size_t next = 0;
    for (int m = 0; m < members; ++m) {
      int64_t work = 0;
      // A member's part starts at a piece and ends before the next member's.
      if (next < pieces.size() && before(pieces[next].at, split[m])) {
        std::printf("step %d: member %d leaves out a chunk\n", trial, m);
        return 1;
      }
      for (; next < pieces.size() && before(pieces[next].at, split[m + 1]); ++next) {
        work += pieces[next].size;
      }
      if (work > total / members + 2 * (kChunkTokens + 64)) {
        std::printf("step %d: member %d of %d has %ld of %ld\n", trial, m, members,
                    static_cast<long>(work), static_cast<long>(total));
        return 1;
      }
    }
    if (next != pieces.size()) {
      std::printf("step %d: %zu of %zu chunks\n", trial, next, pieces.size());
      return 1;
    }
  }
  std::printf("%d steps\n", kSteps);
  return 0;
}
