// A program that is one of several shards: its partial sums, and the work that shard 0
// sends to the others.
#include <stdexcept>
#include <utility>

#include "bindings/program.h"
#include "cpu/step/shards.h"
#include "cpu/team.h"

namespace tgi {

void Program::set_shards(ShardsPtr shards, int64_t first_vocab_id) {
  const cpu::ShardShape& shape = shards->shape();
  check(num_operators() == 0 && shards_ == nullptr, "shards come before all operators");
  check(shape.max_tokens == max_tokens_ && shape.max_rows == max_rows_,
        "the shards' memory is of another program");
  check(shape.num_members == num_members_, "the shards have ", shape.num_members,
        " threads each, not ", num_members_);
  check(first_vocab_id >= 0 && first_vocab_id < shape.vocab_size,
        "`first_vocab_id` must be in [0, ", shape.vocab_size, "), got ", first_vocab_id);
  shards_ = std::move(shards);
  first_vocab_id_ = first_vocab_id;
  forward_.set_shards(shards_);
}

RowsPtr Program::partial_sum() {
  check(shards_ != nullptr, "there are no shards");
  const int64_t turn = num_partial_sums_++ % 2;
  return std::make_shared<RowsBuffer>(
      RowsBuffer{shards_->partial_sum(turn), max_tokens_, shards_->shape().num_columns, turn});
}

void Program::sum_shards(const RowsPtr& partial_sum, double factor, bool adds, const RowsPtr& x) {
  check(shards_ != nullptr && partial_sum->turn, "`partial_sum` must be a shard's partial sum");
  check_rows_buffer(x, partial_sum->num_columns, "x");
  keep(x->memory);
  const cpu::ShardGroup& group = *shards_;
  forward_.add(
      &step::sum_shards,
      step::SumShardsParams{group.partial_sums(*partial_sum->turn), group.partial_sum_floats(),
                            group.shape().count, partial_sum->num_columns, adds,
                            static_cast<float>(factor), x->data()});
}

void Program::share_logits() {
  const RowsPtr own = std::move(logits_);
  const int64_t num_vocab_ids = own->num_columns, vocab = shards_->shape().vocab_size;
  check(first_vocab_id_ + num_vocab_ids <= vocab, "the head's vocabulary ids must be in [0, ",
        vocab, "), got [", first_vocab_id_, ", ", first_vocab_id_ + num_vocab_ids, ")");
  keep(own->memory);
  vocab_ = vocab;
  logits_ = std::make_shared<RowsBuffer>(RowsBuffer{shards_->logits(), max_rows_, vocab});
  head_.add(&step::scatter_logits,
            step::ScatterLogitsParams{own->data(), num_vocab_ids, logits_->data() + first_vocab_id_,
                                      vocab});
}

void Program::send_step(const FlatRows& batch, const std::vector<int32_t>& rows, bool only_rows) {
  if (shards_ == nullptr) return;
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
  pool_->copy(pairs);
  if (shards_ == nullptr) return;
  ShardMail mail = {ShardMail::Kind::kCopy};
  mail.copies = pairs;
  cpu::run_on_team(
      [&](int num_members) {
        check_members(num_members);
        write_mail(mail, *shards_);
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

}  // namespace tgi
