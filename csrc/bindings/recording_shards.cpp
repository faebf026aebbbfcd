// Recording of one of several shards: its partial sums, and its part of the logits.
#include <utility>

#include "bindings/recording.h"
#include "cpu/step/shards.h"

namespace tgi {

void Recording::set_shards(ShardsPtr shards, int64_t first_vocab_id) {
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

RowsPtr Recording::partial_sum() {
  check(shards_ != nullptr, "there are no shards");
  const int64_t turn = num_partial_sums_++ % 2;
  return std::make_shared<RowsBuffer>(RowsBuffer{
      .memory = shards_->partial_sum(turn),
      .num_rows = max_tokens_,
      .num_columns = shards_->shape().num_columns,
      .turn = turn,
  });
}

void Recording::sum_shards(const RowsPtr& partial_sum, double factor, bool adds, const RowsPtr& x) {
  check(shards_ != nullptr && partial_sum->turn, "`partial_sum` must be a shard's partial sum");
  check_rows_buffer(x, partial_sum->num_columns, "x");
  keep(x->memory);
  const cpu::ShardGroup& group = *shards_;
  const step::SumShardsParams params = {
      .partial_sums = group.partial_sums(*partial_sum->turn),
      .partial_sum_floats = group.partial_sum_floats(),
      .num_shards = group.shape().count,
      .num_columns = partial_sum->num_columns,
      .adds = adds,
      .factor = static_cast<float>(factor),
      .x = x->data(),
  };
  forward_.add(&step::sum_shards, params);
}

void Recording::share_logits() {
  const RowsPtr own = std::move(logits_);
  const int64_t num_vocab_ids = own->num_columns, vocab = shards_->shape().vocab_size;
  check(first_vocab_id_ + num_vocab_ids <= vocab, "the head's vocabulary ids must be in [0, ",
        vocab, "), got [", first_vocab_id_, ", ", first_vocab_id_ + num_vocab_ids, ")");
  keep(own->memory);
  vocab_ = vocab;
  logits_ = std::make_shared<RowsBuffer>(
      RowsBuffer{.memory = shards_->logits(), .num_rows = max_rows_, .num_columns = vocab});
  const step::ScatterLogitsParams params = {
      .from = own->data(),
      .num_vocab_ids = num_vocab_ids,
      .to = logits_->data() + first_vocab_id_,
      .stride = vocab,
  };
  head_.add(&step::scatter_logits, params);
}

}  // namespace tgi
