#include "sample.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <limits>

#include "sample_cut.h"
#include "sample_top.h"
#include "step/kernel_sets.h"

namespace tgi::cpu {

namespace {

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

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

// log softmax of values [n] that are >= floor, at `id` and of the best; returns how many of these
// there are. top_ids and top_logprobs: [wanted].
int64_t describe(const RowPasses& rows, const float* values, int64_t n, float max, float floor,
                 int64_t id, int64_t wanted, float* logprob, int32_t* top_ids,
                 float* top_logprobs) {
  const auto normaliser = static_cast<float>(std::log(rows.mass(values, n, max, floor)));
  const auto log_softmax = [=](float value) { return (value - max) - normaliser; };
  *logprob = values[id] >= floor ? log_softmax(values[id]) : -INFINITY;
  const int64_t filled = list_top(rows, values, n, floor, wanted, top_logprobs, top_ids);
  std::transform(top_logprobs, top_logprobs + filled, top_logprobs, log_softmax);
  return filled;
}

void sample_row(const RowPasses& rows, const SampleParams& p, int64_t row, float* scratch) {
  SampleSlot& slot = p.records[p.slots[row]];
  const float* logits = p.logits + row * p.vocab;
  int32_t* top_ids = p.top_ids + row * p.max_top;
  float* top_logprobs = p.top_logprobs + row * p.max_top;
  p.token_ids[row] = 0;
  p.is_finite[row] = false;
  p.logprobs[row] = kNaN;
  p.num_top[row] = 0;
  const RowStats raw = rows.stats(logits, p.vocab);
  if (!raw.is_finite) return;
  const float* values = modified(p, row, scratch);
  const RowStats stats = values == logits ? raw : rows.stats(values, p.vocab);
  if (!stats.is_finite || stats.max == -INFINITY) return;

  int64_t id;
  float max = stats.max, floor = -FLT_MAX;
  if (slot.temperature == 0.0f) {
    id = rows.find(values, 0, p.vocab, stats.max, true);
  } else {
    float* scores = scratch + p.vocab;
    // A temperature near 0 must not make the best score 0 * infinity.
    const float factor = std::min(1.0f / slot.temperature, FLT_MAX);
    rows.scale(values, p.vocab, stats.max, factor, scores);
    floor = cut_off(rows, slot, scores, p.vocab, scratch + 2 * p.vocab);
    const DrawKey key = {slot.seed, static_cast<uint32_t>(slot.choice),
                         static_cast<uint64_t>(slot.position)};
    id = rows.race(scores, p.vocab, floor, key);
    if (id == p.vocab) return;  // nothing can be drawn
    values = scores;
    max = 0.0f;
  }
  if ((slot.flags & kWantsLogprobs) != 0) {
    const bool is_processed = (slot.flags & kIsProcessed) != 0;
    const int64_t wanted = std::min<int64_t>(slot.num_top, p.max_top);
    p.num_top[row] = static_cast<int32_t>(
        is_processed ? describe(rows, values, p.vocab, max, floor, id, wanted, p.logprobs + row,
                                top_ids, top_logprobs)
                     : describe(rows, logits, p.vocab, raw.max, -FLT_MAX, id, wanted,
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
  const RowPasses& rows = step::kernels().rows;
  for (int64_t row = begin; row < end; ++row) sample_row(rows, p, row, scratch);
}

void token_logprobs(const TokenLogprobsParams& p, int64_t begin, int64_t end) {
  const RowPasses& rows = step::kernels().rows;
  for (int64_t row = begin; row < end; ++row) {
    const float* logits = p.logits + row * p.vocab;
    int32_t* top_ids = p.top_ids + row * p.num_top;
    float* top_logprobs = p.top_logprobs + row * p.num_top;
    const RowStats stats = rows.stats(logits, p.vocab);
    int64_t filled = 0;
    if (stats.is_finite && stats.max > -INFINITY) {
      filled = describe(rows, logits, p.vocab, stats.max, -FLT_MAX, p.token_ids[row], p.num_top,
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
