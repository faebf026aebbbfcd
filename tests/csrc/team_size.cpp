// Simulates a team beside busy programs. Arguments: members, cores that other programs use, and
// seconds, the last two repeated for each phase. Prints, for each phase, the sizes of its last
// second with the number of runs that had them.
#include "cpu/team_size.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <random>
#include <vector>

int main(int count, char** arguments) {
  const int most = std::atoi(arguments[1]);
  tgi::cpu::TeamSize size(most);
  std::mt19937 random(0);
  std::uniform_real_distribution<double> uniform;
  double now = 0;
  for (int i = 2; i + 1 < count; i += 2) {
    const int num_busy = std::atoi(arguments[i]);
    const double end = now + std::atof(arguments[i + 1]);
    std::map<int, int> seen;
    while (now < end) {
      // Members that exceed the free cores share one with another program, which has it for 8 ms
      // of every 12. All members wait at the end of a step, which takes 3 ms if all have cores.
      const int members = size.value();
      const int crowded = std::clamp(members - (most - num_busy), 0, members);
      // Every member has a short pause, which holds up the step as a whole.
      std::vector<double> lost(static_cast<size_t>(most), 0.0001);
      double run_s = 0.003 * most / members, longest = 0;
      for (int member = members - crowded; member < members; ++member) {
        double& each = lost[static_cast<size_t>(member)];
        if (uniform(random) < 8 / 12.0) each += 0.008 * uniform(random);
        if (uniform(random) < run_s / 0.012) each += 0.008;
        longest = std::max(longest, each);
      }
      run_s += longest;
      now += run_s;
      if (now > end - 1) ++seen[members];
      size.observe(now, run_s, lost.data());
    }
    for (const auto& [members, runs] : seen) std::printf("%d:%d ", members, runs);
    std::printf("\n");
  }
}
