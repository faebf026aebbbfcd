// Recording of the operators that most layers have: checks their operands once.
#include <algorithm>

#include "bindings/float_tensors.h"
#include "bindings/recording.h"
#include "cpu/step/image_rows.h"
#include "cpu/step/kernel_sets.h"
#include "cpu/step/shards.h"

namespace tgi {

using step::Sync;

namespace {

// Marks an activation as written without private copies per member.
const step::Activation& shared(const ActivationPtr& out) {
  out->is_private = false;
  return out->view;
}

}  // namespace

void Recording::embed(const Matrix& table, double factor, const std::optional<Floats>& positions,
                      const RowsPtr& out) {
  check_before_end("embed");
  check_rows_buffer(out, table.packed.num_columns, "out");
  check(table.num_rows > 0 && table.has_padding_last,
        "`table` must have its padding after all of its rows");
  const int64_t num_ids = shards_ == nullptr ? table.num_rows : shards_->shape().vocab_size;
  num_ids_ = num_ids_ == 0 ? num_ids : std::min(num_ids_, num_ids);
  step::EmbedParams params = {
      .table = table.packed,
      .factor = static_cast<float>(factor),
      .x = out->data(),
      .positions = nullptr,
  };
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
  const step::EmbedPartParams part = {
      .embed = params,
      .first_vocab_id = first_vocab_id_,
      .num_vocab_ids = table.num_rows,
  };
  forward_.add(&step::embed_part, part, sync_after(out));
}

void Recording::image_rows(const RowsPtr& x, int64_t level, bool adds) {
  check_before_end("image_rows");
  check(level >= 0 && level < INT32_MAX, "`level` must not be negative, got ", level);
  check_num_rows(*x, "x");
  check(image_columns_ == 0 || image_columns_ == x->num_columns,
        "images' rows must be of one width, got ", x->num_columns, " and ", image_columns_);
  num_image_levels_ = std::max(num_image_levels_, level + 1);
  image_columns_ = x->num_columns;
  keep(x->memory);
  const step::ImageRowsParams params = {
      .level = level,
      .adds = adds,
      .num_columns = x->num_columns,
      .x = x->data(),
  };
  forward_.add(&step::place_image_rows, params, Sync::kOnlyImages);
}

void Recording::norm(const RowsPtr& x, const Norm& norm, bool for_logits, bool is_private,
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
      .x = x->data(),
      .weight = weight,
      .bias = bias,
      .width = norm.width,
      .eps = static_cast<float>(norm.eps),
      .for_logits = for_logits,
      .out = out->view,
      .is_private = is_private,
  };
  const Sync sync = !is_private  ? Sync::kAlways
                    : for_logits ? Sync::kUnlessPrivateRows
                                 : Sync::kUnlessPrivateTokens;
  (for_logits ? head_ : forward_).add(step::kernels().norm, params, sync);
}

void Recording::embed_add(const Matrix& table, double factor, const RowsPtr& rows) {
  check_before_end("embed_add");
  check_rows_buffer(rows, table.packed.num_columns, "rows");
  check(table.num_rows > 0 && table.has_padding_last,
        "`table` must have its padding after all of its rows");
  check(shards_ == nullptr, "a shard has only part of each table");
  num_ids_ = num_ids_ == 0 ? table.num_rows : std::min(num_ids_, table.num_rows);
  keep(table.memory);
  keep(rows->memory);
  const step::EmbedAddParams params = {
      .table = table.packed,
      .factor = static_cast<float>(factor),
      .scratch = scratch_of(cpu::product_of_sizes({num_members_, table.packed.num_columns})),
      .rows = rows->data(),
  };
  forward_.add(step::kernels().embed_add, params);
}

void Recording::norm_add(const RowsPtr& rows, const Norm& norm, double factor, double scale,
                         const RowsPtr& x) {
  const int64_t columns = x->num_columns;
  check_rows_buffer(x, columns, "x");
  check_rows_buffer(rows, columns, "rows");
  const auto [weight, bias] = keep(norm, columns, "weight");
  keep(rows->memory);
  keep(x->memory);
  const step::NormAddParams params = {
      .rows = rows->data(),
      .weight = weight,
      .bias = bias,
      .num_columns = columns,
      .width = norm.width,
      .eps = static_cast<float>(norm.eps),
      .factor = static_cast<float>(factor),
      .scale = static_cast<float>(scale),
      .x = x->data(),
  };
  forward_.add(step::kernels().norm_add, params);
}

