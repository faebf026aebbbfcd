#include "sample.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <functional>
#include <limits>
#include <vector>

#include "isa.h"
#include "sample_rows_impl.h"

namespace tgi::cpu {

namespace {

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

// Scores this far below the best weigh 6e-6 of it: cut-offs nearly always lie above, so a search
// through those alone will do; where it does not, all are searched.
constexpr float kNear = -12.0f;

bool has_penalties(const SampleSlot& slot) {
  return slot.repetition_penalty != 1.0f || slot.frequency_penalty != 0.0f ||
         slot.presence_penalty != 0.0f;
}

void apply_penalties(const SampleSlot& slot, const int32_t* counts, float* x, int64_t vocab) {
  for (int64_t i = 0; i < vocab; ++i) {
    if (counts[i] == 0) continue;
    x[i] = x[i] > 0 ? x[i] / slot.repetition_penalty : x[i] * slot.repetition_penalty;
    const int32_t in_output = counts[i] >> 1;
    if (in_output == 0) continue;
    x[i] -= slot.frequency_penalty * float(in_output) + slot.presence_penalty;
  }
}

void apply_mask(const int32_t* mask, float* x, int64_t vocab) {
  for (int64_t first = 0; first < vocab; first += 32) {
    const auto allowed = static_cast<uint32_t>(mask[first / 32]);
    if (allowed == 0xffffffffu) continue;
    const int64_t last = std::min(first + 32, vocab);
    for (int64_t i = first; i < last; ++i) {
      if ((allowed >> (i - first) & 1u) == 0) x[i] = -INFINITY;
    }
  }
}

// The row's logits after penalties, bias and masks: in `room` where anything applies, else where
// they are.
const float* modified(const SampleParams& p, int64_t row, float* room) {
  const int64_t slot_index = p.slots[row];
  const SampleSlot& slot = p.records[slot_index];
  const float* logits = p.logits + row * p.vocab;
  const bool is_held = slot.num_masked > 0 && slot.position < slot.masked_until;
  if (!has_penalties(slot) && slot.num_biased == 0 && !is_held && p.mask == nullptr) return logits;
  std::copy(logits, logits + p.vocab, room);
  if (has_penalties(slot)) apply_penalties(slot, p.counts + slot_index * p.vocab, room, p.vocab);
  for (int64_t i = 0; i < slot.num_biased; ++i) {
    room[p.biased_ids[slot_index * p.biased_stride + i]] +=
        p.biased_values[slot_index * p.biased_stride + i];
  }
  for (int64_t i = 0; is_held && i < slot.num_masked; ++i) {
    room[p.masked_ids[slot_index * p.masked_stride + i]] = -INFINITY;
  }
  if (p.mask != nullptr) apply_mask(p.mask + row * ((p.vocab + 31) / 32), room, p.vocab);
  return room;
}

// The k-th largest of values [n], 1 <= k <= n; reorders them.
float kth_largest(float* values, int64_t n, int64_t k) {
  std::nth_element(values, values + k - 1, values + n, std::greater<float>());
  return values[k - 1];
}

// Of values [n] in the order of `precedes`, the first at which those up to it weigh `target`, or
// the last; reorders them. Halving: each round moves the first half to the front and adds up its
// weight by mass(values, count), so all rounds together cost two passes.
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
  float distance;  // of the score from the mean score: information less entropy
  float weight;
};

// Keeps the most typical scores that weigh typical_p of those >= floor; the others become
// -infinity. Meister et al., Locally Typical Sampling, section 4. room: 2 * vocab floats.
void keep_typical(float* scores, int64_t vocab, float floor, float typical_p, float* room) {
  auto* deviations = reinterpret_cast<Deviation*>(room);
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

// Applies top-k, top-p, min-p and typical-p to scores [vocab] (best 0): returns the least score
// that stays. room: 2 * vocab floats.
float cut_off(const SampleSlot& slot, float* scores, int64_t vocab, float* room) {
  float floor = -FLT_MAX;
  int64_t count = 0;  // of the candidates in room, once they are there
  double mass = 0;
  if (slot.top_k > 0) {
    count = TGI_VARIANT(row_compact)(scores, vocab, kNear, room);
    if (count < slot.top_k) count = TGI_VARIANT(row_compact)(scores, vocab, floor, room);
    if (slot.top_k < count) {
      floor = kth_largest(room, count, slot.top_k);
      count =
          std::partition(room, room + count, [=](float score) { return score >= floor; }) - room;
    }
    mass = TGI_VARIANT(row_mass)(room, count, 0.0f, floor);
  }
  if (slot.top_p < 1.0f) {
    if (count == 0) {
      mass = TGI_VARIANT(row_mass)(scores, vocab, 0.0f, floor);
      const bool is_near = TGI_VARIANT(row_mass)(scores, vocab, 0.0f, kNear) >= mass * slot.top_p;
      count = TGI_VARIANT(row_compact)(scores, vocab, is_near ? kNear : floor, room);
    }
    const auto weigh = [](const float* part, int64_t n) {
      return TGI_VARIANT(row_mass)(part, n, 0.0f, -FLT_MAX);
    };
    const float least = value_at_mass(room, count, mass * slot.top_p, std::greater<float>(), weigh);
    floor = std::max(floor, least);
  }
  if (slot.min_p > 0.0f) floor = std::max(floor, std::log(slot.min_p));
  if (slot.typical_p < 1.0f) keep_typical(scores, vocab, floor, slot.typical_p, room);
  return floor;
}

struct Top {
  float value;
  int32_t id;
};

// The `wanted` best of values [n] that are >= floor, best first, lowest id first on ties.
std::vector<Top> top_list(const float* values, int64_t n, float floor, int64_t wanted) {
  const auto is_better = [](const Top& a, const Top& b) {
    return a.value != b.value ? a.value > b.value : a.id < b.id;
  };
  std::vector<Top> heap;  // its front is the worst
  heap.reserve(static_cast<size_t>(wanted));
  for (int64_t i = 0; wanted > 0; ++i) {
    const bool is_full = static_cast<int64_t>(heap.size()) == wanted;
    i = TGI_VARIANT(row_find)(values, i, n, is_full ? heap.front().value : floor, !is_full);
    if (i == n) break;
    if (is_full) {
      std::pop_heap(heap.begin(), heap.end(), is_better);
      heap.pop_back();
    }
    heap.push_back({values[i], static_cast<int32_t>(i)});
    std::push_heap(heap.begin(), heap.end(), is_better);
  }
  std::sort_heap(heap.begin(), heap.end(), is_better);
  return heap;
}

// log softmax of values [n] that are >= floor, at `id` and of the best; returns how many of these
// there are.
int64_t describe(const float* values, int64_t n, float max, float floor, int64_t id, int64_t wanted,
                 float* logprob, int32_t* top_ids, float* top_logprobs) {
  const auto normaliser =
      static_cast<float>(std::log(TGI_VARIANT(row_mass)(values, n, max, floor)));
  const auto log_softmax = [=](float value) { return (value - max) - normaliser; };
  *logprob = values[id] >= floor ? log_softmax(values[id]) : -INFINITY;
  int64_t filled = 0;
  for (const Top& top : top_list(values, n, floor, wanted)) {
    top_ids[filled] = top.id;
    top_logprobs[filled] = log_softmax(top.value);
    ++filled;
  }
  return filled;
}

void sample_row(const SampleParams& p, int64_t row, float* scratch) {
  SampleSlot& slot = p.records[p.slots[row]];
  const float* logits = p.logits + row * p.vocab;
  int32_t* top_ids = p.top_ids + row * p.max_top;
  float* top_logprobs = p.top_logprobs + row * p.max_top;
  p.token_ids[row] = 0;
  p.is_finite[row] = false;
  p.logprobs[row] = kNaN;
  p.num_top[row] = 0;
  const RowStats raw = TGI_VARIANT(row_stats)(logits, p.vocab);
  if (!raw.is_finite) return;
  const float* values = modified(p, row, scratch);
  const RowStats stats = values == logits ? raw : TGI_VARIANT(row_stats)(values, p.vocab);
  if (!stats.is_finite || stats.max == -INFINITY) return;

  int64_t id;
  float max = stats.max, floor = -FLT_MAX;
  if (slot.temperature == 0.0f) {
    id = TGI_VARIANT(row_find)(values, 0, p.vocab, stats.max, true);
  } else {
    float* scores = scratch + p.vocab;
    // A temperature near 0 must not make the best score 0 * infinity.
    const float factor = std::min(1.0f / slot.temperature, FLT_MAX);
    TGI_VARIANT(row_scale)(values, p.vocab, stats.max, factor, scores);
    floor = cut_off(slot, scores, p.vocab, scratch + 2 * p.vocab);
    const DrawKey key = {slot.seed, static_cast<uint32_t>(slot.choice),
                         static_cast<uint64_t>(slot.position)};
    id = TGI_VARIANT(row_race)(scores, p.vocab, floor, key);
    values = scores;
    max = 0.0f;
  }
  if ((slot.flags & kWantsLogprobs) != 0) {
    const bool is_processed = (slot.flags & kIsProcessed) != 0;
    const int64_t wanted = std::min<int64_t>(slot.num_top, p.max_top);
    p.num_top[row] =
        static_cast<int32_t>(is_processed ? describe(values, p.vocab, max, floor, id, wanted,
                                                     p.logprobs + row, top_ids, top_logprobs)
                                          : describe(logits, p.vocab, raw.max, -FLT_MAX, id, wanted,
                                                     p.logprobs + row, top_ids, top_logprobs));
  }
  p.token_ids[row] = static_cast<int32_t>(id);
  p.is_finite[row] = true;
  slot.last_id = static_cast<int32_t>(id);
  slot.position += 1;
  if (has_penalties(slot)) p.counts[p.slots[row] * p.vocab + id] += 2;
}

}  // namespace

void sample(const SampleParams& p, float* scratch, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) sample_row(p, row, scratch);
}

void token_logprobs(const TokenLogprobsParams& p, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const float* logits = p.logits + row * p.vocab;
    int32_t* top_ids = p.top_ids + row * p.num_top;
    float* top_logprobs = p.top_logprobs + row * p.num_top;
    const RowStats stats = TGI_VARIANT(row_stats)(logits, p.vocab);
    int64_t filled = 0;
    if (stats.is_finite && stats.max > -INFINITY) {
      filled = describe(logits, p.vocab, stats.max, -FLT_MAX, p.token_ids[row], p.num_top,
                        p.logprobs + row, top_ids, top_logprobs);
    } else {
      p.logprobs[row] = kNaN;
    }
    for (; filled < p.num_top; ++filled) {
      top_ids[filled] = 0;
      top_logprobs[filled] = stats.is_finite ? -INFINITY : kNaN;
    }
  }
}

}  // namespace tgi::cpu
