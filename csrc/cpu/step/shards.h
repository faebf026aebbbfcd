// Operators that only tensor-parallel shards of a model run, in addition to those of a whole model.
#pragma once

#include "step.h"

namespace tgi::cpu::step {

// Embedding rows of a shard that holds part of the vocabulary, `num_vocab_ids` ids starting at
// `first_vocab_id`. Rows of other ids are zero, because other shards hold them.
struct EmbedPartParams {
  EmbedParams embed;
  int64_t first_vocab_id;
  int64_t num_vocab_ids;
};

// Adds the partial sums that shards have computed of the same rows, in the order of their ranks.
struct SumShardsParams {
  const float* partial_sums;   // [num_shards][num_tokens, num_columns]
  int64_t partial_sum_floats;  // from one shard's partial sums to the next
  int64_t num_shards;
  int64_t num_columns;
  bool adds;  // x += factor * sum, else x = factor * sum
  float factor;
  float* x;  // [num_tokens, num_columns]
};

// Copies a shard's logits to their columns among the logits of all shards.
struct ScatterLogitsParams {
  const float* from;  // [num_rows, num_vocab_ids]
  int64_t num_vocab_ids;
  float* to;  // [num_rows, stride], starting at this shard's first vocabulary id
  int64_t stride;
};

void embed_part(const EmbedPartParams& params, const StepHeader& step, int member, int num_members);
void sum_shards(const SumShardsParams& params, const StepHeader& step, int member, int num_members);
void scatter_logits(const ScatterLogitsParams& params, const StepHeader& step, int member,
                    int num_members);

}  // namespace tgi::cpu::step
