// Draft tokens: guesses of a sequence's next tokens, which one step verifies together. They come
// from the sequence itself: the tokens that followed the previous occurrence of its newest tokens.
// Not thread-safe.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace tgi::cpu {

using std::size_t;

// Lengths of the matches to search for.
struct MatchLimits {
  int64_t shortest;  // minimum number of tokens in a match
  int64_t longest;   // maximum number of tokens compared
};

// A sequence's tokens, and the place that follows an earlier occurrence of the longest matching
// suffix:
//
//     the cat sat on the mat and the cat sat      match "the cat sat": 3 tokens, followed by "on"
//                 ^ source            newest ^
//
// The search works as in LZ77 (Ziv and Lempel, 1977): a hash chains the places that follow equal
// short runs, newest first, and the longest match among the first 32 of them is used. While the
// text continues as before, the match is extended at no cost. A suffix automaton, which finds the
// longest match of all, was measured as well: it drafts no better and needs ten times the memory
// (docs/drafts.md).
class TokenHistory {
 public:
  void start(std::vector<int32_t> ids, const MatchLimits& limits);
  void append(int32_t id, const MatchLimits& limits);

  // Number of tokens in the text.
  int64_t length() const { return static_cast<int64_t>(ids_.size()); }
  // Number of tokens in the match; 0 if there is none.
  int64_t match() const { return match_; }
  // The token that follows the match. Requires a match.
  int32_t next() const { return ids_[source_]; }
  // Appends the next token to `drafts`, which holds only tokens drafted from this match. If the
  // source reaches the end of the text, it continues in the drafts.
  void extend(std::vector<int32_t>& drafts) const;

 private:
  void index(size_t end, const MatchLimits& limits);
  void find(const MatchLimits& limits);
  size_t bucket(size_t end, const MatchLimits& limits) const;
  int64_t common(size_t end, size_t other, const MatchLimits& limits) const;

  std::vector<int32_t> ids_;
  std::vector<int32_t> before_;  // per place, the previous place with the same hash; -1: none
  std::vector<int32_t> heads_;   // by hash, the newest place; the size is a power of two
  size_t source_ = 0;
  int64_t match_ = 0;
};

// How often the token that followed a match was sampled, by match length. Old cases fade.
class MatchScores {
 public:
  static constexpr int kNumLengths = 8;
  static int length_class(int64_t match);

  void observe(int64_t match, bool was_sampled, double fading);
  // Returns the share that was sampled; `prior` counts as `weight` cases.
  double share(int64_t match, double prior, double weight) const;

 private:
  std::array<double, kNumLengths> cases_ = {}, sampled_ = {};
};

// The cost of a step: base + tokens * token, in any unit.
struct StepCost {
  double base;
  double token;
};

// A row that may have drafts.
struct DraftRequest {
  int32_t slot;
  int64_t max_drafts;            // maximum number of drafts
  std::vector<int32_t> certain;  // tokens that must come next
};

class Drafter {
 public:
  Drafter(int64_t num_slots, MatchLimits limits);
  int64_t num_slots() const { return static_cast<int64_t>(slots_.size()); }

  // Assigns a slot to a sequence with these tokens.
  void start(int32_t slot, std::vector<int32_t> ids);
  // Appends a token that was sampled for the slot's sequence.
  void append(int32_t slot, int32_t id);
  // Returns the number of tokens of the slot's sequence.
  int64_t length(int32_t slot) const { return slots_[static_cast<size_t>(slot)].history.length(); }
  // Returns the drafts for each request, in a step with `num_tokens` tokens besides the drafts. The
  // total number of drafts is the one that maximises the expected tokens per second, given the cost
  // and each draft's probability.
  std::vector<std::vector<int32_t>> choose(const std::vector<DraftRequest>& requests,
                                           const StepCost& cost, int64_t num_tokens) const;

 private:
  struct Slot {
    TokenHistory history;
    MatchScores scores;
  };
  double likelihood(const Slot& slot, int64_t match) const;

  MatchLimits limits_;
  std::vector<Slot> slots_;
  MatchScores scores_;  // over all sequences: the prior for a new one
};

}  // namespace tgi::cpu
