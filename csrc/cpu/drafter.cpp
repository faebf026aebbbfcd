#include "drafter.h"

#include <algorithm>
#include <queue>
#include <utility>

namespace tgi::cpu {

namespace {

constexpr int kMaxCandidates = 32;       // of a chain, that are examined
constexpr double kSlotFading = 0.95;     // of a sequence's own cases, per new case
constexpr double kCommonFading = 0.998;  // of the cases of all sequences
constexpr double kSlotWeight = 4;        // cases that the common share counts as in a sequence
constexpr double kFirstWeight = 16;      // cases that kFirstShares count as in the common share
// Required gain of a draft over its cost: estimates err, and a step that is longer than necessary
// delays others.
constexpr double kMargin = 1.15;
// By length class, measured with chats and text edits on a model of 135 million parameters.
constexpr double kFirstShares[MatchScores::kNumLengths] = {0.2, 0.3,  0.4,  0.5,
                                                           0.6, 0.75, 0.85, 0.9};
constexpr size_t kFirstHeads = 256;

}  // namespace

void TokenHistory::start(std::vector<int32_t> ids, const MatchLimits& limits) {
  ids_ = std::move(ids);
  size_t heads = kFirstHeads;
  while (heads < 2 * ids_.size()) heads *= 2;
  if (heads_.size() > heads) {  // or the slot would always hold as much as its longest sequence
    heads_.clear(), heads_.shrink_to_fit();
    before_.clear(), before_.shrink_to_fit();
  }
  heads_.assign(heads, -1);
  before_.assign(ids_.size(), -1);
  for (size_t end = 0; end < ids_.size(); ++end) index(end, limits);
  find(limits);
}

void TokenHistory::append(int32_t id, const MatchLimits& limits) {
  const bool goes_on = match_ > 0 && ids_[source_] == id;
  if (2 * (ids_.size() + 1) > heads_.size()) {
    std::vector<int32_t> ids = std::move(ids_);
    ids.push_back(id);
    const size_t source = source_ + 1;
    const int64_t match = match_;
    start(std::move(ids), limits);
    if (goes_on) source_ = source, match_ = std::min(match + 1, limits.longest);
    return;
  }
  ids_.push_back(id);
  before_.push_back(-1);
  index(ids_.size() - 1, limits);
  if (goes_on) {
    ++source_;
    match_ = std::min(match_ + 1, limits.longest);
  } else {
    find(limits);
  }
}

void TokenHistory::extend(std::vector<int32_t>& drafts) const {
  const size_t at = source_ + drafts.size();
  drafts.push_back(at < ids_.size() ? ids_[at] : drafts[at - ids_.size()]);
}

// Returns the bucket of the run of `limits.shortest` tokens that ends at place `end`.
size_t TokenHistory::bucket(size_t end, const MatchLimits& limits) const {
  uint64_t hash = 0;
  for (int64_t i = 0; i < limits.shortest; ++i) {
    hash = (hash ^ static_cast<uint32_t>(ids_[end - static_cast<size_t>(i)])) * 0x9E3779B97F4A7C15u;
    hash ^= hash >> 32;
  }
  return hash & (heads_.size() - 1);
}

void TokenHistory::index(size_t end, const MatchLimits& limits) {
  if (end + 1 < static_cast<size_t>(limits.shortest)) return;
  const size_t at = bucket(end, limits);
  before_[end] = heads_[at];
  heads_[at] = static_cast<int32_t>(end);
}

// Returns the number of tokens that the texts ending at two places have in common, counted
// backwards.
int64_t TokenHistory::common(size_t end, size_t other, const MatchLimits& limits) const {
  int64_t count = 0;
  while (count < limits.longest && static_cast<size_t>(count) <= other &&
         ids_[end - static_cast<size_t>(count)] == ids_[other - static_cast<size_t>(count)]) {
    ++count;
  }
  return count;
}

void TokenHistory::find(const MatchLimits& limits) {
  match_ = 0;
  if (ids_.empty()) return;
  const size_t end = ids_.size() - 1;
  int32_t other = before_[end];
  for (int i = 0; i < kMaxCandidates && other >= 0 && match_ < limits.longest; ++i) {
    const int64_t found = common(end, static_cast<size_t>(other), limits);
    if (found >= limits.shortest && found > match_) {
      match_ = found;
      source_ = static_cast<size_t>(other) + 1;
    }
    other = before_[static_cast<size_t>(other)];
  }
}

int MatchScores::length_class(int64_t match) {
  if (match <= 4) return static_cast<int>(std::max<int64_t>(match, 1)) - 1;
  return match <= 6 ? 4 : match <= 10 ? 5 : match <= 18 ? 6 : 7;
}

void MatchScores::observe(int64_t match, bool was_sampled, double fading) {
  const auto at = static_cast<size_t>(length_class(match));
  cases_[at] = fading * cases_[at] + 1;
  sampled_[at] = fading * sampled_[at] + (was_sampled ? 1 : 0);
}

double MatchScores::share(int64_t match, double prior, double weight) const {
  const auto at = static_cast<size_t>(length_class(match));
  return (weight * prior + sampled_[at]) / (weight + cases_[at]);
}

Drafter::Drafter(int64_t num_slots, MatchLimits limits)
    : limits_(limits), slots_(static_cast<size_t>(num_slots)) {}

void Drafter::start(int32_t slot, std::vector<int32_t> ids) {
  Slot& found = slots_[static_cast<size_t>(slot)];
  found.scores = {};
  found.history.start(std::move(ids), limits_);
}

void Drafter::append(int32_t slot, int32_t id) {
  Slot& found = slots_[static_cast<size_t>(slot)];
  const int64_t match = found.history.match();
  if (match > 0) {  // learnt from whether it was drafted or not
    const bool was_sampled = found.history.next() == id;
    found.scores.observe(match, was_sampled, kSlotFading);
    scores_.observe(match, was_sampled, kCommonFading);
  }
  found.history.append(id, limits_);
}

double Drafter::likelihood(const Slot& slot, int64_t match) const {
  const double first = kFirstShares[MatchScores::length_class(match)];
  return slot.scores.share(match, scores_.share(match, first, kFirstWeight), kSlotWeight);
}

// Tokens per second are highest when drafts are added in order of probability, for as long as a
// draft brings more tokens per second than the step has without it.
std::vector<std::vector<int32_t>> Drafter::choose(const std::vector<DraftRequest>& requests,
                                                  const StepCost& cost, int64_t num_tokens) const {
  std::vector<std::vector<int32_t>> drafts(requests.size());
  struct Next {
    double likelihood;  // that this draft and those before it are sampled
    size_t request;
    bool operator<(const Next& other) const { return likelihood < other.likelihood; }
  };
  std::priority_queue<Next> queue;
  const auto push = [&](size_t at, double so_far) {
    const DraftRequest& request = requests[at];
    const auto count = static_cast<int64_t>(drafts[at].size());
    if (count >= request.max_drafts) return;
    if (!request.certain.empty()) {
      if (drafts[at].size() < request.certain.size()) queue.push({so_far, at});
      return;
    }
    const Slot& slot = slots_[static_cast<size_t>(request.slot)];
    if (slot.history.match() == 0) return;
    const int64_t match = std::min(slot.history.match() + count, limits_.longest);
    queue.push({so_far * likelihood(slot, match), at});
  };
  for (size_t at = 0; at < requests.size(); ++at) push(at, 1.0);
  double expected = static_cast<double>(num_tokens);
  double time = cost.base + expected * cost.token;
  while (!queue.empty()) {
    const Next next = queue.top();
    if (next.likelihood * time <= kMargin * cost.token * expected) break;
    queue.pop();
    const DraftRequest& request = requests[next.request];
    std::vector<int32_t>& list = drafts[next.request];
    if (request.certain.empty()) {
      slots_[static_cast<size_t>(request.slot)].history.extend(list);
    } else {
      list.push_back(request.certain[list.size()]);
    }
    expected += next.likelihood;
    time += cost.token;
    push(next.request, next.likelihood);
  }
  return drafts;
}

}  // namespace tgi::cpu
