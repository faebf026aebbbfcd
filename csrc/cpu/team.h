// The persistent team of compute threads. Every kernel call and every recorded step runs on it;
// nothing here uses OpenMP. The caller is member 0, so a team of n has n - 1 threads of its own.
// Members spin briefly between runs, then park; inside a run they meet at a spin barrier and never
// park. While other programs use its cores, a team can leave members out (team_size.h).
#pragma once

#include <cstdint>
#include <type_traits>

namespace tgi::cpu {

struct TeamOptions {
  int num_threads = 0;  // 0: default_num_threads()
  int nice = 0;         // of the team's own threads
  bool pin = false;  // bind member i to the i-th core that the process may use, while all take part
  int spin_us = 75;  // how long an idle member spins before it parks (a wake-up costs 16-25 us)
  bool yields_cores = false;  // leave members out of runs while they have no cores
};

// The cores by affinity or by cgroup quota, whichever is fewer: threads that spin under a quota are
// throttled.
int default_num_threads();

// Ends the current team, if any; the next run starts one with these options. Must not be called
// inside a run; waits for a run on another thread to end.
void configure_team(const TeamOptions& options);

// Does the same as configure_team(), changing only the number of threads.
void set_num_threads(int num_threads);

// Returns the number of members, at least 1.
int num_threads();

// Returns the number of members that the last run had, at most num_threads(); 0 before the first.
int num_running_threads();

// Gives the calling thread the team's nice value and, while all members take part, member 0's core;
// lets all take part again. For the thread that launches all steps; other callers only borrow the
// team.
void join_team();

enum class Members {
  kWithCores,  // leaves members out as TeamOptions::yields_cores says
  kAll,        // for work that decides which member's core memory is close to
};

// Runs fn(context, member, num_members) once on every member that takes part and returns when all
// have returned. The first run starts the team; it throws std::runtime_error if the system refuses
// a thread, as do join_team() and team_wake(). Runs of several callers are serialised. fn must not
// throw and must not call team_run. Memory written before the call is visible to all members; their
// writes are visible after it. Denormals are flushed inside the run. `prepare`, if given, is called
// first, on the caller only, with the number of members, which cannot change before the run ends:
// it allocates work memory. It may throw, in which case nothing runs.
using TeamFunction = void (*)(void* context, int member, int num_members);
using PrepareFunction = void (*)(void* context, int num_members);
void team_run(TeamFunction fn, void* context, PrepareFunction prepare = nullptr,
              Members members = Members::kWithCores);

// Inside a run: waits until all its members have arrived. All members must call it equally often.
// It takes about 0.06 us on two cores. After about 1 ms of spinning it yields, because a peer was
// descheduled.
void team_barrier();

// Unparks the team ahead of a run, so that the wake-up overlaps with the caller's last
// preparations.
void team_wake();

// Sets how long idle members of any team spin from now on, overriding TeamOptions::spin_us; 0
// restores that option. For steps between whose runs the caller does only short work.
void team_spin(int spin_us);

// Sets after how long at a barrier members of any team begin to yield their cores; the default is 1
// ms. Sooner helps other work on the same cores, such as other tests, at this team's expense:
// beside busy processes a step of 16 sequences took 1.2 times as long with 20 us.
void team_yield_after(int microseconds);

// team_run for a callable: run_on_team([&](int member, int num_members) { ... }).
template <typename Callable>
void run_on_team(Callable&& callable, Members members = Members::kWithCores) {
  using Plain = std::remove_reference_t<Callable>;
  team_run([](void* context, int member,
              int num_members) { (*static_cast<Plain*>(context))(member, num_members); },
           const_cast<void*>(static_cast<const void*>(&callable)), nullptr, members);
}

// The same with prepare(num_members).
template <typename Prepare, typename Callable>
void run_on_team(Prepare&& prepare, Callable&& callable) {
  struct Both {
    Prepare& prepare;
    Callable& callable;
  } both = {prepare, callable};
  team_run(
      [](void* context, int member, int num_members) {
        static_cast<Both*>(context)->callable(member, num_members);
      },
      &both,
      [](void* context, int num_members) { static_cast<Both*>(context)->prepare(num_members); });
}

struct Range {
  int64_t begin;
  int64_t end;
};

// Returns a member's part of [0, size): contiguous, in order, with sizes that differ by at most one
// grain; every inner border is a multiple of grain. The split depends only on the arguments, so it
// is the same in every run.
inline Range split(int64_t size, int member, int num_members, int64_t grain = 1) {
  const int64_t grains = (size + grain - 1) / grain;
  const int64_t each = grains / num_members, extra = grains % num_members;
  const int64_t first = member * each + (member < extra ? member : extra);
  const int64_t last = first + each + (member < extra ? 1 : 0);
  const int64_t begin = first * grain, end = last * grain;
  return {begin < size ? begin : size, end < size ? end : size};
}

// Flushes denormals and runs callable(0, 1) on the caller: a team of one. For work so small that
// handing it over would cost more (1 us to a spinning member, 25 us to a parked one).
void run_on_caller(TeamFunction fn, void* context);

template <typename Callable>
void run_on_caller(Callable&& callable) {
  using Plain = std::remove_reference_t<Callable>;
  run_on_caller([](void* context, int member,
                   int num_members) { (*static_cast<Plain*>(context))(member, num_members); },
                const_cast<void*>(static_cast<const void*>(&callable)));
}

// Number of multiplications that one core finishes before a parked member wakes up.
constexpr int64_t kSmallWork = 1 << 19;

// run_on_team(prepare, callable), or on the caller only if the work is at most kSmallWork.
template <typename Prepare, typename Callable>
void run_small(int64_t work, Prepare&& prepare, Callable&& callable) {
  if (work > kSmallWork) return run_on_team(prepare, callable);
  prepare(1);
  run_on_caller(callable);
}

// Runs kernel(begin, end) over [0, size), split over the team; on the caller only below
// `serial_below` grains.
template <typename Kernel>
void parallel_range(int64_t size, int64_t grain, const Kernel& kernel, int64_t serial_below = 2) {
  if (size <= 0) return;
  const auto body = [&](int member, int num_members) {
    const Range part = split(size, member, num_members, grain);
    if (part.begin < part.end) kernel(part.begin, part.end);
  };
  if ((size + grain - 1) / grain < serial_below) {
    run_on_caller(body);
  } else {
    run_on_team(body);
  }
}

}  // namespace tgi::cpu