void Recording::norm_in_place(const Norm& norm, const RowsPtr& x,
                              std::optional<int64_t> first_column) {
  const int64_t columns = x->num_columns, group = norm.weight.size();
  const int64_t first = first_column.value_or(0);
  check_rows_buffer(x, columns, "x");
  if (first_column) {
    check(first >= 0 && first <= columns && norm.width <= columns - first, "columns [", first, ", ",
          first, " + ", norm.width, ") must be in x, which has ", columns);
  } else {
    check(group > 0 && columns % group == 0 && (group == columns || norm.width == group),
          "groups of ", norm.width, " columns must make up x, which has ", columns);
  }
  const auto [weight, bias] = keep(norm, group, "weight");
  keep(x->memory);
  const step::NormRowsParams params = {
      .x = x->data() + first,
      .stride = columns,
      .weight = weight,
      .bias = bias,
      .width = norm.width,
      .num_groups = first_column ? 1 : columns / group,
      .eps = static_cast<float>(norm.eps),
      .out = x->data() + first,
      .out_stride = columns,
  };
  forward_.add(step::kernels().norm_rows, params);
}

void Recording::pack(const RowsPtr& rows, const ActivationPtr& out,
                     std::optional<int64_t> columns) {
  const int64_t width = columns.value_or(out->view.num_columns);
  check(width > 0 && width <= out->view.num_columns, "`columns` must be in [1, ",
        out->view.num_columns, "], got ", width);
  check_rows_buffer(rows, std::max(rows->num_columns, out->view.num_columns), "rows");
  check_num_rows(*out, "out");
  keep(rows->memory);
  keep(*out);
  const step::PackParams params = {
      .rows = rows->data(),
      .stride = rows->num_columns,
      .width = width,
      .out = shared(out),
  };
  forward_.add(step::kernels().pack, params);
}

void Recording::reorder(const ActivationPtr& in, const Array<int32_t>& order,
                        const ActivationPtr& out) {
  const int64_t columns = out->view.num_columns;
  check(in->view.precision == step::Precision::kFloat32 && in->view.num_columns == columns &&
            in != out,
        "`source` must be another activation in float32, of ", columns, " columns");
  check_num_rows(*in, "source");
  check_num_rows(*out, "out");
  check_shape(order, "order", {columns});
  check_range(order.data(), columns, columns, "order");
  const int64_t tile_floats = in->tile_tokens * step::kBlockColumns;  // of a block
  check_size(cpu::product_of_sizes({columns, in->tile_tokens}), "order");
  const cpu::Memory memory = cpu::allocate(columns * static_cast<int64_t>(sizeof(int32_t)));
  auto* const places = reinterpret_cast<int32_t*>(memory.get());
  for (int64_t k = 0; k < columns; ++k) {
    const int64_t column = order.data()[k];
    places[k] = static_cast<int32_t>(column / step::kBlockColumns * tile_floats +
                                     column % step::kBlockColumns);
  }
  keep(memory);
  keep(*in);
  keep(*out);
  const step::ReorderParams params = {
      .in = in->view,
      .is_private = in->is_private,
      .places = places,
      .out = shared(out),
  };
  forward_.add(step::kernels().reorder, params);
}

void Recording::linear(const Product& product, const RowsPtr& out, int64_t first_column) {
  const int64_t rows = product.weight.packed.num_rows;
  check_rows_buffer(out, out->num_columns, "out");
  check(first_column >= 0 && first_column % step::kStripRows == 0 &&
            rows <= out->num_columns - first_column,
        rows, " columns from ", first_column, " on must be in `out`, which has ", out->num_columns);
  keep(out->memory);
  const step::LinearRowsParams params = {
      .linear = linear_params(product, 1),
      .out = out->data() + first_column,
      .stride = out->num_columns,
  };
  forward_.add(step::kernels().linear_rows, params, sync_after(out));
}

