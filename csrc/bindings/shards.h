// What shard 0 sends to the others: a step's arrays, the rows of another head, or blocks to
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
  bool only_rows = false;         // for a step: only `rows` are read afterwards
  FlatRows batch;                 // for a step; on arrival, without adapters
  std::vector<int64_t> adapters;  // for a step: the number of each row's, -1: none; or empty
  std::vector<int32_t> rows;      // for a step or the head
  BlockPairs copies;
};

// Writes to the mailbox. Throws std::invalid_argument if the mail does not fit.
void write_mail(const ShardMail& mail, cpu::ShardGroup& group);
// The same for a step's arrays, without copying them first.
void write_step(const FlatRows& batch, const std::vector<int32_t>& rows, bool only_rows,
                cpu::ShardGroup& group);
void read_mail(const cpu::ShardGroup& group, ShardMail& mail);

void bind_shards(pybind11::module_& module);

}  // namespace tgi
