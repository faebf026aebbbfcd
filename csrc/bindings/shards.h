// What the first shard sends the others: a step's arrays, the rows of another head, or blocks to
// copy.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "bindings/rows.h"
#include "cpu/shard_group.h"

namespace tgi {

using ShardsPtr = std::shared_ptr<cpu::ShardGroup>;
using BlockPairs = std::vector<std::pair<int64_t, int64_t>>;

struct ShardMail {
  enum class Kind : int64_t { kStep, kHead, kCopy, kEnd };
  Kind kind;
  bool only_rows = false;     // of a step: of other tokens nothing is read behind it
  FlatRows batch;             // of a step
  std::vector<int32_t> rows;  // of a step, or of the head
  BlockPairs copies;
};

// Puts it into the mailbox. Throws std::invalid_argument where it is larger than that.
void write_mail(const ShardMail& mail, cpu::ShardGroup& group);
// A step's arrays without a copy of them.
void write_step(const FlatRows& batch, const std::vector<int32_t>& rows, bool only_rows,
                cpu::ShardGroup& group);
void read_mail(const cpu::ShardGroup& group, ShardMail& mail);

void bind_shards(pybind11::module_& module);

}  // namespace tgi