void Recording::linear_add(const Product& product, double factor, const RowsPtr& x) {
  check(!product.in->is_private,
        "`linear_add` cannot take a private norm: others may still read x");
  check_rows_buffer(x, product.weight.packed.num_rows, "x");
  keep(x->memory);
  const step::LinearAddParams params = {
      .linear = linear_params(product, 1),
      .factor = static_cast<float>(factor),
      .x = x->data(),
  };
  forward_.add(step::kernels().linear_add, params);
}

void Recording::attention(const QueryPtr& q, const PoolPtr& pool, int64_t layer, int64_t true_dim,
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
  const step::AttentionKind kind = {
      .rule = params.rule,
      .heads = {.num_heads = q->num_heads,
                .num_kv_heads = kv.num_heads,
                .tile_rows = step::kernels().attention_rows(kv.precision)},
  };
  const auto found = std::find(kinds_.begin(), kinds_.end(), kind);
  params.split = found - kinds_.begin();
  if (found == kinds_.end()) kinds_.push_back(kind);
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

void Recording::up(const Product& product, const std::string& activation,
                   const std::pair<double, double>& alphas, const ActivationPtr& out) {
  const int64_t rows = product.weight.packed.num_rows;
  check(rows == out->view.num_columns, "`weight` must have the columns of `out`, ",
        out->view.num_columns, ", got ", rows);
  check_num_rows(*out, "out");
  keep(*out);
  const step::LinearParams linear = linear_params(product, 1);
  const step::MlpFunction function = {
      .kind = check_activation(activation, false),
      .positive = static_cast<float>(alphas.first),
      .negative = static_cast<float>(alphas.second),
  };
  const step::UpParams params = {
      .linear = linear,
      .function = function,
      .out = shared(out),
  };
  forward_.add(step::kernels().up, params);
}

void Recording::gate_up(const Product& product, const std::string& activation,
                        const ActivationPtr& out) {
  const int64_t rows = product.weight.packed.num_rows;
  check(rows == 2 * out->view.num_columns, "`weight` must have twice the columns of `out`, ",
        out->view.num_columns, ", got ", rows);
  check_num_rows(*out, "out");
  keep(*out);
  const step::GateUpParams params = {
      .linear = linear_params(product, 2),
      .function = {.kind = check_activation(activation, true)},
      .out = shared(out),
      .rows = nullptr,
      .stride = 0,
  };
  forward_.add(step::kernels().gate_up, params);
}

void Recording::act_mul(const RowsPtr& gate, const RowsPtr& up, int64_t first_column,
                        const std::string& activation, const ActivationPtr& out) {
  check_rows_buffer(gate, out->view.num_columns, "gate");
  check_rows_buffer(up, up->num_columns, "up");
  check(first_column >= 0 && out->view.num_columns <= up->num_columns - first_column,
        out->view.num_columns, " columns from ", first_column, " on must be in `up`, which has ",
        up->num_columns);
  check_num_rows(*out, "out");
  keep(gate->memory);
  keep(up->memory);
  keep(*out);
  const step::ActMulParams params = {
      .gate = gate->data(),
      .up = up->data() + first_column,
      .up_stride = up->num_columns,
      .function = {.kind = check_activation(activation, true)},
      .out = shared(out),
  };
  forward_.add(step::kernels().act_mul, params);
}

void Recording::logits(const Product& product, int64_t vocab_size, double scale, double cap) {
  check(vocab_size > 0 && vocab_size <= product.weight.packed.num_rows,
        "`vocab_size` must be in [1, ", product.weight.packed.num_rows, "], got ", vocab_size);
  const step::LinearParams linear = linear_params(product, 1, true);
  logits_ = std::make_shared<RowsBuffer>(RowsBuffer{
      .memory = cpu::allocate(cpu::product_of_sizes({max_rows_, vocab_size, kFloatBytes})),
      .num_rows = max_rows_,
      .num_columns = vocab_size,
  });
  vocab_ = vocab_size;
  const step::LogitsParams params = {
      .linear = linear,
      .logits = logits_->data(),
      .vocab_size = vocab_size,
      .scale = static_cast<float>(scale),
      .cap = static_cast<float>(cap),
  };
  head_.add(step::kernels().logits, params);
  if (shards_ != nullptr) share_logits();
}

}  // namespace tgi
