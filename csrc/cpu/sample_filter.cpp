#include "sample_filter.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <functional>

namespace tgi::cpu {

namespace {

// A score this far below the best weighs 6e-6 of it. Cut-offs are nearly always higher, so
// searching only the scores above this bound is usually enough; otherwise all scores are searched.
constexpr float kNear = -12.0f;

// Returns the k-th largest of values [n], 1 <= k <= n; reorders them.
float kth_largest(float* values, int64_t n, int64_t k) {
  std::nth_element(values, values + k - 1, values + n, std::greater<float>());
  return values[k - 1];
}

// Returns the first of values [n], in the order of `precedes`, at which the values up to it weigh
// `target`, or the last value; reorders them. By halving: each round moves the first half to the
// front and adds up its weight with mass(values, count), so all rounds together cost two passes.
template <typename Value, typename Precedes, typename Mass>
Value value_at_mass(Value* values, int64_t n, double target, const Precedes& precedes,
                    const Mass& mass) {
  double before = 0;
  int64_t begin = 0, end = n;
  while (end - begin > 1) {
    const int64_t middle = begin + (end - begin) / 2;
    std::nth_element(values + begin, values + middle, values + end, precedes);
    const double half = mass(values + begin, middle - begin);
    if (before + half >= target) {
      end = middle;
    } else {
      before += half;
      begin = middle;
    }
  }
  return values[begin];
}

struct Deviation {
  float distance;  // of the score from the mean score, that is, information minus entropy
  float weight;
};

// Keeps the most typical scores, up to typical_p of the mass of those >= floor, and sets the others
// to -infinity. Meister et al., Locally Typical Sampling, section 4. scratch: 2 * vocab floats.
void keep_typical(float* scores, int64_t vocab, float floor, float typical_p, float* scratch) {
  auto* deviations = reinterpret_cast<Deviation*>(scratch);
  double mass = 0, weighted = 0;
  int64_t count = 0;
  for (int64_t i = 0; i < vocab; ++i) {
    if (!(scores[i] >= floor)) continue;
    const float weight = std::exp(scores[i]);
    mass += weight;
    weighted += double(weight) * scores[i];
    deviations[count++] = {scores[i], weight};
  }
  const auto mean = static_cast<float>(weighted / mass);
  for (int64_t i = 0; i < count; ++i)
    deviations[i].distance = std::fabs(deviations[i].distance - mean);
  const auto is_nearer = [](const Deviation& a, const Deviation& b) {
    return a.distance < b.distance;
  };
  const auto weigh = [](const Deviation* part, int64_t n) {
    double sum = 0;
    for (int64_t i = 0; i < n; ++i) sum += part[i].weight;
    return sum;
  };
  const float limit = value_at_mass(deviations, count, mass * typical_p, is_nearer, weigh).distance;
  for (int64_t i = 0; i < vocab; ++i) {
    if (!(scores[i] >= floor && std::fabs(scores[i] - mean) <= limit)) scores[i] = -INFINITY;
  }
}

// The scores among which the cut-off is searched.
struct Candidates {
  int64_t count;
  double mass;  // of all scores; unused if top-k applies first
};

Candidates gather(RowTeam& team, const SampleSlot& slot, const float* scores, int64_t vocab,
                  float* scratch) {
  if (slot.top_k > 0) {
    int64_t count = team.compact(scores, vocab, kNear, scratch);
    if (count < slot.top_k) count = team.compact(scores, vocab, -FLT_MAX, scratch);
    return {count, 0};
  }
  const double mass = team.mass(scores, vocab, 0.0f, -FLT_MAX);
  const bool is_near = team.mass(scores, vocab, 0.0f, kNear) >= mass * slot.top_p;
  return {team.compact(scores, vocab, is_near ? kNear : -FLT_MAX, scratch), mass};
}

// Returns the lowest score that top-k and top-p keep among those in scratch; reorders them.
float find_cutoff(const RowPasses& rows, const SampleSlot& slot, Candidates found, float* scratch) {
  float floor = -FLT_MAX;
  if (slot.top_k > 0) {
    if (slot.top_k < found.count) {
      floor = kth_largest(scratch, found.count, slot.top_k);
      const auto is_kept = [=](float score) { return score >= floor; };
      found.count = std::partition(scratch, scratch + found.count, is_kept) - scratch;
    }
    found.mass = rows.mass(scratch, found.count, 0.0f, floor);
  }
  if (slot.top_p >= 1.0f) return floor;
  const auto weigh = [&](const float* part, int64_t n) {
    return rows.mass(part, n, 0.0f, -FLT_MAX);
  };
  const double target = found.mass * slot.top_p;
  return std::max(floor, value_at_mass(scratch, found.count, target, std::greater<float>(), weigh));
}

}  // namespace

float filter_scores(RowTeam& team, const SampleSlot& slot, float* scores, int64_t vocab,
                    float* scratch) {
  float floor = -FLT_MAX;
  if (slot.top_k > 0 || slot.top_p < 1.0f) {
    const Candidates found = gather(team, slot, scores, vocab, scratch);
    floor = static_cast<float>(
        team.once([&] { return double(find_cutoff(team.passes(), slot, found, scratch)); }));
  }
  if (slot.min_p > 0.0f) floor = std::max(floor, std::log(slot.min_p));
  if (slot.typical_p < 1.0f) {
    if (team.is_first()) keep_typical(scores, vocab, floor, slot.typical_p, scratch);
    team.barrier();
  }
  return floor;
}

}  // namespace tgi::cpu
