// Recording of latent attention (MLA): checks its operands once.
#include <algorithm>

#include "bindings/recording.h"
#include "cpu/step/kernel_sets.h"

namespace tgi {

void Recording::heads_linear(const Product& product, int64_t num_heads, const RowsPtr& out) {
  check_size(num_heads, "num_heads");
  check(!product.bias && !product.adapter, "products of heads have neither biases nor adapters");
  step::HeadsLinearParams params = {};
  params.linear = linear_params(product, 1, false, 0, num_heads);
  const int64_t rows = params.linear.weight.num_rows;
  check(rows % (num_heads * step::kStripRows) == 0, "the weight must have whole strips of ",
        step::kStripRows, " rows for each of ", num_heads, " heads, got ", rows);
  check(!params.linear.is_private, "`heads_linear` cannot take a private norm");
  check_rows_buffer(out, rows, "out");
  keep(out->memory);
  params.num_heads = num_heads;
  params.out = out->data();
  params.stride = out->num_columns;
  forward_.add(step::kernels().heads_linear, params);
}

void Recording::latent_qkv(const RowsPtr& absorbed, const RowsPtr& rotary, const RowsPtr& latents,
                           const LatentHeads& heads, const QueryPtr& out) {
  check_before_end("latent_qkv");
  check_size(heads.num_heads, "num_heads");
  step::LatentQkvParams params = {};
  params.kv = use_pool(heads.pool, heads.layer, heads.num_heads);
  check(params.kv.is_latent, "`latent_qkv` takes a pool of latents");
  const int64_t rank = params.kv.value_dim, rotary_dim = params.kv.head_dim - rank;
  check(rotary_dim > 0, "latents must have a part that is rotated");
  const auto columns_of = [&](const RowsPtr& rows, int64_t first, int64_t count,
                              const char* name) -> const float* {
    check_rows_buffer(rows, rows->num_columns, name);
    check(first >= 0 && first <= rows->num_columns && count <= rows->num_columns - first, "`", name,
          "` must have columns [", first, ", ", first + count, "), got ", rows->num_columns);
    keep(rows->memory);
    return rows->data() + first;
  };
  params.absorbed = columns_of(absorbed, 0, heads.num_heads * rank, "absorbed");
  params.absorbed_stride = absorbed->num_columns;
  params.rotary = columns_of(rotary, heads.rotary_column, heads.num_heads * rotary_dim, "rotary");
  params.rotary_stride = rotary->num_columns;
  params.latents = columns_of(latents, 0, rank + rotary_dim, "latents");
  params.latent_stride = latents->num_columns;
  check_shape(heads.norm, "norm", {rank});
  check_shape(heads.cosines, "cosines", {-1, rotary_dim / 2});
  check_shape(heads.sines, "sines", {heads.cosines.shape(0), rotary_dim / 2});
  num_positions_ = std::min<int64_t>(num_positions_, heads.cosines.shape(0));
  params.norm = keep(heads.norm);
  params.eps = static_cast<float>(heads.eps);
  params.cosines = keep(heads.cosines);
  params.sines = keep(heads.sines);
  params.num_heads = heads.num_heads;
  params.q_scale = static_cast<float>(heads.scale * step::kLog2E);
  check(out->num_heads == heads.num_heads &&
            out->row_bytes == heads.num_heads * params.kv.query_bytes(),
        "`out` must be the queries of these heads for this pool");
  check_num_rows(*out, "out");
  params.q = reinterpret_cast<float*>(out->memory.get());
  keep(out->memory);
  forward_.add(step::kernels().latent_qkv, params);
}

}  // namespace tgi
