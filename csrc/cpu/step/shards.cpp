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
    const int64_t word = step.ids[t] - p.first_word;
    if (word >= 0 && word < p.num_words) {
      unpack_row(p.embed.table, word, p.embed.factor, x);
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
    for (int64_t i = 0; i < kLine; ++i) sums[i] = p.parts[at + i];
    for (int64_t shard = 1; shard < p.num_shards; ++shard) {
      const float* const part = p.parts + shard * p.part_floats + at;
      for (int64_t i = 0; i < kLine; ++i) sums[i] += part[i];
    }
    float* const x = p.x + at;
    if (p.adds) {
      for (int64_t i = 0; i < kLine; ++i) x[i] += p.factor * sums[i];
    } else {
      for (int64_t i = 0; i < kLine; ++i) x[i] = p.factor * sums[i];
    }
  }
}

void put_logits(const PutLogitsParams& p, const StepHeader& step, int member, int num_members) {
  const Range words = split(p.num_words, member, num_members);
  for (int64_t row = 0; row < step.num_rows; ++row) {
    const float* const from = p.from + row * p.num_words;
    std::copy(from + words.begin, from + words.end, p.to + row * p.stride + words.begin);
  }
}

}  // namespace tgi::cpu::step
