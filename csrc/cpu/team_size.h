// How many members of a team take part in its runs while other programs use its cores.
//
// Members meet at a barrier after each operator, so one without a core holds up all others: on two
// cores beside one busy program, two members are slower than one. The system does not tell how
// many cores are free; the team finds out from the time in which its members had none.
#pragma once

#include <vector>

namespace tgi::cpu {

// Knows no clock and no threads. Not thread-safe.
class TeamSize {
 public:
  // At first all members, `most`, take part.
  explicit TeamSize(int most);

  // The number of members of the next run, in [1, most].
  int value() const { return value_; }

  // Reports a run of value() members: the time at which it ended, how long it took, and for how
  // long each member had no core, all in seconds.
  void observe(double ended_at, double run_s, const double* lost_s);

 private:
  // Returns the share of its possible speed at which the team ran since the last change.
  double efficiency() const;
  void resize(int value);

  int most_;
  int value_;
  bool is_trial_ = false;  // one member more takes part, to see whether it has a core
  double next_trial_at_ = 0, trial_every_s_;
  double window_s_ = 0;
  std::vector<double> lost_s_;  // by member, of the window
};

}  // namespace tgi::cpu
