// A step, recorded once as a list of operators over fixed buffers and replayed by the thread team,
// without Python, allocation or dispatch. The caller that records it keeps the buffers alive.
#pragma once

#include <atomic>
#include <deque>
#include <memory>
#include <utility>
#include <vector>

#include "../memory.h"
#include "../shard_group.h"
#include "attention_split.h"

namespace tgi::cpu::step {

// Which operators are followed by a barrier: all except norms that every member computes for
// itself. Operators that only serve adapters, or images, are skipped in steps without these. After
// kShards operators all shards of the model meet, not only this shard's team.
enum class Sync {
  kAlways,
  kUnlessPrivateTokens,
  kUnlessPrivateRows,
  kOnlyAdapters,
  kOnlyImages,
  kShards
};

// Part of a step (the forward pass, or the head) as a list of operators.
class Segment {
 public:
  template <class Params>
  void add(StepFunction<Params> function, const Params& params, Sync sync = Sync::kAlways) {
    auto owned = std::make_shared<Params>(params);
    operators_.push_back(
        {&call<Params>, reinterpret_cast<void (*)()>(function), owned.get(), sync});
    params_.push_back(std::move(owned));
  }

  int64_t size() const { return static_cast<int64_t>(operators_.size()); }

  // Sets the group that operators with Sync::kShards wait for. Must be called before the first run.
  void set_shards(std::shared_ptr<ShardGroup> shards) { shards_ = std::move(shards); }

  // Runs one member's share of operators [begin, end); all members of the team call it at the same
  // time. If `ends` is given, it has one element per operator of the segment, and member 0 writes
  // the time in seconds at which each operator finished.
  void run(const StepHeader& step, int64_t begin, int64_t end, int member, int num_members,
           double* ends = nullptr) const;

 private:
  struct Operator {
    void (*call)(const Operator&, const StepHeader&, int, int);
    void (*function)();
    const void* params;
    Sync sync;
  };
  template <class Params>
  static void call(const Operator& op, const StepHeader& step, int member, int num_members) {
    const auto function = reinterpret_cast<StepFunction<Params>>(op.function);
    function(*static_cast<const Params*>(op.params), step, member, num_members);
  }

  std::shared_ptr<ShardGroup> shards_;
  std::vector<Operator> operators_;
  std::vector<std::shared_ptr<void>> params_;
};

// The rest of a step once the last layer's keys and values are written: only the tokens whose
// logits are needed, each as a sequence of one token.
class LastRows {
 public:
  // Prepares the header for the rest of `step`. Returns false if the rest is the whole step: its
  // rows are all tokens, or do not ascend.
  bool prepare(const StepHeader& step, const std::vector<AttentionKind>& kinds, int64_t block_size,
               int num_members);

  const StepHeader& header() const { return header_; }

  // Moves the tokens' rows in a buffer, `bytes` each, to their positions in this header.
  void gather(void* buffer, int64_t bytes) const;

 private:
  void prepare_adapters(const StepHeader& step);

  StepHeader header_ = {};
  const int32_t* tokens_ = nullptr;  // the step's rows
  std::vector<int32_t> counts_;      // 0, 1, 2 ...
  std::vector<int32_t> positions_, rotary_;
  std::vector<int32_t> context_len_;
  std::vector<int32_t> block_table_;
  std::vector<AttentionPoint> split_;
  std::vector<AdapterSpan> adapters_;
};

// Divides a step's attention for its header, kind by kind, into [kinds][members + 1] points.
void split_by_kinds(const StepHeader& step, const std::vector<AttentionKind>& kinds,
                    int num_members, std::vector<AttentionPoint>& split);

// Memory for the partial results of row tiles that several members share: one tile per member, of
// the longest context. The system commits only what is written; all of it would be 102 to 273 MB
// with 64 members, contexts of 131,072 tokens and heads of 128.
class AttentionWorkspace {
 public:
  AttentionWorkspace(int num_members, int64_t max_context, int64_t tile_rows, int64_t value_dim);
  const AttentionPartial* partials() const { return partials_.data(); }

 private:
  Memory data_;
  std::deque<std::atomic<int32_t>> arrived_;
  std::vector<AttentionPartial> partials_;
};

}  // namespace tgi::cpu::step
