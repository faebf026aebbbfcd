#include "sample.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <limits>

#include "draft_rows.h"
#include "sample_filter.h"
#include "sample_team.h"
#include "sample_top.h"
#include "step/kernel_sets.h"

namespace tgi::cpu {

namespace {

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr int64_t kScratchRows = 4;  // each of vocab floats

bool has_penalties(const SampleSlot& slot) {
  return slot.repetition_penalty != 1.0f || slot.frequency_penalty != 0.0f ||
         slot.presence_penalty != 0.0f;
}

float penalised(const SampleSlot& slot, int32_t count, float x) {
  const float reduced = x > 0 ? x / slot.repetition_penalty : x * slot.repetition_penalty;
  const int32_t in_output = count >> 1;
  if (in_output == 0) return reduced;
  return reduced - (slot.frequency_penalty * float(in_output) + slot.presence_penalty);
}

void apply_penalties(const SampleSlot& slot, const int32_t* counts, float* x, Range part) {
  for (int64_t i = part.begin; i < part.end; ++i) {
    if (counts[i] != 0) x[i] = penalised(slot, counts[i], x[i]);
  }
}

int64_t ahead_of(const DraftRows& drafts, int64_t row) {
  return drafts.ahead == nullptr ? 0 : drafts.ahead[row];
}

void apply_mask(const int32_t* mask, float* x, Range part) {
  for (int64_t first = part.begin; first < part.end; first += 32) {
    const auto allowed = static_cast<uint32_t>(mask[first / 32]);
    if (allowed == 0xffffffffu) continue;
    const int64_t last = std::min(first + 32, part.end);
    for (int64_t i = first; i < last; ++i) {
      if ((allowed >> (i - first) & 1u) == 0) x[i] = -INFINITY;
    }
  }
}

// Returns the row's logits after penalties, bias and masks: in `scratch` if any of these applies,
// otherwise the original logits. Each member changes its own part.
const float* modified(const RowTeam& team, const SampleParams& p, const DraftRows& drafts,
                      int64_t row, float* scratch) {
  const int64_t slot_index = p.slots[row], ahead = ahead_of(drafts, row);
  const SampleSlot& slot = p.records[slot_index];
  const float* logits = p.logits + row * p.vocab;
  const bool has_masked_ids = slot.num_masked > 0 && slot.position + ahead < slot.masked_until;
  if (!has_penalties(slot) && slot.num_biased == 0 && !has_masked_ids && p.mask == nullptr)
    return logits;
  const Range part = team.part(p.vocab);
  const auto is_mine = [=](int64_t id) { return part.begin <= id && id < part.end; };
  std::copy(logits + part.begin, logits + part.end, scratch + part.begin);
  if (has_penalties(slot)) {
    const int32_t* const counts = p.counts + slot_index * p.vocab;
    apply_penalties(slot, counts, scratch, part);
    for (int64_t i = 0; i < ahead; ++i) {  // the preceding drafts, which are not counted yet
      const int32_t* const end = drafts.drafts + row + 1;
      const int32_t id = end[i - ahead];
      const auto in_drafts = static_cast<int32_t>(std::count(end - ahead, end, id));
      if (is_mine(id)) scratch[id] = penalised(slot, counts[id] + 2 * in_drafts, logits[id]);
    }
  }
  for (int64_t i = 0; i < slot.num_biased; ++i) {
    const int32_t id = p.biased_ids[slot_index * p.biased_stride + i];
    if (is_mine(id)) scratch[id] += p.biased_values[slot_index * p.biased_stride + i];
  }
  for (int64_t i = 0; has_masked_ids && i < slot.num_masked; ++i) {
    const int32_t id = p.masked_ids[slot_index * p.masked_stride + i];
    if (is_mine(id)) scratch[id] = -INFINITY;
  }
  if (p.mask != nullptr) apply_mask(p.mask + row * ((p.vocab + 31) / 32), scratch, part);
  team.barrier();
  return scratch;
}

// Computes log softmax over the values [n] that are >= floor, whose masses add up to `mass`, at
// `id` and for the best values; returns the number of the latter. top_ids and top_logprobs:
// [wanted].
int64_t describe(const RowPasses& rows, const float* values, int64_t n, float max, float floor,
                 double mass, int64_t id, int64_t wanted, float* logprob, int32_t* top_ids,
                 float* top_logprobs) {
  const auto normaliser = static_cast<float>(std::log(mass));
  const auto log_softmax = [=](float value) { return (value - max) - normaliser; };
  *logprob = values[id] >= floor ? log_softmax(values[id]) : -INFINITY;
  const int64_t filled = list_top(rows, values, n, floor, wanted, top_logprobs, top_ids);
  std::transform(top_logprobs, top_logprobs + filled, top_logprobs, log_softmax);
  return filled;
}

// scratch: kScratchRows rows, shared. The first member writes the results.
void sample_row(RowTeam& team, const SampleParams& p, const DraftRows& drafts, int64_t row,
                float* scratch) {
  const SampleSlot& slot = p.records[p.slots[row]];
  const float* logits = p.logits + row * p.vocab;
  if (team.is_first()) {
    p.token_ids[row] = 0;
    p.is_finite[row] = false;
    p.logprobs[row] = kNaN;
    p.num_top[row] = 0;
  }
  const RowStats raw = team.stats(logits, p.vocab);
  if (!raw.is_finite) return;
  const float* values = modified(team, p, drafts, row, scratch);
  const RowStats stats = values == logits ? raw : team.stats(values, p.vocab);
  if (!stats.is_finite || stats.max == -INFINITY) return;

  int64_t id;
  float max = stats.max, floor = -FLT_MAX;
  if (slot.temperature == 0.0f) {
    id = team.find(values, p.vocab, stats.max);
  } else {
    float* scores = scratch + p.vocab;
    // With a temperature near 0 the best score must not become 0 * infinity.
    const float factor = std::min(1.0f / slot.temperature, FLT_MAX);
    team.scale(values, p.vocab, stats.max, factor, scores);
    floor = filter_scores(team, slot, scores, p.vocab, scratch + 2 * p.vocab);
    const SampleKey key = {slot.seed, static_cast<uint32_t>(slot.choice),
                           static_cast<uint64_t>(slot.position + ahead_of(drafts, row))};
    id = team.race(scores, p.vocab, floor, key);
    if (id == p.vocab) return;  // nothing can be sampled
    values = scores;
    max = 0.0f;
  }
  const bool wants_logprobs = (slot.flags & kWantsLogprobs) != 0;
  if ((slot.flags & kIsProcessed) == 0) {
    values = logits;
    max = raw.max;
    floor = -FLT_MAX;
  }
  const double mass = wants_logprobs ? team.mass(values, p.vocab, max, floor) : 0;
  if (!team.is_first()) return;
  if (wants_logprobs) {
    const int64_t wanted = std::min<int64_t>(slot.num_top, p.max_top);
    p.num_top[row] = static_cast<int32_t>(
        describe(team.passes(), values, p.vocab, max, floor, mass, id, wanted, p.logprobs + row,
                 p.top_ids + row * p.max_top, p.top_logprobs + row * p.max_top));
  }
  p.token_ids[row] = static_cast<int32_t>(id);
  p.is_finite[row] = true;
}

// The size of a member's work rows, rounded up to whole cache lines so that members share none.
int64_t member_bytes(int64_t vocab) {
  const int64_t bytes = kScratchRows * vocab * static_cast<int64_t>(sizeof(float));
  return (bytes + 63) / 64 * 64;
}

}  // namespace

int64_t sample_scratch_bytes(int64_t vocab, int num_members) {
  return num_members * member_bytes(vocab) + TeamExchange::num_bytes(vocab, num_members);
}

void sample(const SampleParams& p, const DraftRows& drafts, int64_t num_rows, uint8_t* scratch,
            int member, int num_members) {
  const RowPasses& rows = step::kernels().rows;
  const int64_t shared = num_members > 1 ? num_rows % num_members : 0;
  const Range own = split(num_rows - shared, member, num_members);
  RowTeam alone(rows);
  auto* const own_scratch = reinterpret_cast<float*>(scratch + member * member_bytes(p.vocab));
  for (int64_t row = own.begin; row < own.end; ++row)
    sample_row(alone, p, drafts, row, own_scratch);
  // The first member's work memory is shared: it is written only after all members have met in the
  // row's first pass.
  const auto exchange =
      TeamExchange::at(scratch + num_members * member_bytes(p.vocab), p.vocab, num_members);
  RowTeam together(rows, exchange, member, num_members);
  for (int64_t row = num_rows - shared; row < num_rows; ++row) {
    sample_row(together, p, drafts, row, reinterpret_cast<float*>(scratch));
  }
}

void accept_drafts(const SampleParams& p, const DraftRows& drafts, int64_t num_rows,
                   bool* is_accepted) {
  for (int64_t row = 0; row < num_rows; ++row) {
    const bool follows = ahead_of(drafts, row) > 0;
    is_accepted[row] = !follows || (is_accepted[row - 1] && p.is_finite[row - 1] &&
                                    p.token_ids[row - 1] == drafts.drafts[row]);
    if (!is_accepted[row] || !p.is_finite[row]) continue;
    SampleSlot& slot = p.records[p.slots[row]];
    slot.last_id = p.token_ids[row];
    slot.position += 1;
    if (has_penalties(slot)) p.counts[p.slots[row] * p.vocab + slot.last_id] += 2;
  }
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
      const double mass = rows.mass(logits, p.vocab, stats.max, -FLT_MAX);
      filled = describe(rows, logits, p.vocab, stats.max, -FLT_MAX, mass, p.token_ids[row],
                        p.num_top, p.logprobs + row, top_ids, top_logprobs);
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
