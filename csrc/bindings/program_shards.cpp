// A program that is one of several shards: the work that shard 0 sends to the others.
#include <stdexcept>

#include "bindings/program.h"
#include "cpu/team.h"

namespace tgi {

void Program::send_step(const FlatRows& batch, const std::vector<int32_t>& rows, bool only_rows) {
  if (shards_ == nullptr) return;
  check(batch.images == nullptr && rotary_shifts_.empty(), "shards get no images");
  write_step(batch, rows, only_rows, *shards_);
  shards_->send();
}

void Program::check_shards() const {
  if (shards_ != nullptr && shards_->is_aborted()) {
    throw std::runtime_error("another shard of the model has ended");
  }
}

void Program::copy_blocks(const BlockPairs& pairs) {
  check(pool_ != nullptr, "the program has no keys and values");
  // A prompt's last block is copied for each of its choices: 2 MiB each for 8 B weights in bf16.
  const py::gil_scoped_release release;
  if (shards_ == nullptr) return pool_->copy(pairs);
  ShardMail mail = {ShardMail::Kind::kCopy};
  mail.copies = pairs;
  cpu::run_on_team(
      [&](int num_members) {  // either all shards copy or none
        check_members(num_members);
        write_mail(mail, *shards_);
        pool_->copy(pairs);
        shards_->send();
      },
      [&](int, int) { shard_barrier(); });
  check_shards();
}

void Program::follow() {
  check(shards_ != nullptr && shards_->rank() > 0, "shard 0 leads");
  ShardMail mail;
  while (shards_->receive()) {
    read_mail(*shards_, mail);
    if (mail.kind == ShardMail::Kind::kEnd) return;
    follow_one(mail);
  }
}

void Program::follow_one(ShardMail& mail) {
  if (mail.kind == ShardMail::Kind::kCopy) {
    pool_->copy(mail.copies);
    return cpu::run_on_team([&](int, int) { shard_barrier(); });
  }
  if (mail.kind == ShardMail::Kind::kHead) {
    step::StepHeader header = header_;
    header.num_rows = static_cast<int64_t>(mail.rows.size());
    header.rows = mail.rows.data();
    check_rows(header);
    return cpu::run_on_team([&](int num_members) { check_members(num_members); },
                            [&](int member, int num_members) {
                              head_.run(header, 0, head_.size(), member, num_members);
                              shard_barrier();
                            });
  }
  check(mail.adapters.empty() || mail.adapters.size() == mail.batch.context_len.size(),
        "`adapters` has an entry a sequence");
  mail.batch.set_adapters(kept_adapters(mail.adapters));
  step::StepHeader header = mail.batch.header();
  header.rows = mail.rows.data();
  header.num_rows = static_cast<int64_t>(mail.rows.size());
  begin(header, mail.batch);
  cpu::run_on_team([&](int num_members) { prepare(num_members, mail.only_rows); },
                   [&](int member, int num_members) {
                     run_step(member, num_members);
                     shard_barrier();
                   });
  end();
}

void Program::keep_adapter(AdapterPtr adapter) {
  check(adapters_ != nullptr && adapter->layout() == adapters_,
        "an adapter must be of this program's layout");
  const int64_t number = adapter->number();
  const std::lock_guard lock(kept_lock_);
  check(kept_.emplace(number, std::move(adapter)).second, "there is an adapter ", number,
        " already");
}

void Program::drop_adapter(int64_t number) {
  std::map<int64_t, AdapterPtr>::node_type dropped;  // its memory is released after the lock
  const std::lock_guard lock(kept_lock_);
  dropped = kept_.extract(number);
}

std::vector<AdapterPtr> Program::kept_adapters(const std::vector<int64_t>& numbers) {
  std::vector<AdapterPtr> found;
  if (numbers.empty()) return found;
  const std::lock_guard lock(kept_lock_);
  for (const int64_t number : numbers) {
    const auto kept = kept_.find(number);
    check(number == -1 || kept != kept_.end(), "there is no adapter ", number);
    found.push_back(number == -1 ? nullptr : kept->second);
  }
  return found;
}

}  // namespace tgi
