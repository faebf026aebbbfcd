// Splits the passes over one row among the members of a team.
//
// All members that sample a row call the same passes with the same arguments in the same order, and
// each gets the complete result, so all members take the same decisions. A pass is split at
// multiples of kSumBlock, and the partial results are combined in a fixed order, so the bits equal
// those of a single member.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "sample.h"
#include "team.h"

namespace tgi::cpu {

// Partial results that members exchange.
struct TeamExchange {
  struct alignas(64) Part {
    RowStats stats;
    int64_t index;
    double arrival;
  };
  // Double-buffered: a member may write for its next pass while others still read this one's.
  Part* parts[2];   // [num_members]
  double* sums[2];  // [vocab / kSumBlock, rounded up]

  // Returns the size in bytes that `at` lays out, from an address aligned to 64, for this many
  // members.
  static int64_t num_bytes(int64_t vocab, int num_members);
  static TeamExchange at(uint8_t* memory, int64_t vocab, int num_members);
};

class RowTeam {
 public:
  // A team of one.
  explicit RowTeam(const RowPasses& rows) : rows_(rows) {}
  // Inside a team's run; if there are several members, all of them take part.
  RowTeam(const RowPasses& rows, const TeamExchange& exchange, int member, int num_members)
      : rows_(rows), exchange_(exchange), member_(member), num_members_(num_members) {}

  const RowPasses& passes() const { return rows_; }
  bool is_first() const { return member_ == 0; }
  // This member's part of a row of n.
  Range part(int64_t n) const { return split(n, member_, num_members_, kSumBlock); }
  // Waits until the writes of all members are visible.
  void barrier() const {
    if (num_members_ > 1) team_barrier();
  }

  // The passes of RowPasses; their output is visible to all members on return.
  RowStats stats(const float* x, int64_t n);
  int64_t find(const float* x, int64_t n, float bound);  // the first x[index] >= bound, or n
  void scale(const float* x, int64_t n, float max, float factor, float* out);
  double mass(const float* x, int64_t n, float max, float floor);
  int64_t compact(const float* x, int64_t n, float floor, float* out);
  int64_t race(const float* scores, int64_t n, float floor, const SampleKey& key);

  // Computes a number on the first member and returns it to all.
  template <typename Compute>
  double once(const Compute& compute) {
    if (num_members_ == 1) return compute();
    if (is_first()) mine().arrival = compute();
    const TeamExchange::Part* all = exchange();
    return all[0].arrival;
  }

 private:
  TeamExchange::Part& mine() const { return exchange_.parts[turn_][member_]; }
  // Waits for all members' partial results of this pass and returns them.
  const TeamExchange::Part* exchange() {
    team_barrier();
    const TeamExchange::Part* all = exchange_.parts[turn_];
    turn_ ^= 1;
    return all;
  }

  const RowPasses& rows_;
  TeamExchange exchange_ = {};
  int member_ = 0, num_members_ = 1, turn_ = 0;
};

}  // namespace tgi::cpu
