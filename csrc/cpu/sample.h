// One token a row of logits, and log-probabilities. See tgi_asgi/ops/sample.py for the order of the
// filters.
#pragma once

#include <cstdint>

#include "params.h"

namespace tgi::cpu {

// Work memory that a member needs for sample(): this many rows of vocab floats.
constexpr int64_t kSampleScratchRows = 4;

// Rows [begin, end). Writes the records and counts of those rows' slots.
void sample(const ::tgi::SampleParams& p, float* scratch, int64_t begin, int64_t end);

// Rows [begin, end). A row that is not finite gets NaN.
void token_logprobs(const ::tgi::TokenLogprobsParams& p, int64_t begin, int64_t end);

// What a draw depends on, beside the scores: Philox's key and counter. One call a token id, first
// word.
struct DrawKey {
  uint64_t seed;
  uint32_t choice;
  uint64_t position;
};

struct RowStats {
  float max;
  bool is_finite;  // neither NaN nor +infinity
};

// Passes over one row of n floats, of one instruction set: see step/sample_rows.h.
struct RowPasses {
  RowStats (*stats)(const float* x, int64_t n);
  // The first index >= begin with x[index] > bound (>= where or_equal), or n.
  int64_t (*find)(const float* x, int64_t begin, int64_t n, float bound, bool or_equal);
  // out = (x - max) * factor; equal bits in every instruction set.
  void (*scale)(const float* x, int64_t n, float max, float factor, float* out);
  // Sum of e^(x - max) over x >= floor; no x is above max.
  double (*mass)(const float* x, int64_t n, float max, float floor);
  // Copies those >= floor to out, in order; returns how many. out has room for n.
  int64_t (*compact)(const float* x, int64_t n, float floor, float* out);
  // The winner of the race: the index that minimises E / e^score over scores >= floor, E
  // exponential from the key and the index; lowest index on ties. At least one is in. No score is
  // above 0.
  int64_t (*race)(const float* scores, int64_t n, float floor, const DrawKey& key);
};

}  // namespace tgi::cpu
