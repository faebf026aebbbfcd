#include "team_size.h"

#include <algorithm>

namespace tgi::cpu {

namespace {

// Time in runs after which the size is judged. Schedulers take a core away for 3 to 10 ms at a
// time, so a shorter window would mistake a single such pause for a busy core.
constexpr double kWindowS = 0.1;
// A trial costs a window at the slower size: at most a thirtieth of the time.
constexpr double kFirstTrialS = 0.1, kLongestTrialS = 3.2;
// Pauses below either are not another program's turn: waking up, interrupts, the system's own
// threads. In a large team they would add up.
constexpr double kShortPauseS = 0.001, kShortPauseShare = 0.02;
// A member is left out only if that promises a gain of a tenth.
constexpr double kGain = 1.1;

}  // namespace

TeamSize::TeamSize(int most)
    : most_(most), value_(most), trial_every_s_(kFirstTrialS), lost_s_(static_cast<size_t>(most)) {}

void TeamSize::observe(double ended_at, double run_s, const double* lost_s) {
  if (most_ == 1) return;
  window_s_ += run_s;
  for (int member = 0; member < value_; ++member) {
    const bool is_short = lost_s[member] < std::max(kShortPauseS, kShortPauseShare * run_s);
    if (!is_short) lost_s_[static_cast<size_t>(member)] += lost_s[member];
  }
  if (window_s_ < kWindowS) return;
  const bool has_failed = value_ * efficiency() * kGain < value_ - 1;
  if (has_failed || is_trial_) {
    trial_every_s_ =
        has_failed && is_trial_ ? std::min(2 * trial_every_s_, kLongestTrialS) : kFirstTrialS;
    next_trial_at_ = ended_at + trial_every_s_;
    is_trial_ = false;
  }
  if (has_failed) {
    resize(value_ - 1);
  } else if (value_ < most_ && ended_at >= next_trial_at_) {
    is_trial_ = true;
    resize(value_ + 1);
  } else {
    resize(value_);
  }
}

// Members lose their cores at different times, and each such time holds up all of them: the team
// advances only while every member has a core.
double TeamSize::efficiency() const {
  double product = 1;
  for (int member = 0; member < value_; ++member) {
    product *= std::max(0.0, 1 - lost_s_[static_cast<size_t>(member)] / window_s_);
  }
  return product;
}

void TeamSize::resize(int value) {
  value_ = value;
  window_s_ = 0;
  std::fill(lost_s_.begin(), lost_s_.end(), 0.0);
}

}  // namespace tgi::cpu
