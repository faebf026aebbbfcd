// Running a recorded step: checks its arrays, splits its work and replays its operators.
#include "bindings/program.h"

#include <algorithm>
#include <chrono>
#include <utility>

#include "cpu/team.h"

namespace tgi {

namespace {

double now_s() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

void check_limit(int64_t size, int64_t limit, const char* name) {
  check(size <= limit, "`", name, "` must have at most ", limit, " elements, got ", size);
}

// Returns a batch's header with the requested rows.
step::StepHeader header_of(const FlatRows& batch, const std::vector<int32_t>& rows) {
  step::StepHeader header = batch.header();
  header.rows = rows.data();
  header.num_rows = static_cast<int64_t>(rows.size());
  return header;
}

}  // namespace

void Program::check_adapters(const FlatRows& batch) const {
  for (const AdapterPtr& adapter : batch.adapters) {
    check(adapter == nullptr || adapter->layout() == adapters_,
          "a row's adapter must be of this program's layout");
  }
}

Floats Program::run(const FlatRows& batch, const std::vector<int32_t>& rows) {
  FlatRows kept = batch;
  std::vector<int32_t> kept_rows = rows;
  check_adapters(batch);
  begin(header_of(kept, kept_rows), kept);
  batch_ = std::move(kept);  // the header's arrays stay in place, for `run_head`
  rows_ = std::move(kept_rows);
  {
    const py::gil_scoped_release release;
    cpu::run_on_team(
        [&](int num_members) {
          prepare(num_members, false);
          send_step(batch_, rows_, false);
        },
        [&](int member, int num_members) {
          run_step(member, num_members);
          shard_barrier();
        });
  }
  end();
  check_shards();
  can_run_head_ = true;
  return logits_view(header_.num_rows);
}

py::tuple Program::run_and_sample(const FlatRows& batch, const std::vector<int32_t>& rows,
                                  std::vector<int32_t> slots, SampleArrays& state,
                                  const std::optional<Array<int32_t>>& mask,
                                  std::vector<int32_t> drafts) {
  check(!rows.empty() && rows.size() == slots.size(),
        "`rows` must not be empty, and have a slot each");
  Samples samples;
  samples.slots = std::move(slots);
  samples.drafts = std::move(drafts);
  SampleCall call(state, samples, mask_data(mask, samples.num_rows(), state.vocab()));
  {
    const py::gil_scoped_release release;
    run_and_sample_prepared(batch, rows, call);
  }
  return samples.arrays();
}

void Program::run_and_sample_prepared(const FlatRows& batch, const std::vector<int32_t>& rows,
                                      SampleCall& call) {
  check(logits_ != nullptr, "nothing was recorded");
  check_adapters(batch);
  const step::StepHeader header = header_of(batch, rows);
  check(call.num_rows() == header.num_rows && call.vocab() == vocab_,
        "the samples must have the rows and the vocabulary of the step");
  begin(header, batch);
  call.set_logits(logits_->data());
  cpu::run_on_team(
      [&](int num_members) {
        prepare(num_members, true);
        call.reserve(num_members);
        send_step(batch, rows, true);
      },
      [&](int member, int num_members) {
        run_step(member, num_members);
        shard_barrier();
        call.run(member, num_members);
      });
  end();
  check_shards();
  call.finish();
}

std::vector<double> Program::profile(const FlatRows& batch, const std::vector<int32_t>& rows) {
  check(!rows.empty(), "`rows` must not be empty");
  check_adapters(batch);
  begin(header_of(batch, rows), batch);
  std::vector<double> ends(static_cast<size_t>(num_operators()) + 1);
  {
    const py::gil_scoped_release release;
    cpu::run_on_team(
        [&](int num_members) {
          prepare(num_members, true);
          send_step(batch, rows, true);
        },
        [&](int member, int num_members) {
          if (member == 0) ends[0] = now_s();
          run_step(member, num_members, ends.data() + 1);
          shard_barrier();
        });
  }
  end();
  check_shards();
  std::vector<double> times;
  for (size_t i = 1; i < ends.size(); ++i) times.push_back(ends[i] - ends[i - 1]);
  return times;
}

Floats Program::run_head(const std::vector<int32_t>& rows) {
  check(can_run_head_, "`run_head` is of a step that `run` has computed, and no other since");
  std::vector<int32_t> kept = rows;
  step::StepHeader header = header_;
  header.num_rows = static_cast<int64_t>(kept.size());
  header.rows = kept.data();
  check_rows(header);
  rows_ = std::move(kept);
  header_ = header;
  if (header_.num_rows > 0) {
    const py::gil_scoped_release release;
    cpu::run_on_team(
        [&](int num_members) {
          check_members(num_members);
          if (shards_ == nullptr) return;
          ShardMail mail = {ShardMail::Kind::kHead};
          mail.rows = rows_;
          write_mail(mail, *shards_);
          shards_->send();
        },
        [&](int member, int num_members) {
          head_.run(header_, 0, head_.size(), member, num_members);
          shard_barrier();
        });
  }
  check_shards();
  return logits_view(header_.num_rows);
}

Floats Program::logits_view(int64_t rows) {
  if (logits_ == nullptr) return Floats(std::vector<py::ssize_t>{0, 0});
  auto* const kept = new cpu::Memory(logits_->memory);  // the array keeps the buffer alive
  const py::capsule owner(kept, [](void* memory) { delete static_cast<cpu::Memory*>(memory); });
  return Floats({rows, vocab_}, logits_->data(), owner);
}

void Program::begin(const step::StepHeader& header, const FlatRows& batch) {
  check_limit(header.num_tokens, max_tokens_, "ids");
  check_limit(header.num_sequences, max_sequences_, "context_len");
  check_header(header);
  check_rows(header);
  check_images(header, batch);
  step::StepHeader next = header;
  shift_rotary(batch, next);
  if (states_ != nullptr) states_->begin(batch, next);
  header_ = next;
  can_run_head_ = false;
}

void Program::end() {
  if (states_ != nullptr) states_->commit();
  ++num_steps_;
}

void Program::check_header(const step::StepHeader& h) const {
  if (num_ids_ > 0) check_range(h.ids, h.num_tokens, num_ids_, "ids");
  if (has_positions_ || pool_ != nullptr) {
    check_range(h.positions, h.num_tokens, num_positions_, "positions");
  }
  if (pool_ == nullptr && states_ == nullptr) return;  // nothing reads more
  if (pool_ != nullptr) {
    check(h.num_groups == pool_->num_groups(), "a step must have the block tables of ",
          pool_->num_groups(), " groups, got ", h.num_groups);
    check_range(h.slots, h.num_groups * h.num_tokens, pool_->num_blocks() * pool_->block_size(),
                "slots");
  }
  for (int64_t s = 0; s < h.num_sequences; ++s) {
    const int64_t held =
        pool_ == nullptr ? max_context_ : h.block_table_stride * pool_->block_size();
    const int64_t longest = std::min(max_context_, held);
    check(h.context_len[s] <= longest, "`context_len`[", s, "] must be at most ", longest, ", got ",
          h.context_len[s]);
    if (pool_ != nullptr) check_tables(h, s);
  }
}

void Program::check_tables(const step::StepHeader& h, int64_t sequence) const {
  const int64_t block_size = pool_->block_size();
  const int64_t num_blocks = (h.context_len[sequence] + block_size - 1) / block_size;
  for (int64_t group = 0; group < h.num_groups; ++group) {
    check_range(h.table(group, sequence), num_blocks, pool_->num_blocks(), "block_table");
  }
}

void Program::check_images(const step::StepHeader& h, const FlatRows& batch) const {
  if (batch.images == nullptr) return;
  const ImageRows& images = *batch.images;
  check(images.tokens.empty() ||
            (images.num_levels >= num_image_levels_ && images.num_columns == image_columns_),
        "images' rows must have ", num_image_levels_, " levels of ", image_columns_,
        " columns, got ", images.num_levels, " of ", images.num_columns);
  check(images.num_angles == 0 || images.num_angles == num_angles_,
        "a step's rotary table must have the columns of the model's, ", num_angles_, ", got ",
        images.num_angles);
  for (const int32_t row : images.rotary) {
    check(row < num_positions_, "`rotary` must be below ", num_positions_, ", got ", row);
  }
  if (h.visible_until == nullptr || pool_ == nullptr) return;  // nothing attends
  for (int64_t s = 0; s < h.num_sequences; ++s) {
    for (int64_t t = h.query_start[s]; t < h.query_start[s + 1]; ++t) {
      check(h.visible_until[t] <= h.context_len[s], "`visible_until` must be at most ",
            h.context_len[s], ", got ", h.visible_until[t]);
    }
  }
}

void Program::set_rotary_shift(int32_t slot, int32_t shift) {
  check(slot >= 0 && slot < max_sequences_, "a slot must be in [0, ", max_sequences_, "), got ",
        slot);
  check(shift >= -max_context_ && shift <= max_context_, "`shift` must be in [", -max_context_,
        ", ", max_context_, "], got ", shift);
  const auto index = static_cast<size_t>(slot);
  if (index >= rotary_shifts_.size()) {
    if (shift == 0) return;
    rotary_shifts_.resize(index + 1);
  }
  rotary_shifts_[index] = shift;
}

void Program::shift_rotary(const FlatRows& batch, step::StepHeader& header) {
  const bool is_given = batch.images != nullptr && !batch.images->rotary.empty();
  if (rotary_shifts_.empty() || is_given || pool_ == nullptr) return;
  rotary_.assign(header.positions, header.positions + header.num_tokens);
  for (size_t row = 0; row < batch.row_slots.size(); ++row) {
    const auto slot = static_cast<size_t>(batch.row_slots[row]);
    const int32_t shift = slot < rotary_shifts_.size() ? rotary_shifts_[slot] : 0;
    for (int32_t t = batch.query_start[row]; shift != 0 && t < batch.query_start[row + 1]; ++t) {
      rotary_[static_cast<size_t>(t)] += shift;
    }
  }
  check_range(rotary_.data(), header.num_tokens, num_positions_, "rotary");
  header.rotary = rotary_.data();
}

void Program::check_rows(const step::StepHeader& header) const {
  check_limit(header.num_rows, max_rows_, "rows");
  check_range(header.rows, header.num_rows, header.num_tokens, "rows");
}

void Program::check_members(int num_members) const {
  check(num_members <= num_members_, "the program was recorded for ", num_members_,
        " threads, not ", num_members);
}

void Program::prepare(int num_members, bool only_rows) {
  check_members(num_members);
  ends_early_ = has_last_rows_ = false;
  if (pool_ == nullptr) return;
  step::split_by_kinds(header_, kinds_, num_members, split_);
  header_.attention_split = split_.data();
  ends_early_ = only_rows && header_.num_rows == 0;
  has_last_rows_ = only_rows && can_gather_ &&
                   last_rows_.prepare(header_, kinds_, pool_->block_size(), num_members);
}

void Program::run_step(int member, int num_members, double* ends) {
  const step::StepHeader& last = has_last_rows_ ? last_rows_.header() : header_;
  forward_.run(header_, 0, last_write_, member, num_members, ends);
  if (ends_early_) return;
  if (has_last_rows_) {
    if (member == 0) {
      for (const Gathered& each : gathered_) last_rows_.gather(each.data, each.row_bytes);
    }
    cpu::team_barrier();
  }
  forward_.run(last, last_write_, forward_.size(), member, num_members, ends);
  if (last.num_rows == 0) return;
  head_.run(last, 0, head_.size(), member, num_members,
            ends == nullptr ? nullptr : ends + forward_.size());
}

}  // namespace tgi
