// Stresses the thread team for the thread sanitizer: alternating callers, barriers, parking,
// wake-ups, replaced teams, teams that leave members out. Exits with 0 if every run saw the writes
// of its caller and of the other members.
#include <atomic>
#include <chrono>
#include <cstdio>
#include <thread>
#include <vector>

#include "cpu/team.h"

namespace {

std::atomic<int> num_errors{0};

// Runs two phases: each member writes its cell and, after the barrier, sums all cells.
void run_once(int salt) {
  std::vector<int> cells, sums;
  tgi::cpu::run_on_team(
      [&](int num_members) {
        cells.assign(static_cast<size_t>(num_members), -1);
        sums.assign(static_cast<size_t>(num_members), 0);
      },
      [&](int member, int num_members) {
        cells[static_cast<size_t>(member)] = salt + member;
        tgi::cpu::team_barrier();
        int sum = 0;
        for (const int cell : cells) sum += cell;
        tgi::cpu::team_barrier();
        sums[static_cast<size_t>(member)] = sum;
        if (static_cast<int>(cells.size()) != num_members) num_errors.fetch_add(1);
      });
  const int count = static_cast<int>(cells.size());
  for (const int sum : sums) {
    if (sum != count * salt + count * (count - 1) / 2) num_errors.fetch_add(1);
  }
}

// Runs a team with more members than cores until it has shrunk and grown. Stops after a minute.
void change_size() {
  const int members = static_cast<int>(std::thread::hardware_concurrency()) + 14;
  tgi::cpu::configure_team({members, 0, false, 50, true});
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::minutes(1);
  int last = members;
  bool has_shrunk = false, has_grown = false;
  for (int salt = 0; !(has_shrunk && has_grown); ++salt) {
    if (std::chrono::steady_clock::now() > deadline) {
      num_errors.fetch_add(1);
      return;
    }
    run_once(salt);
    const int now = tgi::cpu::num_running_threads();
    has_shrunk = has_shrunk || now < last;
    has_grown = has_grown || now > last;
    last = now;
  }
}

}  // namespace

int main() {
  for (const int threads : {1, 2, 3, 5}) {
    for (const int spin_us : {0, 200}) {
      tgi::cpu::configure_team({threads, 0, false, spin_us});
      std::vector<std::thread> callers;
      for (int caller = 0; caller < 3; ++caller) {
        callers.emplace_back([caller] {
          for (int i = 0; i < 40; ++i) {
            if (i % 7 == 0)
              std::this_thread::sleep_for(std::chrono::microseconds(300));  // so that they park
            if (i % 5 == 0) tgi::cpu::team_wake();
            if (i == 20 && caller == 0) tgi::cpu::set_num_threads(2);
            run_once(caller * 1000 + i);
          }
        });
      }
      for (std::thread& caller : callers) caller.join();
    }
  }
  change_size();
  std::printf("%d errors\n", num_errors.load());
  return num_errors.load() == 0 ? 0 : 1;
}
