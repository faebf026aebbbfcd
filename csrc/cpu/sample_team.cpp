#include "sample_team.h"

#include <cmath>

namespace tgi::cpu {

namespace {

int64_t part_bytes(int num_members) {
  return num_members * static_cast<int64_t>(sizeof(TeamExchange::Part));
}

int64_t sum_bytes(int64_t vocab) {
  const int64_t bytes = num_sums(vocab) * static_cast<int64_t>(sizeof(double));
  return (bytes + 63) / 64 * 64;
}

}  // namespace

int64_t TeamExchange::num_bytes(int64_t vocab, int num_members) {
  return 2 * (part_bytes(num_members) + sum_bytes(vocab));
}

TeamExchange TeamExchange::at(uint8_t* memory, int64_t vocab, int num_members) {
  TeamExchange exchange = {};
  for (int turn = 0; turn < 2; ++turn) {
    exchange.parts[turn] = reinterpret_cast<Part*>(memory);
    memory += part_bytes(num_members);
    exchange.sums[turn] = reinterpret_cast<double*>(memory);
    memory += sum_bytes(vocab);
  }
  return exchange;
}

RowStats RowTeam::stats(const float* x, int64_t n) {
  const Range part = this->part(n);
  RowStats found = rows_.stats(x + part.begin, part.end - part.begin);
  if (num_members_ == 1) return found;
  mine().stats = found;
  const TeamExchange::Part* all = exchange();
  found = all[0].stats;
  for (int i = 1; i < num_members_; ++i) {
    found.max = std::fmax(found.max, all[i].stats.max);
    found.is_finite = found.is_finite && all[i].stats.is_finite;
  }
  return found;
}

int64_t RowTeam::find(const float* x, int64_t n, float bound) {
  const Range part = this->part(n);
  const int64_t index = rows_.find(x, part.begin, part.end, bound, true);
  if (num_members_ == 1) return index;
  mine().index = index < part.end ? index : n;
  const TeamExchange::Part* all = exchange();
  for (int i = 0; i < num_members_; ++i) {
    if (all[i].index < n) return all[i].index;
  }
  return n;
}

void RowTeam::scale(const float* x, int64_t n, float max, float factor, float* out) {
  const Range part = this->part(n);
  rows_.scale(x + part.begin, part.end - part.begin, max, factor, out + part.begin);
  barrier();
}

double RowTeam::mass(const float* x, int64_t n, float max, float floor) {
  if (num_members_ == 1) return rows_.mass(x, n, max, floor);
  const Range part = this->part(n);
  double* const sums = exchange_.sums[turn_];
  rows_.masses(x + part.begin, part.end - part.begin, max, floor, sums + part.begin / kSumBlock);
  exchange();
  double total = 0;
  for (int64_t i = 0; i < num_sums(n); ++i) total += sums[i];
  return total;
}

int64_t RowTeam::compact(const float* x, int64_t n, float floor, float* out) {
  const Range part = this->part(n);
  const int64_t count =
      rows_.compact(x + part.begin, part.end - part.begin, floor, out + part.begin);
  if (num_members_ == 1) return count;
  mine().index = count;
  const TeamExchange::Part* all = exchange();
  int64_t total = 0;
  for (int i = 0; i < num_members_; ++i) {
    const float* from = out + split(n, i, num_members_, kSumBlock).begin;
    if (is_first())
      std::memmove(out + total, from, sizeof(float) * static_cast<size_t>(all[i].index));
    total += all[i].index;
  }
  barrier();
  return total;
}

int64_t RowTeam::race(const float* scores, int64_t n, float floor, const SampleKey& key) {
  const Range part = this->part(n);
  const RaceWinner winner = rows_.race(scores, part.begin, part.end, floor, key);
  if (num_members_ == 1) return winner.index;
  mine().index = winner.index;
  mine().arrival = winner.arrival;
  const TeamExchange::Part* all = exchange();
  double best = INFINITY;
  int64_t index = n;
  for (int i = 0; i < num_members_; ++i) {
    if (all[i].arrival < best) {
      best = all[i].arrival;
      index = all[i].index;
    }
  }
  return index;
}

}  // namespace tgi::cpu
