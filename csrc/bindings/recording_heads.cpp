// Recording of query, key and value heads: their norms, rotation and destination.
#include <algorithm>
#include <tuple>

#include "bindings/recording.h"
#include "cpu/step/kernel_sets.h"

namespace tgi {

void Recording::qkv(const std::vector<Product>& products, const Heads& heads, bool has_keys,
                    const QueryPtr& out) {
  if (has_keys) check_before_end("qkv");
  check(products.size() == 1 || (has_keys && products.size() == 3),
        "`products` must be one, or three with keys and values");
  step::QkvParams params = {};
  params.heads = head_params(heads, has_keys, out);
  params.num_parts = static_cast<int32_t>(products.size());
  const int64_t strips = params.heads.kv.num_strips();
  const int64_t unit_strips = heads.norms ? strips : 1;
  check(!heads.norms || !heads.norms->is_whole, "norms over all heads are those of `head_rows`");
  int64_t num_rows = 0;
  for (size_t i = 0; i < products.size(); ++i) {
    params.parts[i] = linear_params(products[i], unit_strips, false, i);
    num_rows += params.parts[i].weight.num_rows;
  }
  share_scratch(params);
  const int64_t expected = (heads.num_heads + (has_keys ? 2 * params.heads.kv.num_heads : 0)) *
                           strips * step::kStripRows;
  check(num_rows == expected, "`products` must have the rows of the heads, ", expected, ", got ",
        num_rows);
  forward_.add(step::kernels().qkv, params);
}

void Recording::head_rows(const RowsPtr& rows, const Heads& heads, bool has_keys,
                          const QueryPtr& out) {
  if (has_keys) check_before_end("written heads");
  step::HeadRowsParams params = {};
  params.heads = head_params(heads, has_keys, out);
  const int64_t width = params.heads.kv.num_strips() * step::kStripRows;
  const int64_t num_kv_heads = params.heads.kv.num_heads;
  check_rows_buffer(rows, (heads.num_heads + (has_keys ? 2 * num_kv_heads : 0)) * width, "rows");
  keep(rows->memory);
  params.rows = rows->data();
  params.stride = rows->num_columns;
  params.has_keys = has_keys;
  params.is_whole_norm = heads.norms && heads.norms->is_whole;
  forward_.add(step::kernels().head_rows, params);
}

step::HeadParams Recording::head_params(const Heads& heads, bool has_values, const QueryPtr& out) {
  step::HeadParams params = {};
  params.kv = use_pool(heads.pool, heads.layer, heads.num_heads);
  check(!params.kv.is_latent, "latents are written by `latent_qkv`");
  check(!has_values || params.kv.head_dim == params.kv.value_dim,
        "a recorded step writes keys and values of one width, got ", params.kv.head_dim, " and ",
        params.kv.value_dim);
  check(heads.true_dim > 0 && heads.true_dim <= params.kv.head_dim, "`true_dim` must be in [1, ",
        params.kv.head_dim, "], got ", heads.true_dim);
  check(out->num_heads == heads.num_heads &&
            out->row_bytes == heads.num_heads * params.kv.query_bytes(),
        "`out` must be the queries of these heads for this pool");
  check_num_rows(*out, "out");
  check(heads.cosines.has_value() == heads.sines.has_value(), "cosines and sines come together");
  if (heads.cosines) {
    check_shape(*heads.cosines, "cosines", {-1, -1});
    const int64_t pairs = heads.cosines->shape(1);
    check(pairs > 0 && pairs % 16 == 0 && pairs <= params.kv.num_strips() * 16,
          "`cosines` must have 16 columns for each of up to ", params.kv.num_strips(),
          " strips, got ", pairs);
    check_shape(*heads.sines, "sines", {heads.cosines->shape(0), pairs});
    params.rotary_strips = pairs / 16;
    num_angles_ = num_angles_ == 0 || num_angles_ == pairs ? pairs : -1;
    num_positions_ = std::min<int64_t>(num_positions_, heads.cosines->shape(0));
    params.cosines = keep(*heads.cosines);
    params.sines = keep(*heads.sines);
  }
  if (heads.query_scales) {
    check_shape(*heads.query_scales, "query_scales", {-1});
    num_positions_ = std::min<int64_t>(num_positions_, heads.query_scales->shape(0));
    params.query_scales = keep(*heads.query_scales);
  }
  if (heads.norms) set_norms(*heads.norms, heads.num_heads, params);
  params.num_heads = heads.num_heads;
  params.true_dim = heads.true_dim;
  params.clip = static_cast<float>(heads.clip);
  params.q_scale = heads.scale ? static_cast<float>(*heads.scale * step::kLog2E) : 1.0f;
  params.q = out->memory.get();
  keep(out->memory);
  return params;
}

void Recording::set_norms(const HeadNorms& norms, int64_t num_heads, step::HeadParams& params) {
  const int64_t width = params.kv.num_strips() * step::kStripRows, kv_heads = params.kv.num_heads;
  const bool is_each = norms.is_whole || norms.query.weight.size() != width;
  check(norms.query.bias.has_value() == norms.key.bias.has_value() &&
            norms.query.eps == norms.key.eps,
        "the norms of queries and of keys must be of one kind");
  check(!norms.is_whole || (!norms.query.bias && !norms.is_last),
        "a norm over all heads must be an RMSNorm before the rotation");
  check(!norms.has_values || (!norms.is_whole && !norms.query.bias),
        "values are normalised with the RMSNorms of single heads");
  const auto of = [&](const Norm& norm, int64_t heads, const char* name) {
    return keep(norm, is_each ? heads * width : width, name);
  };
  std::tie(params.q_norm, params.q_bias) = of(norms.query, num_heads, "q_norm");
  std::tie(params.k_norm, params.k_bias) = of(norms.key, kv_heads, "k_norm");
  params.norm_stride = is_each ? width : 0;
  params.is_norm_last = norms.is_last;
  params.norms_values = norms.has_values;
  params.eps = static_cast<float>(norms.query.eps);
}

void Recording::share_scratch(step::QkvParams& params) {
  // Members may be in different parts at the same time, so every part uses the same scratch stride
  // per member.
  int64_t floats = 0;
  for (const step::LinearParams& part : params.parts) {
    floats = std::max(floats, part.scratch_floats);
  }
  for (step::LinearParams& part : params.parts) {
    if (part.scratch_floats == 0) continue;
    part.scratch_floats = floats;
    part.scratch = scratch_of(num_members_ * floats);
  }
}

}  // namespace tgi
