#include "bindings/paged_attention.h"

#include <pybind11/stl.h>

#include <algorithm>

#include "bindings/matrix.h"
#include "cpu/step/kernel_sets.h"
#include "cpu/team.h"

namespace tgi {

namespace {

step::PlainHeads heads_of(const FloatArray& heads, const char* name, int64_t num_tokens) {
  check_rows_of(heads, 3, name);
  check(heads.shape(0) == num_tokens, "`", name, "` must have the batch's ", num_tokens,
        " tokens, got ", heads.shape(0));
  return {heads.data(), float_stride(heads, 0, name), float_stride(heads, 1, name), heads.shape(2)};
}

// Checks that heads of `dim` are stored as `kept` dims.
void check_dim(const step::KvLayerView& kv, int64_t dim, int64_t kept, const char* name) {
  const bool is_padded = kv.precision == step::Precision::kInt8;
  check((is_padded ? step::padded_columns(dim) : dim) == kept, "heads of `", name, "` must have ",
        kept, is_padded ? " dims with padding" : " dims", ", got ", dim);
}

}  // namespace

PagedAttention::PagedAttention(int64_t max_context) : max_context_(max_context) {
  check_size(max_context, "max_context");
}

void PagedAttention::begin(const FlatRows& batch,
                           const std::optional<Array<int32_t>>& visible_until) {
  if (visible_until) {
    check_shape(*visible_until, "visible_until", {static_cast<int64_t>(batch.ids.size())});
  }
  const py::gil_scoped_release release;
  const std::lock_guard<std::mutex> lock(mutex_);
  has_begun_ = false;
  batch_ = batch;
  header_ = batch_.header();
  visible_until_.clear();
  if (visible_until) {
    visible_until_.assign(visible_until->data(), visible_until->data() + visible_until->size());
    header_.visible_until = visible_until_.data();
  }
  check_batch();
  checked_blocks_ = checked_block_size_ = 0;
  num_splits_ = 0;
  num_pairs_ = 0;
  for (int64_t s = 0; s < header_.num_sequences; ++s) {
    num_pairs_ += static_cast<int64_t>(header_.context_len[s]) *
                  (header_.query_start[s + 1] - header_.query_start[s]);
  }
  has_begun_ = true;
}

void PagedAttention::check_batch() const {
  const step::StepHeader& h = header_;
  for (int64_t s = 0; s < h.num_sequences; ++s) {
    const int64_t start = h.query_start[s], length = h.query_start[s + 1] - start;
    const int64_t context = h.context_len[s];
    check(context <= max_context_, "`context_len`[", s, "] must be at most ", max_context_,
          ", got ", context);
    for (int64_t t = 0; h.visible_until != nullptr && t < length; ++t) {
      const int64_t own = context - length + t + 1, until = h.visible_until[start + t];
      check(until >= own && until <= context, "`visible_until`[", start + t, "] must be in [", own,
            ", ", context, "], got ", until);
    }
  }
}

void PagedAttention::check_pool(const KvPool& pool) {
  const int64_t block_size = pool.block_size(), blocks = pool.num_blocks();
  const step::StepHeader& h = header_;
  check(pool.num_groups() == h.num_groups, "the batch must have the block tables of ",
        pool.num_groups(), " groups, got ", h.num_groups);
  if (checked_blocks_ == blocks && checked_block_size_ == block_size) return;
  check_range(h.slots, h.num_groups * h.num_tokens, blocks * block_size, "slots");
  for (int64_t s = 0; s < h.num_sequences; ++s) {
    const int64_t num_blocks = (h.context_len[s] + block_size - 1) / block_size;
    check(num_blocks <= h.block_table_stride, "`context_len`[", s, "] must be at most ",
          h.block_table_stride * block_size, ", got ", h.context_len[s]);
    for (int64_t group = 0; group < h.num_groups; ++group) {
      check_range(h.table(group, s), num_blocks, blocks, "block_table");
    }
  }
  checked_blocks_ = blocks;
  checked_block_size_ = block_size;
}

void PagedAttention::run(const KvPool& pool, int64_t layer, const FloatArray& q,
                         const std::optional<FloatArray>& k, const std::optional<FloatArray>& v,
                         FloatArray& out, const AttentionSpec& spec) {
  check(k.has_value() == v.has_value(), "`k` and `v` come together");
  const int64_t num_tokens = q.ndim() == 3 ? q.shape(0) : 0;
  const step::KvLayerView kv = pool.layer(layer);
  check(!kv.is_latent, "a pool of latents is for recorded steps alone");
  Call call = {};
  call.store.q = heads_of(q, "q", num_tokens);
  const int64_t num_heads = q.shape(1);
  check(num_heads > 0 && num_heads % kv.num_heads == 0, "`q` must have a multiple of ",
        kv.num_heads, " heads, got ", num_heads);
  check_dim(kv, call.store.q.dim, kv.head_dim, "q");
  call.store.kv = kv;
  if (k) take_keys(*k, *v, num_tokens, call.store);
  check(out.ndim() == 3 && out.shape(0) == num_tokens && out.shape(1) == num_heads &&
            (out.flags() & py::array::c_style) != 0,
        "`out` must be contiguous [", num_tokens, ", ", num_heads, ", value_dim]");
  check_dim(kv, out.shape(2), kv.value_dim, "out");
  call.store.q_scale = spec.q_scale();
  call.store.num_heads = call.attention.num_heads = num_heads;
  call.attention.kv = kv;
  call.attention.true_dim = out.shape(2);
  call.attention.rule = spec.rule();
  call.attention.scores = spec.scores(num_heads);
  call.attention.rows = out.mutable_data();
  call.attention.stride = num_heads * out.shape(2);
  const py::gil_scoped_release release;
  const std::lock_guard<std::mutex> lock(mutex_);
  check(has_begun_ && num_tokens == header_.num_tokens,
        "`begin` must have been given a batch of these ", num_tokens, " tokens");
  run_locked(pool, call);
}

void PagedAttention::take_keys(const FloatArray& k, const FloatArray& v, int64_t num_tokens,
                               step::StoreHeadsParams& store) {
  const step::KvLayerView& kv = store.kv;
  store.k = heads_of(k, "k", num_tokens);
  store.v = heads_of(v, "v", num_tokens);
  check(k.shape(1) == kv.num_heads && v.shape(1) == kv.num_heads, "`k` and `v` must have ",
        kv.num_heads, " heads, got ", k.shape(1), " and ", v.shape(1));
  check_dim(kv, store.k.dim, kv.head_dim, "k");
  check_dim(kv, store.v.dim, kv.value_dim, "v");
}

void PagedAttention::write(const KvPool& pool, int64_t layer, const FloatArray& k,
                           const FloatArray& v) {
  const int64_t num_tokens = k.ndim() == 3 ? k.shape(0) : 0;
  step::StoreHeadsParams store = {};
  store.kv = pool.layer(layer);
  check(!store.kv.is_latent, "a pool of latents is for recorded steps alone");
  take_keys(k, v, num_tokens, store);
  const py::gil_scoped_release release;
  const std::lock_guard<std::mutex> lock(mutex_);
  check(has_begun_ && num_tokens == header_.num_tokens,
        "`begin` must have been given a batch of these ", num_tokens, " tokens");
  check_pool(pool);
  const step::Kernels& kernels = step::kernels();
  const int64_t work = num_tokens * store.kv.num_heads * (store.k.dim + store.v.dim);
  cpu::run_small(
      work, [](int) {},
      [&](int member, int num_members) {
        kernels.store_heads(store, header_, member, num_members);
      });
}

void PagedAttention::run_locked(const KvPool& pool, Call& call) {
  if (header_.num_tokens == 0) return;
  check_pool(pool);
  const int64_t query_bytes = call.attention.num_heads * call.attention.kv.query_bytes();
  const int64_t bytes = cpu::product_of_sizes({header_.num_tokens, query_bytes}) + step::kPoolSlack;
  call.store.out = queries_.reserve(bytes);
  call.attention.q = call.store.out;
  const step::Kernels& kernels = step::kernels();
  const int64_t work = num_pairs_ * call.attention.num_heads *
                       (call.attention.kv.head_dim + call.attention.kv.value_dim);
  const int64_t rows = kernels.attention_rows(call.attention.kv.precision);
  cpu::run_small(
      work,
      [&](int num_members) {
        const int64_t value_dim = call.attention.kv.value_dim;
        if (partials_ == nullptr || num_members > partials_members_ || value_dim > partials_dim_ ||
            rows > partials_rows_) {
          partials_ = nullptr;  // as it stays without the memory
          partials_members_ = std::max(num_members, partials_members_);
          partials_dim_ = std::max(value_dim, partials_dim_);
          partials_rows_ = std::max(rows, partials_rows_);
          partials_ = std::make_unique<step::AttentionWorkspace>(partials_members_, max_context_,
                                                                 partials_rows_, partials_dim_);
        }
        call.attention.partials = partials_->partials();
        header_.attention_split = split(call.attention, rows, num_members);
      },
      [&](int member, int num_members) {
        kernels.store_heads(call.store, header_, member, num_members);
        cpu::team_barrier();
        kernels.attention(call.attention, header_, member, num_members);
      });
}

const step::AttentionPoint* PagedAttention::split(const step::AttentionParams& params,
                                                  int64_t tile_rows, int num_members) {
  const step::AttentionKind kind = {
      .rule = params.rule,
      .heads = {.num_heads = params.num_heads,
                .num_kv_heads = params.kv.num_heads,
                .tile_rows = tile_rows},
  };
  for (size_t i = 0; i < num_splits_; ++i) {
    const Split& each = splits_[i];
    if (each.kind == kind && each.num_members == num_members) return each.points.data();
  }
  if (num_splits_ == splits_.size()) splits_.emplace_back();
  Split& made = splits_[num_splits_];
  made.kind = kind;
  made.num_members = num_members;
  made.points.resize(static_cast<size_t>(num_members) + 1);
  step::split_attention(header_, kind, num_members, made.points.data());
  ++num_splits_;
  return made.points.data();
}

void bind_paged_attention(py::module_& module) {
  py::class_<PagedAttention>(module, "PagedAttention", "See tgi_asgi.ops.PagedAttention.")
      .def(py::init<int64_t>(), py::kw_only(), py::arg("max_context"))
      .def("begin", &PagedAttention::begin, py::arg("batch"),
           py::arg("visible_until").noconvert() = py::none())
      .def("run", &PagedAttention::run, py::arg("pool"), py::arg("layer"), py::arg("q").noconvert(),
           py::arg("k").noconvert(), py::arg("v").noconvert(), py::arg("out").noconvert(),
           py::arg("spec"))
      .def("write", &PagedAttention::write, py::arg("pool"), py::arg("layer"),
           py::arg("k").noconvert(), py::arg("v").noconvert());
}

}  // namespace tgi
