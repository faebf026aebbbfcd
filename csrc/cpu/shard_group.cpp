#include "shard_group.h"

#include <sys/mman.h>
#include <sys/stat.h>
#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <atomic>
#include <cerrno>
#include <cstring>
#include <stdexcept>
#include <string>

#include "platform.h"
#include "spin.h"

namespace tgi::cpu {

namespace {

constexpr int64_t kPage = 4096;
constexpr int64_t kFloat = 4;
// How long a shard polls for mail before it sleeps: 20 to 60 us pass between two steps of a stream.
constexpr std::chrono::microseconds kLookFor{200};
// With more threads than cores, waiting threads hold up working ones.
constexpr std::chrono::microseconds kYieldWhenCrowded{5};

// Like wait_on and wake_all in platform.h, for a word that other shards wait on as well. Shards
// are supported on Linux only: other systems provide no memory for them.
#if defined(__linux__)
void wait_on_shared(std::atomic<uint32_t>* word, uint32_t expected) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(word), FUTEX_WAIT, expected, nullptr, nullptr, 0);
}

void wake_all_shared(std::atomic<uint32_t>* word) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(word), FUTEX_WAKE, INT32_MAX, nullptr, nullptr, 0);
}
#else
void wait_on_shared(std::atomic<uint32_t>* word, uint32_t expected) { wait_on(word, expected); }
void wake_all_shared(std::atomic<uint32_t>*) {}
#endif

int64_t whole_pages(int64_t bytes) { return (bytes + kPage - 1) / kPage * kPage; }

int64_t logits_bytes(const ShardShape& shape) {
  return whole_pages(product_of_sizes({shape.max_rows, shape.vocab_size, kFloat}));
}

int64_t partial_sum_bytes(const ShardShape& shape) {
  return whole_pages(
      product_of_sizes({2, shape.count, shape.max_tokens, shape.num_columns, kFloat}));
}

}  // namespace

// Each member has its own cache line: many threads spin on one that another thread writes.
struct ShardGroup::Head {
  alignas(64) std::atomic<uint32_t> num_arrived;
  alignas(64) std::atomic<uint32_t> generation;
  alignas(64) std::atomic<uint32_t> num_sent;
  alignas(64) std::atomic<uint32_t> num_sleeping;
  alignas(64) std::atomic<uint32_t> is_aborted;
};

int64_t ShardGroup::num_bytes(const ShardShape& shape) {
  return kPage + whole_pages(shape.mail_bytes) + logits_bytes(shape) + partial_sum_bytes(shape);
}

ShardGroup::ShardGroup(int fd, int64_t rank, const ShardShape& shape)
    : shape_(shape),
      rank_(rank),
      mail_at_(kPage),
      logits_at_(mail_at_ + whole_pages(shape.mail_bytes)),
      partial_sums_at_(logits_at_ + logits_bytes(shape)) {
  static_assert(sizeof(Head) <= kPage && std::atomic<uint32_t>::is_always_lock_free, "");
  const int64_t bytes = num_bytes(shape);
  struct stat found = {};
  if (fstat(fd, &found) != 0 || found.st_size != bytes) {
    throw std::runtime_error("the shards' memory must have " + std::to_string(bytes) + " bytes");
  }
  void* const data =
      mmap(nullptr, static_cast<size_t>(bytes), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (data == MAP_FAILED) {
    throw std::runtime_error(std::string("cannot map the shards' memory: ") + std::strerror(errno));
  }
  memory_ = Memory(static_cast<uint8_t*>(data),
                   [bytes](uint8_t* mapped) { munmap(mapped, static_cast<size_t>(bytes)); });
  const auto num_cores = static_cast<int64_t>(usable_cores().size());
  const bool is_crowded = shape.count * shape.num_members > num_cores;
  yield_after_ = is_crowded ? kYieldWhenCrowded : kYieldAfter;
}

Memory ShardGroup::partial_sum(int64_t turn) const {
  const int64_t at = (turn * shape_.count + rank_) * partial_sum_floats() * kFloat;
  return Memory(memory_, memory_.get() + partial_sums_at_ + at);
}

const float* ShardGroup::partial_sums(int64_t turn) const {
  const int64_t at = turn * shape_.count * partial_sum_floats() * kFloat;
  return reinterpret_cast<const float*>(memory_.get() + partial_sums_at_ + at);
}

Memory ShardGroup::logits() const { return Memory(memory_, memory_.get() + logits_at_); }

void ShardGroup::barrier() {
  Head& h = head();
  const uint32_t generation = h.generation.load(std::memory_order_acquire);
  const auto total = static_cast<uint32_t>(shape_.count * shape_.num_members);
  if (h.num_arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == total) {
    h.num_arrived.store(0, std::memory_order_relaxed);
    h.generation.store(generation + 1, std::memory_order_release);
    return;
  }
  spin_until(
      [&] {
        return h.generation.load(std::memory_order_acquire) != generation ||
               h.is_aborted.load(std::memory_order_relaxed) != 0;
      },
      yield_after_);
}

void ShardGroup::send() {
  Head& h = head();
  h.num_sent.fetch_add(1, std::memory_order_seq_cst);
  if (h.num_sleeping.load(std::memory_order_seq_cst) > 0) wake_all_shared(&h.num_sent);
}

bool ShardGroup::receive() {
  Head& h = head();
  const auto has_more = [&] {
    return h.num_sent.load(std::memory_order_seq_cst) != num_received_ || is_aborted();
  };
  const auto deadline = Clock::now() + kLookFor;
  while (!has_more() && Clock::now() < deadline) {
    for (int spins = 0; spins < kSpinsPerClockRead && !has_more(); ++spins) spin_pause();
  }
  h.num_sleeping.fetch_add(1, std::memory_order_seq_cst);
  while (!has_more()) wait_on_shared(&h.num_sent, num_received_);
  h.num_sleeping.fetch_sub(1, std::memory_order_seq_cst);
  if (is_aborted()) return false;
  ++num_received_;
  return true;
}

void ShardGroup::abort() {
  head().is_aborted.store(1, std::memory_order_seq_cst);
  // A shard that is about to sleep then sees a different number and does not sleep.
  head().num_sent.fetch_add(1, std::memory_order_seq_cst);
  wake_all_shared(&head().num_sent);
}

bool ShardGroup::is_aborted() const {
  return head().is_aborted.load(std::memory_order_seq_cst) != 0;
}

}  // namespace tgi::cpu
