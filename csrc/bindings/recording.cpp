// A recording's buffers, what it keeps alive, and the parts that several operators share. The
// operators are in the files recording_*.cpp.
#include "bindings/recording.h"

#include <algorithm>

#include "bindings/float_tensors.h"
#include "cpu/step/kernel_sets.h"
#include "cpu/team.h"

namespace tgi {

using step::Precision;

Recording::Recording(int64_t max_tokens, int64_t max_sequences, int64_t max_rows,
                     int64_t max_context)
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

void Recording::set_adapters(LayoutPtr layout) {
  check(num_operators() == 0 && adapters_ == nullptr, "adapters come before all operators");
  for (const AdapterLayout::Product& each : layout->products) {
    inner_stride_ = std::max(inner_stride_, each.max_inner);
  }
  adapters_ = std::move(layout);
}

RowsPtr Recording::rows(int64_t columns, bool for_logits) const {
  check_size(columns, "columns");
  const int64_t padded = step::padded_columns(columns),
                count = for_logits ? max_rows_ : max_tokens_;
  return std::make_shared<RowsBuffer>(
      RowsBuffer{.memory = cpu::allocate(cpu::product_of_sizes({count, padded, kFloatBytes})),
                 .num_rows = count,
                 .num_columns = padded});
}

ActivationPtr Recording::activation(int64_t columns, const std::string& precision, bool for_logits,
                                    int64_t min_tiles) const {
  check_size(columns, "columns");
  check(min_tiles >= 0 && min_tiles <= INT32_MAX, "`min_tiles` must be in [0, ", INT32_MAX,
        "], got ", min_tiles);
  const int64_t count = for_logits ? max_rows_ : max_tokens_;
  const int64_t tile_tokens = step::kernels().tile_tokens;
  const int64_t tiles = std::max({tiles_of(count), int64_t{num_members_}, min_tiles});
  const bool is_by_kind = precision == "by_kind";
  check(!is_by_kind || !for_logits, "rows of logits are of one kind");
  step::Activation view = {
      .data = nullptr,
      .precision = is_by_kind ? Precision::kInt8 : precision_of(precision),
      .num_columns = step::padded_columns(columns),
  };
  const auto allocate = [&](const step::Activation& part) {
    return cpu::allocate(cpu::product_of_sizes({tiles, part.tile_bytes(tile_tokens)}));
  };
  const cpu::Memory memory = allocate(view);
  const cpu::Memory prompt_memory = is_by_kind ? allocate(view.of_prompts()) : nullptr;
  view.data = memory.get();
  view.prompt_data = prompt_memory.get();
  return std::make_shared<ActivationBuffer>(ActivationBuffer{
      .memory = memory,
      .prompt_memory = prompt_memory,
      .num_rows = count,
      .view = view,
      .tile_tokens = tile_tokens,
      .num_tiles = tiles,
  });
}

QueryPtr Recording::query(const KvPool& pool, int64_t layer, int64_t num_heads) const {
  check_size(num_heads, "num_heads");
  const int64_t row_bytes = num_heads * pool.layer(layer).query_bytes();
  const int64_t bytes = cpu::product_of_sizes({max_tokens_, row_bytes}) + step::kPoolSlack;
  return std::make_shared<QueryBuffer>(QueryBuffer{
      .memory = cpu::allocate(bytes),
      .num_rows = max_tokens_,
      .num_heads = num_heads,
      .row_bytes = row_bytes,
  });
}

std::pair<const float*, const float*> Recording::keep(const Norm& norm, int64_t columns,
                                                      const char* name) {
  check_shape(norm.weight, name, {columns});
  if (norm.bias) check_shape(*norm.bias, "bias", {columns});
  check(norm.width > 0 && norm.width <= columns, "`width` must be in [1, ", columns, "], got ",
        norm.width);
  return {keep(norm.weight), norm.bias ? keep(*norm.bias) : nullptr};
}

void Recording::end_cache_writes(bool can_gather, const std::vector<RowsPtr>& rows,
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
    gathered_.push_back({.data = each->memory.get(), .row_bytes = each->num_columns * kFloatBytes});
  }
  if (query == nullptr) return;
  keep(query->memory);
  gathered_.push_back({.data = query->memory.get(), .row_bytes = query->row_bytes});
}

step::AdapterPlace Recording::adapter_place(const Product& product, size_t part) {
  check(adapters_ != nullptr, "the program has no adapters");
  const AdapterLayout::Product& wanted = adapters_->at(*product.adapter);
  const step::PackedMatrix& weight = product.weight.packed;
  check(wanted.num_columns == weight.num_columns &&
            wanted.num_panels * step::kPanelRows == weight.num_rows,
        "product ", *product.adapter, " of the adapters is of another weight");
  if (inner_[part] == nullptr) {
    inner_[part] = cpu::allocate(cpu::product_of_sizes({max_tokens_, inner_stride_, kFloatBytes}));
  }
  return {
      .product = *product.adapter,
      .inner = reinterpret_cast<float*>(inner_[part].get()),
      .stride = inner_stride_,
  };
}

step::LinearParams Recording::linear_params(const Product& product, int64_t unit_strips,
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
    forward_.add(step::kernels().shrink, step::ShrinkParams{params}, step::Sync::kOnlyAdapters);
  }
  return params;
}

step::KvLayerView Recording::use_pool(const PoolPtr& pool, int64_t layer, int64_t num_heads) {
  const step::KvLayerView kv = pool->layer(layer);
  if (pool_ == nullptr) {
    pool_ = pool;
    int64_t value_dim = 0;
    for (int64_t i = 0; i < pool->num_layers(); ++i) {
      value_dim = std::max(value_dim, pool->layer(i).value_dim);
    }
    const int64_t tile_rows = step::kernels().attention_rows(pool->precision());
    workspace_ = std::make_unique<step::AttentionWorkspace>(num_members_, max_context_, tile_rows,
                                                            value_dim);
  }
  check(pool == pool_, "all layers of a program must be of one pool");
  check(num_heads % kv.num_heads == 0, "`num_heads` must be a multiple of ", kv.num_heads, ", got ",
        num_heads);
  return kv;
}

void Recording::keep(const ActivationBuffer& activation) {
  keep(activation.memory);
  if (activation.prompt_memory != nullptr) keep(activation.prompt_memory);
}

const float* Recording::keep(const Floats& array) {
  arrays_.push_back(array);
  return array.data();
}

float* Recording::scratch_of(int64_t floats) {
  // One buffer serves all operators, because they run one after another; older buffers stay valid.
  if (scratch_.empty() || scratch_.back().second < floats) {
    scratch_.emplace_back(cpu::allocate(floats * kFloatBytes), floats);
  }
  return reinterpret_cast<float*>(scratch_.back().first.get());
}

void Recording::check_rows_buffer(const RowsPtr& rows, int64_t columns, const char* name) const {
  check(rows->num_rows == max_tokens_ && rows->num_columns == columns, "`", name, "` must be [",
        max_tokens_, ", ", columns, "], got [", rows->num_rows, ", ", rows->num_columns, "]");
}

void Recording::check_before_end(const char* name) const {
  check(!has_ended_writes_, "`end_cache_writes` must come after ", name);
}

}  // namespace tgi
