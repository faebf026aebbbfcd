// The tensor-parallel shards of a model on one machine, which compute each step together: each is a
// process with a part of the model. They share a memory segment:
//
//   head | mailbox | logits [max_rows, vocab] | partial sums [2 turns][shard][max_tokens, columns]
//
// Shard 0 writes the work to compute to the mailbox. All shards write their partial sums, all
// threads of all shards meet at a barrier, and each shard adds all partial sums in the order of
// ranks, so the bits depend only on the number of shards. There are two turns because shards may
// still read the partial sums of one sum while others write those of the next.
#pragma once

#include <chrono>
#include <cstdint>

#include "memory.h"

namespace tgi::cpu {

struct ShardShape {
  int64_t count;        // number of shards
  int64_t num_members;  // compute threads of each shard
  int64_t max_tokens;   // of a step
  int64_t num_columns;  // of a partial sum
  int64_t max_rows;     // rows of logits
  int64_t vocab_size;
  int64_t mail_bytes;
};

class ShardGroup {
 public:
  // The size that `fd` must have. Throws std::bad_alloc if no machine has that much memory.
  static int64_t num_bytes(const ShardShape& shape);
  // Maps the memory behind a descriptor that all shards share; it was zero before any shard
  // mapped it. rank: this shard's number. Throws std::runtime_error.
  ShardGroup(int fd, int64_t rank, const ShardShape& shape);

  const ShardShape& shape() const { return shape_; }
  int64_t rank() const { return rank_; }

  // Where this shard writes its partial sum of every other sum, and where the partial sums of all
  // shards begin.
  Memory partial_sum(int64_t turn) const;
  const float* partial_sums(int64_t turn) const;
  int64_t partial_sum_floats() const { return shape_.max_tokens * shape_.num_columns; }
  Memory logits() const;

  // Called by every thread of every shard, equally often: returns when all have arrived, or once
  // the group has been aborted.
  void barrier();

  // For shard 0: the mailbox, which may be written once all shards have met after the
  // previous mail, and the call that sends it.
  uint8_t* mail() const { return memory_.get() + mail_at_; }
  void send();
  // For the other shards: waits for the next mail. Returns false if the group has been aborted.
  bool receive();

  // Releases all waiting threads, now and from now on; their results are void.
  void abort();
  bool is_aborted() const;

 private:
  struct Head;
  Head& head() const { return *reinterpret_cast<Head*>(memory_.get()); }

  const ShardShape shape_;
  const int64_t rank_;
  const int64_t mail_at_, logits_at_, partial_sums_at_;
  std::chrono::microseconds yield_after_;
  Memory memory_;
  uint32_t num_received_ = 0;
};

}  // namespace tgi::cpu
