// The operating-system calls that the thread team needs: Linux calls, with a portable fallback that
// is slower but correct. Depends neither on torch nor on the kernels.
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

namespace tgi::cpu {

// Returns the cores that the process's main thread may run on, in ascending order. (Team threads
// may be pinned to one.) Only the first hardware thread of each core (SMT) counts: two share the
// core's vector units and caches, and a step ends when the slower one finishes. Tests pass their
// own topology.
std::vector<int> usable_cores(const char* topology = "/sys/devices/system/cpu");

// Returns the CPU time, in cores, that the control group grants (version 1 or 2, the tightest
// level), or `fallback` if there is no limit. At least 1. Tests pass their own hierarchy.
int quota_cores(int fallback, const char* hierarchy = "/sys/fs/cgroup",
                const char* membership = "/proc/self/cgroup");

// Sleeps while *word == expected; may return early. futex on Linux, a short sleep elsewhere.
void wait_on(std::atomic<uint32_t>* word, uint32_t expected);

// Wakes every thread that sleeps in wait_on(word).
void wake_all(std::atomic<uint32_t>* word);

// Binds the calling thread to these cores. Returns false if the system refused.
bool pin_thread(const std::vector<int>& cores);

// Returns for how many seconds the calling thread has had a core since it began.
double thread_cpu_s();

// Sets the calling thread's nice value. Returns false if the system refused.
bool nice_thread(int nice);

// Gives threads that start from now on, those of Python included, a stack that kernels fit in,
// where the limit (ulimit -s) or the C library (musl) would give a smaller one.
void raise_stack_size();

// Names the calling thread for top and perf; at most 15 characters are kept.
void name_thread(const char* name);

// Asks for huge pages in [data, data + bytes), which make decode 3-9 % faster. A hint; failure is
// ignored.
void advise_huge_pages(void* data, int64_t bytes);

// Tells the core that this is a spin loop.
inline void spin_pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield" ::: "memory");
#endif
}

// A descriptor that an event loop can watch and any thread can make readable: an eventfd on Linux,
// a pipe elsewhere. Throws std::runtime_error if the system grants no descriptor.
class Signal {
 public:
  Signal();
  ~Signal();
  Signal(const Signal&) = delete;
  Signal& operator=(const Signal&) = delete;

  int fd() const { return read_fd_; }
  void raise();  // makes the descriptor readable
  void clear();  // makes it unreadable until the next raise()

 private:
  int read_fd_ = -1, write_fd_ = -1;
};

// Sets how the calling thread treats denormals, for the lifetime of the object.
class DenormalMode {
 public:
  DenormalMode(const DenormalMode&) = delete;
  DenormalMode& operator=(const DenormalMode&) = delete;

 protected:
  explicit DenormalMode(bool is_flushed);
  ~DenormalMode();

 private:
  uint64_t saved_ = 0;
};

// Flushes denormals to zero: torch's own switch does not reach the team's threads, and a denormal
// costs over 100 cycles.
struct FlushDenormals : DenormalMode {
  FlushDenormals() : DenormalMode(true) {}
};

// Keeps denormals, for code in which every bit of a file's weights counts.
struct KeepDenormals : DenormalMode {
  KeepDenormals() : DenormalMode(false) {}
};

}  // namespace tgi::cpu
