// Samples one token per row of logits and computes log-probabilities. See tgi_asgi/ops/sample.py
// for the order of the filters.
#pragma once

#include <cstdint>

#include "params.h"

namespace tgi::cpu {

// Returns the size in bytes of the work memory, aligned to 64, that `sample` in draft_rows.h needs
// for this many members.
int64_t sample_scratch_bytes(int64_t vocab, int num_members);

// Computes rows [begin, end). A row that is not finite gets NaN.
void token_logprobs(const ::tgi::TokenLogprobsParams& p, int64_t begin, int64_t end);

// The key and counter of Philox, on which a sample depends in addition to the scores. One call per
// token id, of which the first word is used.
struct SampleKey {
  uint64_t seed;
  uint32_t choice;
  uint64_t position;
};

// A block of this many values is summed in float32 and the block sums in double: relative error
// below 1e-6.
constexpr int64_t kSumBlock = 16 * 64;

constexpr int64_t num_sums(int64_t n) { return (n + kSumBlock - 1) / kSumBlock; }

// The earliest arrival in the race, at time log E - score; infinity if there was no entrant.
struct RaceWinner {
  int64_t index;
  double arrival;
};

struct RowStats {
  float max;
  bool is_finite;  // neither NaN nor +infinity
};

// Passes over one row of n floats, for one instruction set: see step/sample_rows.h.
struct RowPasses {
  RowStats (*stats)(const float* x, int64_t n);
  // Returns the first index >= begin with x[index] > bound (>= if or_equal), or n.
  int64_t (*find)(const float* x, int64_t begin, int64_t n, float bound, bool or_equal);
  // out = (x - max) * factor; bit-identical in every instruction set.
  void (*scale)(const float* x, int64_t n, float max, float factor, float* out);
  // Returns the sum of e^(x - max) over x >= floor; no x is above max.
  double (*mass)(const float* x, int64_t n, float max, float floor);
  // Writes the same sum per block to sums [num_sums(n)]; their sum in order is the mass.
  void (*masses)(const float* x, int64_t n, float max, float floor, double* sums);
  // Copies the values >= floor to out, in order, and returns their number. out must hold n values.
  int64_t (*compact)(const float* x, int64_t n, float floor, float* out);
  // Returns the winner of the race: the index in [begin, n) that minimises E / e^score over scores
  // >= floor, with E exponential from the key and the index; lowest index on ties, n if there is
  // none. begin is a multiple of kSumBlock. No score is above 0.
  RaceWinner (*race)(const float* scores, int64_t begin, int64_t n, float floor,
                     const SampleKey& key);
};

}  // namespace tgi::cpu
