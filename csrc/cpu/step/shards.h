// What the shards of a model do beside the operators of a whole one.
#pragma once

#include "step.h"

namespace tgi::cpu::step {

// The rows of an embedding of which a shard has some words, from the first on: other words' are
// zero, as other shards have them.
struct EmbedPartParams {
  EmbedParams embed;
  int64_t first_word;
  int64_t num_words;
};

// What shards have computed of the same rows, added in their order.
struct SumShardsParams {
  const float* parts;   // [num_shards][num_tokens, num_columns]
  int64_t part_floats;  // from a shard's part to the next one's
  int64_t num_shards;
  int64_t num_columns;
  bool adds;  // x += factor * sum, else x = factor * sum
  float factor;
  float* x;  // [num_tokens, num_columns]
};

// A shard's logits to their columns of those of all.
struct PutLogitsParams {
  const float* from;  // [num_rows, num_words]
  int64_t num_words;
  float* to;  // [num_rows, stride], from this shard's first word on
  int64_t stride;
};

void embed_part(const EmbedPartParams& params, const StepHeader& step, int member, int num_members);
void sum_shards(const SumShardsParams& params, const StepHeader& step, int member, int num_members);
void put_logits(const PutLogitsParams& params, const StepHeader& step, int member, int num_members);

}  // namespace tgi::cpu::step
