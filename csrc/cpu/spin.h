// Waiting for another thread without sleeping.
#pragma once

#include <chrono>
#include <thread>

#include "platform.h"

namespace tgi::cpu {

using Clock = std::chrono::steady_clock;
constexpr int kSpinsPerClockRead = 64;  // reading the clock costs as much as ten pauses
constexpr std::chrono::microseconds kYieldAfter{1000};

// Spins until ready() holds. After `yield_after` it yields its core between checks.
template <typename Ready>
void spin_until(const Ready& ready, std::chrono::microseconds yield_after = kYieldAfter) {
  for (int spins = 0; spins < kSpinsPerClockRead; ++spins) {
    if (ready()) return;
    spin_pause();
  }
  const auto deadline = Clock::now() + yield_after;
  bool is_late = false;
  while (!ready()) {
    for (int spins = 0; spins < kSpinsPerClockRead && !ready(); ++spins) spin_pause();
    if (is_late) {
      std::this_thread::yield();
    } else {
      is_late = Clock::now() > deadline;
    }
  }
}

}  // namespace tgi::cpu
