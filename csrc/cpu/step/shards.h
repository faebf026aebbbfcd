// Operators that only tensor-parallel shards of a model run, in addition to those of a whole model.
#pragma once

#include "step.h"

namespace tgi::cpu::step {

// Embedding rows of a shard that holds part of the vocabulary, `num_words` words starting at
// `first_word`. Rows of other words are zero, because other shards hold them.
struct EmbedPartParams {
  EmbedParams embed;
  int64_t first_word;
  int64_t num_words;
};

// Adds the parts that shards have computed of the same rows, in shard order.
struct SumShardsParams {
  const float* parts;   // [num_shards][num_tokens, num_columns]
  int64_t part_floats;  // from one shard's part to the next
  int64_t num_shards;
  int64_t num_columns;
  bool adds;  // x += factor * sum, else x = factor * sum
  float factor;
  float* x;  // [num_tokens, num_columns]
};

// Copies a shard's logits to their columns among the logits of all shards.
struct PutLogitsParams {
  const float* from;  // [num_rows, num_words]
  int64_t num_words;
  float* to;  // [num_rows, stride], starting at this shard's first word
  int64_t stride;
};

void embed_part(const EmbedPartParams& params, const StepHeader& step, int member, int num_members);
void sum_shards(const SumShardsParams& params, const StepHeader& step, int member, int num_members);
void put_logits(const PutLogitsParams& params, const StepHeader& step, int member, int num_members);

}  // namespace tgi::cpu::step
