// Processes of one machine that compute each step together, every one a shard of the model. They
// share a piece of memory:
//
//   head | mailbox | logits [max_rows, vocab] | partial sums [2 turns][shard][max_tokens, columns]
//
// The first shard leaves in the mailbox what is to be computed. All write their partial sums, all
// threads of all processes meet at a barrier, and each process adds all parts in the order of the
// shards: bits depend on how many there are, and on nothing else. Parts of one sum are still read
// while the next one's are written, which is why there are two turns.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>

#include "memory.h"

namespace tgi::cpu {

struct ShardShape {
  int64_t count;        // shards
  int64_t num_members;  // threads that compute, of each
  int64_t max_tokens;   // of a step
  int64_t num_columns;  // of sums
  int64_t max_rows;     // of logits
  int64_t vocab_size;
  int64_t mail_bytes;
};

class ShardGroup {
 public:
  // What `fd` must have. Throws std::bad_alloc where no memory has so much.
  static int64_t num_bytes(const ShardShape& shape);
  // Maps memory that all shards have by such a descriptor; it was zero when the first came. Throws
  // std::runtime_error.
  ShardGroup(int fd, int64_t rank, const ShardShape& shape);

  const ShardShape& shape() const { return shape_; }
  int64_t rank() const { return rank_; }

  // Where this shard writes its part of every other sum, and where those of all shards begin.
  Memory part(int64_t turn) const;
  const float* parts(int64_t turn) const;
  int64_t part_floats() const { return shape_.max_tokens * shape_.num_columns; }
  Memory logits() const;

  // For every thread of every shard, equally often: returns when all have come, or once the group
  // has been given up.
  void meet();

  // The first shard's: writes to the mailbox, once all have met behind what was there, and sends.
  uint8_t* mail() const { return memory_.get() + mail_at_; }
  void send();
  // The others': waits for the next mail. False: the group has been given up.
  bool receive();

  // Lets all go on that wait, now and from now on; what they compute is void.
  void give_up();
  bool is_given_up() const;

 private:
  struct Head;
  Head& head() const { return *reinterpret_cast<Head*>(memory_.get()); }

  const ShardShape shape_;
  const int64_t rank_;
  const int64_t mail_at_, logits_at_, parts_at_;
  std::chrono::microseconds yield_after_;
  Memory memory_;
  uint32_t num_received_ = 0;
};

}  // namespace tgi::cpu
