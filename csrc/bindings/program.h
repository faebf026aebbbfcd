// A recorded step as Python runs it, tgi_asgi._C.Program. A step's arrays are checked before each
// run, and the kernels rely on it.
#pragma once

#include <cstdint>
#include <map>
#include <mutex>
#include <optional>
#include <vector>

#include "bindings/recording.h"
#include "bindings/rows.h"
#include "bindings/sample.h"

namespace tgi {

class Program : public Recording {
 public:
  using Recording::Recording;

  // Everything is checked before anything is computed; the GIL is released meanwhile.
  Floats run(const FlatRows& batch, const std::vector<int32_t>& rows);
  // Runs the same and samples one token per row, in one run of the team. Of tokens after which
  // nothing is sampled, only keys and values are computed. `run_head` is not possible afterwards.
  py::tuple run_and_sample(const FlatRows& batch, const std::vector<int32_t>& rows,
                           std::vector<int32_t> slots, SampleArrays& state,
                           const std::optional<Array<int32_t>>& mask, std::vector<int32_t> drafts);
  // The same for a prepared call, without the GIL.
  void run_and_sample_prepared(const FlatRows& batch, const std::vector<int32_t>& rows,
                               SampleCall& call);
  // Does the same as `run_and_sample` without sampling; returns the seconds per operator, barrier
  // included.
  std::vector<double> profile(const FlatRows& batch, const std::vector<int32_t>& rows);
  // The number of steps computed, up to and including the last one's states.
  int64_t num_steps() const { return num_steps_; }
  // Discards the states of a step that failed after it was computed, if it was computed after the
  // first `num_steps`.
  void roll_back_to(int64_t num_steps) {
    if (num_steps_ > num_steps && states_ != nullptr) states_->roll_back();
  }
  // Discards the states of a slot after more than `num_tokens` tokens.
  void discard_states(int32_t slot, int64_t num_tokens) {
    if (states_ != nullptr) states_->discard(slot, num_tokens);
  }
  // Moves the rotary positions of a slot's tokens by this number, from now on: images take fewer
  // positions than they have tokens. Steps whose rows say where their tokens are ignore it.
  void set_rotary_shift(int32_t slot, int32_t shift);
  // Returns the logits of other rows of the last batch, which `run` must have computed.
  Floats run_head(const std::vector<int32_t>& rows);
  // Copies blocks of the pool (from, to), in all shards.
  void copy_blocks(const BlockPairs& pairs);
  // Computes what shard 0 sends, until it ends or the group is aborted. Call it without the GIL.
  void follow();
  // For a shard other than 0, from any thread: keeps an adapter, which steps may name by its number
  // from then on; and releases one that no later step names, if there is one of that number.
  void keep_adapter(AdapterPtr adapter);
  void drop_adapter(int64_t number);

 private:
  // Checks a step and makes it the current one.
  void begin(const step::StepHeader& header, const FlatRows& batch);
  void check_adapters(const FlatRows& batch) const;
  void check_images(const step::StepHeader& header, const FlatRows& batch) const;
  // Moves tokens in the rotary tables by their slots' shifts.
  void shift_rotary(const FlatRows& batch, step::StepHeader& header);
  void check_header(const step::StepHeader& header) const;
  void check_tables(const step::StepHeader& header, int64_t sequence) const;
  void check_rows(const step::StepHeader& header) const;
  void check_members(int num_members) const;
  // Splits the current step's work; called by one member of the team, before the others start.
  // only_rows: nothing but the logits of the header's rows will be read.
  void prepare(int num_members, bool only_rows);
  // Runs a member's share of the current step. `ends`, if given, has an element per operator.
  void run_step(int member, int num_members, double* ends = nullptr);
  // Ends the current step: its states are the sequences' own from now on.
  void end();
  Floats logits_view(int64_t rows);

  // Sends the current step to the other shards; the last action before it runs.
  void send_step(const FlatRows& batch, const std::vector<int32_t>& rows, bool only_rows);
  // Called by every member when it has finished the work that was sent.
  void shard_barrier() {
    if (shards_ != nullptr) shards_->barrier();
  }
  // Throws std::runtime_error if another shard has not computed its partial sums.
  void check_shards() const;
  void follow_one(ShardMail& mail);
  // Returns the adapters of these numbers; null for -1. Throws if one is not kept.
  std::vector<AdapterPtr> kept_adapters(const std::vector<int64_t>& numbers);

  // The current step, or the last one.
  step::StepHeader header_ = {};
  std::vector<step::AttentionPoint> split_;
  step::LastRows last_rows_;
  bool ends_early_ = false;     // it ends with the last keys and values
  bool has_last_rows_ = false;  // after these it continues with the header's rows only

  std::vector<int32_t> rotary_shifts_;  // by slot; the slots after them have none
  std::vector<int32_t> rotary_;         // of the current step, if it has any

  // What `run` computed, for `run_head`.
  FlatRows batch_;
  std::vector<int32_t> rows_;
  bool can_run_head_ = false;

  int64_t num_steps_ = 0;

  std::mutex kept_lock_;
  std::map<int64_t, AdapterPtr> kept_;  // by number; under `kept_lock_`
};

void bind_program(py::module_& module);

}  // namespace tgi
