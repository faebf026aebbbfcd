#include "platform.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <ctime>
#include <fstream>
#include <set>
#include <sstream>
#include <stdexcept>
#include <string>
#include <thread>

#if defined(__linux__)
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#endif
#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace tgi::cpu {

namespace {

#if defined(__linux__)
// Returns the process's path in the hierarchy whose controllers include `controller` ("" means
// version 2).
std::string cgroup_path(const char* membership, const std::string& controller) {
  std::ifstream file(membership);
  std::string line;
  while (std::getline(file, line)) {
    const size_t first = line.find(':');
    const size_t second = line.find(':', first + 1);
    if (first == std::string::npos || second == std::string::npos) continue;
    std::stringstream names(line.substr(first + 1, second - first - 1));
    if (controller.empty() && second == first + 1) return line.substr(second + 1);
    for (std::string name; std::getline(names, name, ',');) {
      if (name == controller) return line.substr(second + 1);
    }
  }
  return "/";
}

// Returns quota / period of one directory in cores, or a negative number if it sets no limit.
double version2_limit(const std::string& directory) {
  std::ifstream file(directory + "/cpu.max");
  std::string quota;
  double period = 0;
  if (!(file >> quota >> period) || quota == "max" || period <= 0) return -1;
  return std::strtod(quota.c_str(), nullptr) / period;
}

double version1_limit(const std::string& directory) {
  std::ifstream quota_file(directory + "/cpu.cfs_quota_us");
  std::ifstream period_file(directory + "/cpu.cfs_period_us");
  double quota = 0, period = 0;
  if (!(quota_file >> quota) || !(period_file >> period) || quota <= 0 || period <= 0) return -1;
  return quota / period;
}

// Returns the tightest limit from `path` up to the root of the hierarchy mounted at `root`.
double tightest(const std::string& root, std::string path, double (*limit)(const std::string&)) {
  double result = -1;
  for (;;) {
    const double here = limit(root + path);
    if (here > 0 && (result < 0 || here < result)) result = here;
    const size_t slash = path.rfind('/');
    if (slash == std::string::npos || path.size() <= 1) break;
    path.resize(slash);
  }
  const double top = limit(root);
  if (top > 0 && (result < 0 || top < result)) result = top;
  return result;
}
#endif

#if defined(__linux__)
// Returns the first hardware thread of a thread's core. The file lists them in ascending order:
// "3,67" or "6-7".
int first_sibling(const std::string& topology, int thread) {
  std::ifstream file(topology + "/cpu" + std::to_string(thread) + "/topology/thread_siblings_list");
  int first = thread;
  return file >> first ? first : thread;
}
#endif

}  // namespace

#if defined(__linux__)

std::vector<int> usable_cores(const char* topology) {
  std::vector<int> cores;
  std::set<int> seen;  // cores, by their first hardware thread
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(getpid(), sizeof(set), &set) == 0) {
    for (int thread = 0; thread < CPU_SETSIZE; ++thread) {
      if (CPU_ISSET(thread, &set) && seen.insert(first_sibling(topology, thread)).second) {
        cores.push_back(thread);
      }
    }
  }
  if (cores.empty()) {
    const int count = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
    for (int core = 0; core < count; ++core) cores.push_back(core);
  }
  return cores;
}

int quota_cores(int fallback, const char* hierarchy, const char* membership) {
  const std::string root(hierarchy);
  double limit = tightest(root, cgroup_path(membership, ""), version2_limit);
  for (const char* mount : {"/cpu", "/cpu,cpuacct"}) {
    const double here = tightest(root + mount, cgroup_path(membership, "cpu"), version1_limit);
    if (here > 0 && (limit < 0 || here < limit)) limit = here;
  }
  return limit < 0 ? fallback : std::max(1, static_cast<int>(limit));
}

void wait_on(std::atomic<uint32_t>* word, uint32_t expected) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(word), FUTEX_WAIT_PRIVATE, expected, nullptr,
          nullptr, 0);
}

void wake_all(std::atomic<uint32_t>* word) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(word), FUTEX_WAKE_PRIVATE, INT32_MAX, nullptr,
          nullptr, 0);
}

bool pin_thread(const std::vector<int>& cores) {
  cpu_set_t set;
  CPU_ZERO(&set);
  for (const int core : cores) CPU_SET(core, &set);
  return sched_setaffinity(0, sizeof(set), &set) == 0;
}

