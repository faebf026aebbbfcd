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
#include "progress.h"
#include "spin.h"
#include "team_size.h"

namespace tgi::cpu {

namespace {

std::atomic<uint64_t> num_meetings{0};  // of the members of any team, see team_progress

std::atomic<int> yield_after_us{static_cast<int>(kYieldAfter.count())};  // see team_yield_after

// A central counter (Mellor-Crummey and Scott, Algorithms for Scalable Synchronization on
// Shared-Memory Multiprocessors, section 3.1) with a generation instead of a reversed sense. The
// two are on separate cache lines, so that members spin on the one that is not incremented.
class Barrier {
 public:
  // All callers of one round pass the same number.
  void wait(int num_members) {
    const uint32_t generation = generation_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == num_members) {
      arrived_.store(0, std::memory_order_relaxed);
      num_meetings.store(num_meetings.load(std::memory_order_relaxed) + 1,
                         std::memory_order_relaxed);
      generation_.store(generation + 1, std::memory_order_release);
      return;
    }
    spin_until([&] { return generation_.load(std::memory_order_acquire) != generation; },
               std::chrono::microseconds(yield_after_us.load(std::memory_order_relaxed)));
  }

 private:
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<uint32_t> generation_{0};
};

std::atomic<int> other_spin_us{0};  // see team_spin
std::atomic<int> running_members{0};

class Team;
// The team whose run this thread is inside of, null in run_on_caller, and that run's members.
thread_local Team* current_team = nullptr;
thread_local int current_members = 1;
thread_local bool has_joined = false;  // see join_team

double seconds(Clock::duration time) { return std::chrono::duration<double>(time).count(); }

class Team {
 public:
  explicit Team(const TeamOptions& options)
      : options_(options),
        cores_(usable_cores()),
        num_members_(options.num_threads),
        size_(num_members_),
        last_members_(num_members_),
        current_run_{first_run(num_members_)},
        lost_s_(static_cast<size_t>(num_members_)) {
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

  int next_size(Members members) const {
    return members == Members::kAll ? num_members_ : size_.value();
  }

  // All members take part again: the thread that loads weights joins before the one that runs
  // steps, and members that waited for the disk meanwhile looked as if they had no core.
  void join() {
    size_ = TeamSize(num_members_);
    last_members_ = num_members_;
    has_joined = true;
    if (options_.pin) place(0, num_members_);
    if (options_.nice != 0) nice_thread(options_.nice);
  }

  void run(TeamFunction fn, void* context, Members members) {
    const int num_members = next_size(members);
    running_members.store(num_members, std::memory_order_relaxed);
    fn_ = fn;
    context_ = context;
    published_at_ = Clock::now();
    publish(num_members);
    if (has_joined && num_members != last_members_) {
      if (options_.pin) place(0, num_members);
      last_members_ = num_members;
    }
    take_part(0, num_members);
    current_team = nullptr;
    barrier_.wait(num_members);
    if (!options_.yields_cores || members == Members::kAll) return;
    const Clock::time_point now = Clock::now();
    size_.observe(seconds(now.time_since_epoch()), seconds(now - published_at_), lost_s_.data());
  }

  void wake() {
    signal_.fetch_add(1, std::memory_order_seq_cst);
    if (num_parked_.load(std::memory_order_seq_cst) > 0) wake_all(&signal_);
  }

  void barrier(int num_members) { barrier_.wait(num_members); }

  // The threads do not exist in a forked child: forgets them without joining.
  void abandon() {
    for (std::thread& thread : threads_) thread.detach();
    threads_.clear();
  }

 private:
  // A run's number and its members in one word: a member that reads it late, after further runs,
  // must not take part in a run that does not count on it.
  static constexpr int kMemberBits = 11;
  static uint64_t first_run(int num_members) { return static_cast<uint64_t>(num_members); }
  static int members_of(uint64_t run) { return static_cast<int>(run & ((1 << kMemberBits) - 1)); }

  // Makes the running threads return from serve() and waits for them.
  void end() {
    fn_ = nullptr;
    publish(num_members_);
    for (std::thread& thread : threads_) thread.join();
  }

  void publish(int num_members) {
    const uint64_t last = current_run_.load(std::memory_order_relaxed);
    const uint64_t number = (last >> kMemberBits) + 1;
    current_run_.store(number << kMemberBits | static_cast<uint64_t>(num_members),
                       std::memory_order_seq_cst);
    wake();
    if (num_members > members_of(last)) {
      growth_.fetch_add(1, std::memory_order_seq_cst);
      wake_all(&growth_);
    }
  }

  // Binds the calling thread to a member's core. If members are left out, the system chooses the
  // cores, because it knows where other programs run.
  void place(int member, int num_members) const {
    if (num_members == num_members_) {
      pin_thread({cores_[static_cast<size_t>(member) % cores_.size()]});
    } else {
      pin_thread(cores_);
    }
  }

  void take_part(int member, int num_members) {
    current_team = this;
    current_members = num_members;
    if (!options_.yields_cores) return fn_(context_, member, num_members);
    const double had_core_s = thread_cpu_s();
    fn_(context_, member, num_members);
    const Clock::time_point ended = Clock::now();
    // From the publication on: a member that has no core begins late.
    lost_s_[static_cast<size_t>(member)] =
        seconds(ended - published_at_) - (thread_cpu_s() - had_core_s);
  }

  void serve(int member) {
    name_thread("tgi-team");
    int last_members = num_members_;
    if (options_.pin) place(member, last_members);
    if (options_.nice != 0) nice_thread(options_.nice);
    FlushDenormals flush;
    for (uint64_t seen = first_run(num_members_);;) {
      seen = next_run(seen, member);
      if (fn_ == nullptr) return;
      const int num_members = members_of(seen);
      if (options_.pin && num_members != last_members) place(member, num_members);
      last_members = num_members;
      take_part(member, num_members);
      barrier_.wait(num_members);
    }
  }

  // Waits for the next run after `seen` that this member takes part in: spins for spin_us, then
  // parks until signalled, and repeats. A member that is left out sleeps until the team grows.
  uint64_t next_run(uint64_t seen, int member) {
    for (;;) {
      const uint32_t growth = growth_.load(std::memory_order_seq_cst);
      const uint32_t signal = signal_.load(std::memory_order_seq_cst);
      const int other = other_spin_us.load(std::memory_order_relaxed);
      const auto deadline =
          Clock::now() + std::chrono::microseconds(other > 0 ? other : options_.spin_us);
      uint64_t run = seen;
      do {
        for (int spins = 0; spins < kSpinsPerClockRead; ++spins) {
          run = current_run_.load(std::memory_order_acquire);
          if (run != seen) break;
          spin_pause();
        }
      } while (run == seen && Clock::now() < deadline);
      if (member >= members_of(run)) {
        seen = run;
        wait_on(&growth_, growth);
        continue;
      }
      if (run != seen) return run;
      num_parked_.fetch_add(1, std::memory_order_seq_cst);
      if (current_run_.load(std::memory_order_seq_cst) == seen) wait_on(&signal_, signal);
      num_parked_.fetch_sub(1, std::memory_order_seq_cst);
    }
  }

  const TeamOptions options_;
  const std::vector<int> cores_;
  const int num_members_;
  TeamSize size_;
  int last_members_;  // of the last run of the thread that joined
  TeamFunction fn_ = nullptr;
  void* context_ = nullptr;
  Clock::time_point published_at_;
  Barrier barrier_;
  alignas(64) std::atomic<uint64_t> current_run_;
  alignas(64) std::atomic<uint32_t> signal_{0};
  std::atomic<uint32_t> growth_{0};
  std::atomic<int> num_parked_{0};
  std::vector<double> lost_s_;  // by member, of the last run: the time without a core
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

uint64_t team_progress() { return num_meetings.load(std::memory_order_relaxed); }

int num_running_threads() { return running_members.load(std::memory_order_relaxed); }

void join_team() {
  Shared& state = shared();
  std::lock_guard<std::mutex> guard(state.lock);
  started(state).join();
}

void team_run(TeamFunction fn, void* context, PrepareFunction prepare, Members members) {
  Shared& state = shared();
  std::lock_guard<std::mutex> guard(state.lock);
  Team& team = started(state);
  if (prepare != nullptr) prepare(context, team.next_size(members));
  FlushDenormals flush;
  team.run(fn, context, members);
}

void team_barrier() {
  if (current_team != nullptr) current_team->barrier(current_members);
}

void run_on_caller(TeamFunction fn, void* context) {
  FlushDenormals flush;
  fn(context, 0, 1);
}

void team_spin(int spin_us) { other_spin_us.store(spin_us, std::memory_order_relaxed); }

void team_yield_after(int microseconds) {
  yield_after_us.store(microseconds, std::memory_order_relaxed);
}

void team_wake() {
  Shared& state = shared();
  std::unique_lock<std::mutex> guard(state.lock, std::try_to_lock);
  if (guard.owns_lock()) started(state).wake();  // a run in progress needs no waking
}

}  // namespace tgi::cpu
