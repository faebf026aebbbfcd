// One token a row of logits, and log-probabilities. See tgi_asgi/ops/sample.py for the order of the
// filters.
#pragma once

#include <cstdint>

#include "params.h"

namespace tgi::cpu {

// Bytes of work memory, at a multiple of 64, for sample() by so many members.
int64_t sample_scratch_bytes(int64_t vocab, int num_members);

// A member's part of `num_rows` draws; called by all members of a team, or by a caller alone as
// member 0 of 1. The rows' slots stay as they are: `keep_drawn` of draft_rows.h moves them on.
// Members draw a row each, and what rows are left, all together: their bits are the same. scratch:
// of all members.
void sample(const ::tgi::SampleParams& p, int64_t num_rows, uint8_t* scratch, int member,
            int num_members);

// Rows [begin, end). A row that is not finite gets NaN.
void token_logprobs(const ::tgi::TokenLogprobsParams& p, int64_t begin, int64_t end);

// What a draw depends on, beside the scores: Philox's key and counter. One call a token id, first
// word.
struct DrawKey {
  uint64_t seed;
  uint32_t choice;
  uint64_t position;
};

// Sums of this many values are made in float32, their sum in double: relative error below 1e-6.
constexpr int64_t kSumBlock = 16 * 64;

constexpr int64_t num_sums(int64_t n) { return (n + kSumBlock - 1) / kSumBlock; }

// Who came first, at the time log E - score; infinity where nobody ran.
struct RaceWinner {
  int64_t index;
  double arrival;
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
  // The same by blocks, to sums [num_sums(n)]: added up in order they are the mass.
  void (*masses)(const float* x, int64_t n, float max, float floor, double* sums);
  // Copies those >= floor to out, in order; returns how many. out has room for n.
  int64_t (*compact)(const float* x, int64_t n, float floor, float* out);
  // The winner of the race: the index in [begin, n) that minimises E / e^score over scores >=
  // floor, E exponential from the key and the index; lowest index on ties, n if there is none.
  // begin is a multiple of kSumBlock. No score is above 0.
  RaceWinner (*race)(const float* scores, int64_t begin, int64_t n, float floor,
                     const DrawKey& key);
};

}  // namespace tgi::cpu