bool nice_thread(int nice) {
  const auto thread = static_cast<id_t>(syscall(SYS_gettid));
  return setpriority(PRIO_PROCESS, thread, nice) == 0;
}

void raise_stack_size() {
  // Attention keeps 66 KB of tiles on the stack, and 128 KB in all have been too little.
  constexpr size_t kNeededBytes = 512 << 10;
  pthread_attr_t defaults;
  size_t bytes = 0;
  if (pthread_getattr_default_np(&defaults) != 0) return;
  pthread_attr_getstacksize(&defaults, &bytes);
  if (bytes < kNeededBytes && pthread_attr_setstacksize(&defaults, kNeededBytes) == 0) {
    pthread_setattr_default_np(&defaults);
  }
  pthread_attr_destroy(&defaults);
}

void name_thread(const char* name) {
  char kept[16];
  std::snprintf(kept, sizeof(kept), "%s", name);
  pthread_setname_np(pthread_self(), kept);
}

void advise_huge_pages(void* data, int64_t bytes) {
  constexpr uintptr_t kHugePage = uintptr_t{2} << 20;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(data);
  const uintptr_t first = (begin + kHugePage - 1) & ~(kHugePage - 1);
  const uintptr_t last = (begin + static_cast<uintptr_t>(bytes)) & ~(kHugePage - 1);
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
}

#else

std::vector<int> usable_cores(const char*) {
  std::vector<int> cores;
  const int count = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
  for (int core = 0; core < count; ++core) cores.push_back(core);
  return cores;
}

int quota_cores(int fallback, const char*, const char*) { return fallback; }

void wait_on(std::atomic<uint32_t>* word, uint32_t expected) {
  if (word->load(std::memory_order_acquire) == expected) {
    std::this_thread::sleep_for(std::chrono::microseconds(200));
  }
}

void wake_all(std::atomic<uint32_t>*) {}
bool pin_thread(const std::vector<int>&) { return false; }
bool nice_thread(int) { return false; }
void raise_stack_size() {}
void name_thread(const char*) {}
void advise_huge_pages(void*, int64_t) {}

#endif

double thread_cpu_s() {
  timespec time = {};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
  return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
}

Signal::Signal() {
#if defined(__linux__)
  read_fd_ = write_fd_ = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
#else
  int ends[2];
  if (pipe(ends) == 0) {
    read_fd_ = ends[0];
    write_fd_ = ends[1];
    for (const int end : ends) {
      fcntl(end, F_SETFD, FD_CLOEXEC);
      fcntl(end, F_SETFL, O_NONBLOCK);
    }
  }
#endif
  if (read_fd_ < 0) throw std::runtime_error("no file descriptor for a signal: see ulimit -n");
}

Signal::~Signal() {
  close(read_fd_);
  if (write_fd_ != read_fd_) close(write_fd_);
}

// No failure of either call matters: a full descriptor is readable already, an empty one is clear
// already.
void Signal::raise() {
  const uint64_t one = 1;
  [[maybe_unused]] const ssize_t written = write(write_fd_, &one, sizeof one);
}

void Signal::clear() {
  char bytes[4096];
  [[maybe_unused]] const ssize_t taken = read(read_fd_, bytes, sizeof bytes);
}

DenormalMode::DenormalMode(bool is_flushed) {
#if defined(__x86_64__)
  constexpr unsigned kFlush = 0x8040u;  // FTZ (bit 15) and DAZ (bit 6)
  saved_ = _mm_getcsr();
  const unsigned kept = static_cast<unsigned>(saved_) & ~kFlush;
  _mm_setcsr(is_flushed ? kept | kFlush : kept);
#elif defined(__aarch64__)
  constexpr uint64_t kFlush = uint64_t{1} << 24;  // FZ
  asm volatile("mrs %0, fpcr" : "=r"(saved_));
  const uint64_t wanted = is_flushed ? saved_ | kFlush : saved_ & ~kFlush;
  asm volatile("msr fpcr, %0" ::"r"(wanted));
#endif
}

DenormalMode::~DenormalMode() {
#if defined(__x86_64__)
  _mm_setcsr(static_cast<unsigned>(saved_));
#elif defined(__aarch64__)
  asm volatile("msr fpcr, %0" ::"r"(saved_));
#endif
}

}  // namespace tgi::cpu
