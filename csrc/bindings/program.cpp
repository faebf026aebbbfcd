// Recording: checks the operands of a step's operators once.
#include "bindings/program.h"

#include <algorithm>

#include "bindings/float_tensors.h"
#include "cpu/step/kernel_sets.h"
#include "cpu/step/shards.h"
#include "cpu/team.h"

namespace tgi {

using step::Precision;
using step::Sync;

namespace {

// After writing a partial sum all shards meet at a barrier.
Sync sync_after(const RowsPtr& out) { return out->turn ? Sync::kShards : Sync::kAlways; }

// Marks an activation as written without private copies per member.
const step::Activation& shared(const ActivationPtr& out) {
  out->is_private = false;
  return out->view;
}

}  // namespace

Program::Program(int64_t max_tokens, int64_t max_sequences, int64_t max_rows, int64_t max_context)
    : max_tokens_(max_tokens),
      max_sequences_(max_sequences),
      max_rows_(max_rows),
      max_context_(max_context),
      num_members_(cpu::num_threads()) {
  check_size(max_tokens, "max_tokens");
  check_size(max_sequences, "max_sequences");
  check_size(max_rows, "max_rows");
  check_size(max_context, "max_context");
}

void Program::set_adapters(LayoutPtr layout) {
  check(num_operators() == 0 && adapters_ == nullptr, "adapters come before all operators");
  for (const AdapterLayout::Product& each : layout->products) {
    inner_stride_ = std::max(inner_stride_, each.max_inner);
  }
  adapters_ = std::move(layout);
}

RowsPtr Program::rows(int64_t columns, bool for_logits) const {
  check_size(columns, "columns");
  const int64_t padded = step::padded_columns(columns),
                count = for_logits ? max_rows_ : max_tokens_;
  return std::make_shared<RowsBuffer>(RowsBuffer{
      cpu::allocate(cpu::product_of_sizes({count, padded, kFloatBytes})), count, padded});
}

ActivationPtr Program::activation(int64_t columns, const std::string& precision, bool for_logits,
                                  int64_t min_tiles) const {
  check_size(columns, "columns");
  check(min_tiles >= 0 && min_tiles <= INT32_MAX, "`min_tiles` must be in [0, ", INT32_MAX,
        "], got ", min_tiles);
  const int64_t count = for_logits ? max_rows_ : max_tokens_;
  const int64_t tile_tokens = step::kernels().tile_tokens;
  const int64_t tiles = std::max<int64_t>(
      {(count + tile_tokens - 1) / tile_tokens, int64_t{num_members_}, min_tiles});
  const bool is_by_kind = precision == "by_kind";
  check(!is_by_kind || !for_logits, "rows of logits are of one kind");
  step::Activation view = {nullptr, is_by_kind ? Precision::kInt8 : precision_of(precision),
                           step::padded_columns(columns), nullptr};
  const auto allocate = [&](const step::Activation& part) {
    return cpu::allocate(cpu::product_of_sizes({tiles, part.tile_bytes(tile_tokens)}));
  };
  const cpu::Memory memory = allocate(view);
  const cpu::Memory prompt_memory = is_by_kind ? allocate(view.of_prompts()) : nullptr;
  view.data = memory.get();
  view.prompt_data = prompt_memory.get();
  return std::make_shared<ActivationBuffer>(
      ActivationBuffer{memory, prompt_memory, count, view, tile_tokens, tiles, false});
}

QueryPtr Program::query(const KvPool& pool, int64_t num_heads) const {
  check_size(num_heads, "num_heads");
  const int64_t row_bytes = num_heads * pool.layer(0).query_bytes();
  const int64_t bytes = cpu::product_of_sizes({max_tokens_, row_bytes}) + step::kPoolSlack;
  return std::make_shared<QueryBuffer>(
      QueryBuffer{cpu::allocate(bytes), max_tokens_, num_heads, row_bytes});
}

void Program::embed(const Matrix& table, double factor, const std::optional<Floats>& positions,
                    const RowsPtr& out) {
  check_before_end("embed");
  check_rows_buffer(out, table.packed.num_columns, "out");
  check(table.num_rows > 0 && table.has_padding_last,
        "`table` must have its padding after all of its rows");
  const int64_t num_ids = shards_ == nullptr ? table.num_rows : shards_->shape().vocab_size;
  num_ids_ = num_ids_ == 0 ? num_ids : std::min(num_ids_, num_ids);
  step::EmbedParams params = {table.packed, static_cast<float>(factor), out->data(), nullptr};
  if (positions) {
    check_shape(*positions, "positions", {-1, out->num_columns});
    check(positions->shape(0) > 0, "`positions` must have rows");
    num_positions_ = std::min<int64_t>(num_positions_, positions->shape(0));
    has_positions_ = true;
    params.positions = keep(*positions);
  }
  keep(table.memory);
  keep(out->memory);
  if (shards_ == nullptr) return forward_.add(step::kernels().embed, params);
  forward_.add(&step::embed_part, step::EmbedPartParams{params, first_vocab_id_, table.num_rows},
               sync_after(out));
}

std::pair<const float*, const float*> Program::keep(const Norm& norm, int64_t columns,
                                                    const char* name) {
  check_shape(norm.weight, name, {columns});
  if (norm.bias) check_shape(*norm.bias, "bias", {columns});
  check(norm.width > 0 && norm.width <= columns, "`width` must be in [1, ", columns, "], got ",
        norm.width);
  return {keep(norm.weight), norm.bias ? keep(*norm.bias) : nullptr};
}

void Program::norm(const RowsPtr& x, const Norm& norm, bool for_logits, bool is_private,
                   const ActivationPtr& out) {
  const int64_t columns = out->view.num_columns;
  check_rows_buffer(x, columns, "x");
  const auto [weight, bias] = keep(norm, columns, "weight");
  check_num_rows(*out, "out", for_logits);
  check(!is_private || out->num_tiles >= num_members_, "`out` must have room for ", num_members_,
        " threads' own copies, got ", out->num_tiles);
  keep(x->memory);
  keep(*out);
  out->is_private = is_private;
  const step::NormParams params = {
      x->data(),  weight,    bias,      norm.width, static_cast<float>(norm.eps),
      for_logits, out->view, is_private};
  const Sync sync = !is_private  ? Sync::kAlways
                    : for_logits ? Sync::kUnlessPrivateRows
                                 : Sync::kUnlessPrivateTokens;
  (for_logits ? head_ : forward_).add(step::kernels().norm, params, sync);
}

void Program::norm_add(const RowsPtr& rows, const Norm& norm, double factor, const RowsPtr& x) {
  const int64_t columns = x->num_columns;
  check_rows_buffer(x, columns, "x");
  check_rows_buffer(rows, columns, "rows");
  const auto [weight, bias] = keep(norm, columns, "weight");
  keep(rows->memory);
  keep(x->memory);
  forward_.add(
      step::kernels().norm_add,
      step::NormAddParams{rows->data(), weight, bias, columns, norm.width,
                          static_cast<float>(norm.eps), static_cast<float>(factor), x->data()});
}

void Program::norm_in_place(const Norm& norm, const RowsPtr& x) {
  const int64_t columns = x->num_columns;
  check_rows_buffer(x, columns, "x");
  const auto [weight, bias] = keep(norm, columns, "weight");
  keep(x->memory);
  forward_.add(step::kernels().norm_rows,
               step::NormRowsParams{x->data(), columns, weight, bias, norm.width,
                                    static_cast<float>(norm.eps), x->data(), columns});
}

void Program::pack(const RowsPtr& rows, const ActivationPtr& out) {
  const int64_t columns = out->view.num_columns;
  check_rows_buffer(rows, std::max(rows->num_columns, columns), "rows");
  check_num_rows(*out, "out");
  keep(rows->memory);
  keep(*out);
  forward_.add(step::kernels().pack,
               step::PackParams{rows->data(), rows->num_columns, columns, shared(out)});
}

void Program::linear(const Product& product, const RowsPtr& out, int64_t first_column) {
  const int64_t rows = product.weight.packed.num_rows;
  check_rows_buffer(out, out->num_columns, "out");
  check(first_column >= 0 && first_column % step::kStripRows == 0 &&
            rows <= out->num_columns - first_column,
        rows, " columns from ", first_column, " on must be in `out`, which has ", out->num_columns);
  keep(out->memory);
  forward_.add(step::kernels().linear_rows,
               step::LinearRowsParams{linear_params(product, 1), out->data() + first_column,
                                      out->num_columns},
               sync_after(out));
}

void Program::linear_add(const Product& product, double factor, const RowsPtr& x) {
  check(!product.in->is_private,
        "`linear_add` cannot take a private norm: others may still read x");
  check_rows_buffer(x, product.weight.packed.num_rows, "x");
  keep(x->memory);
  forward_.add(
      step::kernels().linear_add,
      step::LinearAddParams{linear_params(product, 1), static_cast<float>(factor), x->data()});
}

void Program::attention(const QueryPtr& q, const PoolPtr& pool, int64_t layer, int64_t true_dim,
                        const SpecPtr& spec, const ActivationPtr& out, const RowsPtr& rows) {
  check_num_rows(*q, "q");
  const step::KvLayerView kv = use_pool(pool, layer, q->num_heads);
  check(q->row_bytes == q->num_heads * kv.query_bytes(), "`q` must be of this pool's kind");
  check(true_dim > 0 && true_dim <= kv.value_dim, "`true_dim` must be in [1, ", kv.value_dim,
        "], got ", true_dim);
  const int64_t width = q->num_heads * true_dim;
  step::AttentionParams params = {};
  params.q = q->memory.get();
  params.kv = kv;
  params.num_heads = q->num_heads;
  params.true_dim = true_dim;
  params.rule = spec->rule();
  const auto found = std::find(rules_.begin(), rules_.end(), params.rule);
  params.split = found - rules_.begin();
  if (found == rules_.end()) rules_.push_back(params.rule);
  params.scores = spec->scores(q->num_heads);
  specs_.push_back(spec);
  params.partials = workspace_->partials();
  check((out == nullptr) != (rows == nullptr), "either `out` or `rows` is written");
  if (out != nullptr) {
    check(true_dim % step::kBlockColumns == 0 && out->view.num_columns == width, "`out` must have ",
          width, " columns, in heads of a multiple of 32");
    check_num_rows(*out, "out");
    keep(*out);
    params.out = shared(out);
  } else {
    check_rows_buffer(rows, step::padded_columns(width), "rows");
    keep(rows->memory);
    params.rows = rows->data();
    params.stride = rows->num_columns;
  }
  keep(q->memory);
  forward_.add(step::kernels().attention, params);
}

void Program::up(const Product& product, const std::string& activation,
                 const std::pair<double, double>& alphas, const ActivationPtr& out) {
  const int64_t rows = product.weight.packed.num_rows;
  check(rows == out->view.num_columns, "`weight` must have the columns of `out`, ",
        out->view.num_columns, ", got ", rows);
  check_num_rows(*out, "out");
  keep(*out);
  const step::LinearParams linear = linear_params(product, 1);
  const step::MlpFunction function = {check_activation(activation, false),
                                      static_cast<float>(alphas.first),
                                      static_cast<float>(alphas.second)};
  forward_.add(step::kernels().up, step::UpParams{linear, function, shared(out)});
}

void Program::gate_up(const Product& product, const std::string& activation,
                      const ActivationPtr& out) {
  const int64_t rows = product.weight.packed.num_rows;
  check(rows == 2 * out->view.num_columns, "`weight` must have twice the columns of `out`, ",
        out->view.num_columns, ", got ", rows);
  check_num_rows(*out, "out");
  keep(*out);
  const step::LinearParams linear = linear_params(product, 2);
  forward_.add(
      step::kernels().gate_up,
      step::GateUpParams{linear, {check_activation(activation, true)}, shared(out), nullptr, 0});
}

void Program::act_mul(const RowsPtr& gate, const RowsPtr& up, const std::string& activation,
                      const ActivationPtr& out) {
  check_rows_buffer(gate, out->view.num_columns, "gate");
  check_rows_buffer(up, out->view.num_columns, "up");
  check_num_rows(*out, "out");
  keep(gate->memory);
  keep(up->memory);
  keep(*out);
  forward_.add(step::kernels().act_mul,
               step::ActMulParams{
                   gate->data(), up->data(), {check_activation(activation, true)}, shared(out)});
}

void Program::logits(const Product& product, int64_t vocab_size, double scale, double cap) {
  check(vocab_size > 0 && vocab_size <= product.weight.packed.num_rows,
        "`vocab_size` must be in [1, ", product.weight.packed.num_rows, "], got ", vocab_size);
  const step::LinearParams linear = linear_params(product, 1, true);
  logits_ = std::make_shared<RowsBuffer>(
      RowsBuffer{cpu::allocate(cpu::product_of_sizes({max_rows_, vocab_size, kFloatBytes})),
                 max_rows_, vocab_size});
  vocab_ = vocab_size;
  head_.add(step::kernels().logits,
            step::LogitsParams{linear, logits_->data(), vocab_size, static_cast<float>(scale),
                               static_cast<float>(cap)});
  if (shards_ != nullptr) share_logits();
}

void Program::end_cache_writes(bool can_gather, const std::vector<RowsPtr>& rows,
                               const QueryPtr& query) {
  for (const RowsPtr& each : rows) {
    check(each != nullptr, "`rows` must be buffers");
    check_num_rows(*each, "rows");
  }
  if (query != nullptr) check_num_rows(*query, "query");
  last_write_ = forward_.size();
  has_ended_writes_ = true;
  can_gather_ = can_gather;
  gathered_.clear();
  for (const RowsPtr& each : rows) {
    keep(each->memory);
    gathered_.push_back({each->memory.get(), each->num_columns * kFloatBytes});
  }
  if (query == nullptr) return;
  keep(query->memory);
  gathered_.push_back({query->memory.get(), query->row_bytes});
}

step::AdapterPlace Program::adapter_place(const Product& product, size_t part) {
  check(adapters_ != nullptr, "the program has no adapters");
  const AdapterLayout::Product& wanted = adapters_->at(*product.adapter);
  const step::PackedMatrix& weight = product.weight.packed;
  check(wanted.num_columns == weight.num_columns &&
            wanted.num_panels * step::kPanelRows == weight.num_rows,
        "product ", *product.adapter, " of the adapters is of another weight");
  if (inner_[part] == nullptr) {
    inner_[part] = cpu::allocate(cpu::product_of_sizes({max_tokens_, inner_stride_, kFloatBytes}));
  }
  return {*product.adapter, reinterpret_cast<float*>(inner_[part].get()), inner_stride_};
}

step::LinearParams Program::linear_params(const Product& product, int64_t unit_strips,
                                          bool for_logits, size_t part, int64_t num_heads) {
  const step::PackedMatrix& weight = product.weight.packed;
  const int64_t columns = cpu::product_of_sizes({num_heads, weight.num_columns});
  check(product.in->view.num_columns == columns, "the input must have ", columns, " columns, got ",
        product.in->view.num_columns);
  check_num_rows(*product.in, "source", for_logits);
  const step::Activation& in = product.in->view;
  check_product(weight, in.precision, unit_strips);
  if (in.is_by_kind()) check_product(weight, in.of_prompts().precision, unit_strips);
  keep(product.weight.memory);
  keep(*product.in);
  step::LinearParams params = {};
  params.weight = weight;
  params.in = in;
  params.is_private = product.in->is_private;
  if (product.bias) {
    check_shape(*product.bias, "bias", {weight.num_rows});
    params.bias = keep(*product.bias);
  }
  const auto scratch_floats = [&](const step::Activation& part) {
    return step::kernels().scratch_floats(weight, part.precision, unit_strips);
  };
  params.scratch_floats = params.prompt_scratch = scratch_floats(in);
  if (in.is_by_kind()) params.scratch_floats += scratch_floats(in.of_prompts());
  if (params.scratch_floats > 0) params.scratch = scratch_of(num_members_ * params.scratch_floats);
  if (product.adapter) {
    check(!for_logits, "no adapter changes the head");
    params.adapter = adapter_place(product, part);
    forward_.add(step::kernels().shrink, step::ShrinkParams{params}, Sync::kOnlyAdapters);
  }
  return params;
}

step::KvLayerView Program::use_pool(const PoolPtr& pool, int64_t layer, int64_t num_heads) {
  const step::KvLayerView kv = pool->layer(layer);
  if (pool_ == nullptr) {
    const int64_t tile_rows = step::kernels().attention_rows(kv.precision);
    pool_ = pool;
    kv_ = kv;
    heads_ = {num_heads, kv.num_heads, tile_rows};
    workspace_ = std::make_unique<step::AttentionWorkspace>(num_members_, max_context_, tile_rows,
                                                            kv.value_dim);
  }
  check(pool == pool_ && num_heads == heads_.num_heads && kv.num_heads == kv_.num_heads &&
            kv.head_dim == kv_.head_dim && kv.value_dim == kv_.value_dim,
        "all layers of a program must have one shape of attention");
  check(num_heads % kv.num_heads == 0, "`num_heads` must be a multiple of ", kv.num_heads, ", got ",
        num_heads);
  return kv;
}

void Program::keep(const ActivationBuffer& activation) {
  keep(activation.memory);
  if (activation.prompt_memory != nullptr) keep(activation.prompt_memory);
}

const float* Program::keep(const Floats& array) {
  arrays_.push_back(array);
  return array.data();
}

float* Program::scratch_of(int64_t floats) {
  // One buffer serves all operators, because they run one after another; older buffers stay valid.
  if (scratch_.empty() || scratch_.back().second < floats) {
    scratch_.emplace_back(cpu::allocate(floats * kFloatBytes), floats);
  }
  return reinterpret_cast<float*>(scratch_.back().first.get());
}

void Program::check_rows_buffer(const RowsPtr& rows, int64_t columns, const char* name) const {
  check(rows->num_rows == max_tokens_ && rows->num_columns == columns, "`", name, "` must be [",
        max_tokens_, ", ", columns, "], got [", rows->num_rows, ", ", rows->num_columns, "]");
}

void Program::check_before_end(const char* name) const {
  check(!has_ended_writes_, "`end_cache_writes` must come after ", name);
}

}  // namespace tgi
