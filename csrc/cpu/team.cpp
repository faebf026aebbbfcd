#include "team.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "platform.h"
#include "spin.h"

namespace tgi::cpu {

namespace {

// A central counter (Mellor-Crummey and Scott, Algorithms for Scalable Synchronization on
// Shared-Memory Multiprocessors, section 3.1) with a generation instead of a reversed sense. The
// two are on separate cache lines, so that members spin on the one that is not incremented.
class Barrier {
 public:
  void reset(int num_members) {
    num_members_ = num_members;
    arrived_.store(0, std::memory_order_relaxed);
  }

  void wait() {
    const uint32_t generation = generation_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == num_members_) {
      arrived_.store(0, std::memory_order_relaxed);
      generation_.store(generation + 1, std::memory_order_release);
      return;
    }
    spin_until([&] { return generation_.load(std::memory_order_acquire) != generation; });
  }

 private:
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<uint32_t> generation_{0};
  int num_members_ = 1;
};

std::atomic<int> other_spin_us{0};  // see team_spin

class Team;
// The team whose run this thread is inside of; null in run_on_caller.
thread_local Team* current_team = nullptr;

class Team {
 public:
  explicit Team(const TeamOptions& options)
      : options_(options), cores_(usable_cores()), num_members_(options.num_threads) {
    barrier_.reset(num_members_);
    try {
      for (int member = 1; member < num_members_; ++member) {
        threads_.emplace_back([this, member] { serve(member); });
      }
    } catch (const std::system_error& error) {
      const size_t num_started = threads_.size();
      end();
      throw std::runtime_error(
          "cannot start " + std::to_string(num_members_) + " compute threads: " + error.what() +
          " after " + std::to_string(num_started + 1) +
          "; set --num-threads, or raise the limit on processes (ulimit -u, pids.max) or memory");
    }
  }

  ~Team() { end(); }

  int num_members() const { return num_members_; }

  int core_of(int member) const { return cores_[member % cores_.size()]; }

  void run(TeamFunction fn, void* context) {
    fn_ = fn;
    context_ = context;
    publish();
    current_team = this;
    fn(context, 0, num_members_);
    current_team = nullptr;
    barrier_.wait();
  }

  void wake() {
    signal_.fetch_add(1, std::memory_order_seq_cst);
    if (num_parked_.load(std::memory_order_seq_cst) > 0) wake_all(&signal_);
  }

  void barrier() { barrier_.wait(); }

  // The threads do not exist in a forked child: forgets them without joining.
  void abandon() {
    for (std::thread& thread : threads_) thread.detach();
    threads_.clear();
  }

 private:
  // Makes the running threads return from serve() and waits for them.
  void end() {
    fn_ = nullptr;
    publish();
    for (std::thread& thread : threads_) thread.join();
  }

  void publish() {
    run_number_.fetch_add(1, std::memory_order_release);
    wake();
  }

  void serve(int member) {
    name_thread("tgi-team");
    if (options_.pin) pin_thread(core_of(member));
    if (options_.nice != 0) nice_thread(options_.nice);
    FlushDenormals flush;
    current_team = this;
    for (uint32_t seen = 0;;) {
      seen = next_run(seen);
      if (fn_ == nullptr) return;
      fn_(context_, member, num_members_);
      barrier_.wait();
    }
  }

  // Waits for the run after number `seen`: spins for spin_us, then parks until signalled, and
  // repeats.
  uint32_t next_run(uint32_t seen) {
    for (;;) {
      const uint32_t signal = signal_.load(std::memory_order_seq_cst);
      const int other = other_spin_us.load(std::memory_order_relaxed);
      const auto deadline =
          Clock::now() + std::chrono::microseconds(other > 0 ? other : options_.spin_us);
      do {
        for (int spins = 0; spins < kSpinsPerClockRead; ++spins) {
          const uint32_t number = run_number_.load(std::memory_order_acquire);
          if (number != seen) return number;
          spin_pause();
        }
      } while (Clock::now() < deadline);
      num_parked_.fetch_add(1, std::memory_order_seq_cst);
      if (run_number_.load(std::memory_order_seq_cst) == seen) wait_on(&signal_, signal);
      num_parked_.fetch_sub(1, std::memory_order_seq_cst);
    }
  }

  const TeamOptions options_;
  const std::vector<int> cores_;
  const int num_members_;
  TeamFunction fn_ = nullptr;
  void* context_ = nullptr;
  Barrier barrier_;
  alignas(64) std::atomic<uint32_t> run_number_{0};
  alignas(64) std::atomic<uint32_t> signal_{0};
  std::atomic<int> num_parked_{0};
  std::vector<std::thread> threads_;
};

// One team per process, started by its first run. The lock serialises the runs of several callers.
struct Shared {
  std::mutex lock;
  TeamOptions options;
  std::unique_ptr<Team> team;
};

Shared& shared() {
  // Never destroyed: at exit other threads may still be inside a run.
  static Shared* const instance = [] {
    pthread_atfork([] { shared().lock.lock(); }, [] { shared().lock.unlock(); },
                   [] {
                     Shared& state = shared();
                     if (state.team) {
                       state.team->abandon();
                       state.team.release();  // its threads' stacks are gone with the parent
                     }
                     state.lock.unlock();
                   });
    return new Shared;
  }();
  return *instance;
}

int resolved(int num_threads) { return num_threads > 0 ? num_threads : default_num_threads(); }

// Returns the team, starting it if necessary. The caller holds the lock.
Team& started(Shared& state) {
  if (!state.team) {
    TeamOptions options = state.options;
    options.num_threads = resolved(options.num_threads);
    state.team = std::make_unique<Team>(options);
  }
  return *state.team;
}

}  // namespace

int default_num_threads() {
  const int cores = static_cast<int>(usable_cores().size());
  return std::min(cores, quota_cores(cores));
}

void configure_team(const TeamOptions& options) {
  Shared& state = shared();
  std::lock_guard<std::mutex> guard(state.lock);
  state.team.reset();
  state.options = options;
}

void set_num_threads(int num_threads) {
  Shared& state = shared();
  std::lock_guard<std::mutex> guard(state.lock);
  if (state.team && resolved(num_threads) == resolved(state.options.num_threads)) return;
  state.team.reset();
  state.options.num_threads = num_threads;
}

int num_threads() {
  Shared& state = shared();
  std::lock_guard<std::mutex> guard(state.lock);
  return resolved(state.options.num_threads);
}

void join_team() {
  Shared& state = shared();
  std::lock_guard<std::mutex> guard(state.lock);
  if (state.options.pin) pin_thread(started(state).core_of(0));
  if (state.options.nice != 0) nice_thread(state.options.nice);
}

void team_run(TeamFunction fn, void* context, PrepareFunction prepare) {
  Shared& state = shared();
  std::lock_guard<std::mutex> guard(state.lock);
  Team& team = started(state);
  if (prepare != nullptr) prepare(context, team.num_members());
  FlushDenormals flush;
  team.run(fn, context);
}

void team_barrier() {
  if (current_team != nullptr) current_team->barrier();
}

void run_on_caller(TeamFunction fn, void* context) {
  FlushDenormals flush;
  fn(context, 0, 1);
}

void team_spin(int spin_us) { other_spin_us.store(spin_us, std::memory_order_relaxed); }

void team_wake() {
  Shared& state = shared();
  std::unique_lock<std::mutex> guard(state.lock, std::try_to_lock);
  if (guard.owns_lock()) started(state).wake();  // a run in progress needs no waking
}

}  // namespace tgi::cpu
