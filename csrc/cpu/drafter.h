// Drafts: guesses of a sequence's next tokens, which a step checks all at once. They come from the
// sequence itself: what followed the last time its newest tokens stood there. For one thread.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace tgi::cpu {

using std::size_t;

// Where tokens that end alike are looked for.
struct MatchLimits {
  int64_t shortest;  // tokens of a match
  int64_t longest;   // tokens that are compared
};

// A sequence's tokens, and the place before which stands the longest text that they end with:
//
//     the cat sat on the mat and the cat sat      match "the cat sat": 3 tokens, goes on with "on"
//                 ^ source            newest ^
//
// Found as LZ77 finds it (Ziv and Lempel, 1977): places behind equal short runs are chained by a
// hash, newest first, and the longest match among the first 32 of them counts. It follows the text
// at no cost while that goes on as before. A suffix automaton, which finds the longest of all, was
// measured beside it: it drafts no better, for ten times the memory (docs/drafts.md).
class TokenHistory {
 public:
  void start(std::vector<int32_t> ids, const MatchLimits& limits);
  void append(int32_t id, const MatchLimits& limits);

  // Tokens of the match; 0: there is none.
  int64_t match() const { return match_; }
  // What follows it. Needs a match.
  int32_t next() const { return ids_[source_]; }
  // Appends to `drafts` what follows behind those that are there, all of this match; a source that
  // ends is read on in the drafts.
  void extend(std::vector<int32_t>& drafts) const;

 private:
  void index(size_t end, const MatchLimits& limits);
  void find(const MatchLimits& limits);
  size_t bucket(size_t end, const MatchLimits& limits) const;
  int64_t common(size_t end, size_t other, const MatchLimits& limits) const;

  std::vector<int32_t> ids_;
  std::vector<int32_t> before_;  // of each place, the one before with the same hash; -1: none
  std::vector<int32_t> heads_;   // by hash, the newest place; a power of two of them
  size_t source_ = 0;
  int64_t match_ = 0;
};

// How often what followed a match was drawn, by the match's length; old cases fade.
class MatchScores {
 public:
  static constexpr int kNumLengths = 8;
  static int length_class(int64_t match);

  void observe(int64_t match, bool was_drawn, double fading);
  // The share that was drawn, where `prior` counts as so many cases.
  double share(int64_t match, double prior, double weight) const;

 private:
  std::array<double, kNumLengths> cases_ = {}, drawn_ = {};
};

// What a step costs: base + tokens * token, in any unit.
struct StepCost {
  double base;
  double token;
};

// A row that may have drafts.
struct DraftWish {
  int32_t slot;
  int64_t most;                  // tokens
  std::vector<int32_t> certain;  // what must come next
};

class Drafter {
 public:
  Drafter(int64_t num_slots, MatchLimits limits);
  int64_t num_slots() const { return static_cast<int64_t>(slots_.size()); }

  // Gives a slot to a sequence that has these tokens.
  void start(int32_t slot, std::vector<int32_t> ids);
  // Takes a token that the slot's sequence has drawn.
  void append(int32_t slot, int32_t id);
  // The drafts of each wish, in a step of so many tokens beside them: as many in all as make the
  // step's tokens come fastest, by the cost and by how likely each is to be drawn.
  std::vector<std::vector<int32_t>> choose(const std::vector<DraftWish>& wishes,
                                           const StepCost& cost, int64_t num_tokens) const;

 private:
  struct Slot {
    TokenHistory history;
    MatchScores scores;
  };
  double likelihood(const Slot& slot, int64_t match) const;

  MatchLimits limits_;
  std::vector<Slot> slots_;
  MatchScores scores_;  // of all sequences: what a new one is taken for
};

}  // namespace tgi::cpu
