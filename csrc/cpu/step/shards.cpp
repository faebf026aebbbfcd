#include "shards.h"

#include <algorithm>

#include "../team.h"
#include "pack.h"

namespace tgi::cpu::step {

void embed_part(const EmbedPartParams& p, const StepHeader& step, int member, int num_members) {
  const int64_t width = p.embed.table.num_columns;
  const Range tokens = split(step.num_tokens, member, num_members);
  for (int64_t t = tokens.begin; t < tokens.end; ++t) {
    float* const x = p.embed.x + t * width;
    const int64_t row = step.ids[t] - p.first_vocab_id;
    if (row >= 0 && row < p.num_vocab_ids) {
      unpack_row(p.embed.table, row, p.embed.factor, x);
    } else {
      std::fill_n(x, width, 0.0f);
    }
    if (p.embed.positions == nullptr) continue;
    const float* const added = p.embed.positions + step.positions[t] * width;
    for (int64_t k = 0; k < width; ++k) x[k] += added[k];
  }
}

void sum_shards(const SumShardsParams& p, const StepHeader& step, int member, int num_members) {
  constexpr int64_t kLine = 16;  // floats; the number of columns is a multiple
  const Range range = split(step.num_tokens * p.num_columns, member, num_members, kLine);
  for (int64_t at = range.begin; at < range.end; at += kLine) {
    float sums[kLine];
    for (int64_t i = 0; i < kLine; ++i) sums[i] = p.partial_sums[at + i];
    for (int64_t shard = 1; shard < p.num_shards; ++shard) {
      const float* const addends = p.partial_sums + shard * p.partial_sum_floats + at;
      for (int64_t i = 0; i < kLine; ++i) sums[i] += addends[i];
    }
    float* const x = p.x + at;
    if (p.adds) {
      for (int64_t i = 0; i < kLine; ++i) x[i] += p.factor * sums[i];
    } else {
      for (int64_t i = 0; i < kLine; ++i) x[i] = p.factor * sums[i];
    }
  }
}

void scatter_logits(const ScatterLogitsParams& p, const StepHeader& step, int member,
                    int num_members) {
  const Range ids = split(p.num_vocab_ids, member, num_members);
  for (int64_t row = 0; row < step.num_rows; ++row) {
    const float* const from = p.from + row * p.num_vocab_ids;
    std::copy(from + ids.begin, from + ids.end, p.to + row * p.stride + ids.begin);
  }
}

}  // namespace tgi::cpu::step
