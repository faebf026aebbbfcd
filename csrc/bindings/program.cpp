// The recorded step as the class torch.classes.tgi.StepProgram. Operands are checked when they are
// recorded, the header's arrays before each run; the kernels trust both. Tensors that a step reads
// or writes are kept alive here.
#include "cpu/step/program.h"

#include <ATen/ops/diff.h>
#include <ATen/ops/empty.h>
#include <torch/custom_class.h>
#include <torch/library.h>

#include <algorithm>
#include <chrono>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "bindings/checks.h"
#include "bindings/packed.h"
#include "bindings/sample.h"
#include "cpu/team.h"

namespace {

using at::kByte;
using at::kFloat;
using at::kInt;
using at::kLong;
using at::Tensor;
using tgi::check_kv;
using tgi::check_positive;
using tgi::check_range;
using tgi::check_tensor;
using tgi::precision_of;
namespace step = tgi::step;
using step::Precision;
using step::Sync;

class StepProgram : public torch::CustomClassHolder {
 public:
  StepProgram(int64_t max_tokens, int64_t max_sequences, int64_t max_rows)
      : max_tokens_(max_tokens),
        max_sequences_(max_sequences),
        max_rows_(max_rows),
        num_members_(tgi::cpu::num_threads()),
        split_(static_cast<size_t>(num_members_) + 1) {
    check_positive(max_tokens, "max_tokens");
    check_positive(max_sequences, "max_sequences");
    check_positive(max_rows, "max_rows");
  }

  // Bytes of an activation buffer for `tokens` rows.
  int64_t activation_bytes(int64_t tokens, int64_t columns, const std::string& precision) const {
    const int64_t tiles = (tokens + step::kTileTokens - 1) / step::kTileTokens;
    const step::Activation shape = {nullptr, precision_of(precision), columns};
    return std::max<int64_t>(tiles, num_members_) * shape.tile_bytes();
  }

  // Bytes of a token's query of `num_heads` heads, as a cache like `kv` wants it.
  int64_t query_bytes(const Tensor& kv, int64_t block_size, int64_t head_dim,
                      int64_t num_heads) const {
    return num_heads * kv_of(kv, block_size, head_dim).query_bytes();
  }

  void embed(const Tensor& weight, const std::string& format, int64_t columns, int64_t num_ids,
             double factor, const Tensor& x) {
    const step::PackedMatrix table = tgi::matrix_of(weight, format, columns);
    TORCH_CHECK(num_ids > 0 && num_ids <= table.num_rows, "`num_ids` must be in [1, ",
                table.num_rows, "], got ", num_ids);
    check_tensor(x, "x", kFloat, {max_tokens_, columns});
    num_ids_ = num_ids;
    x_ = x;
    forward_.add(step::kernels().embed,
                 step::EmbedParams{table, static_cast<float>(factor), x.mutable_data_ptr<float>()});
    keep({weight, x});
  }

  void norm(const Tensor& x, const Tensor& weight, double eps, bool for_logits, const Tensor& out,
            const std::string& precision) {
    const int64_t columns = weight.numel();
    check_tensor(weight, "weight", kFloat, {columns});
    check_tensor(x, "x", kFloat, {max_tokens_, columns});
    const step::Activation activation =
        activation_of(out, for_logits ? max_rows_ : max_tokens_, columns, precision);
    const step::NormParams params = {x.const_data_ptr<float>(),
                                     weight.const_data_ptr<float>(),
                                     static_cast<float>(eps),
                                     for_logits,
                                     activation,
                                     activation.tile_bytes()};
    (for_logits ? head_ : forward_)
        .add(step::kernels().norm, params,
             for_logits ? Sync::kUnlessPrivateRows : Sync::kUnlessPrivateTokens);
    norms_.insert(out.const_data_ptr());
    keep({x, weight, out});
  }

  // parts: the rows of q, k and v as one matrix, or as three of different formats; norms: of q and
  // of k, or none.
  void qkv(const Tensor& in, const std::string& precision, at::TensorList parts,
           std::vector<std::string> formats, int64_t columns, const std::optional<Tensor>& bias,
           int64_t num_heads, const Tensor& cosines, const Tensor& sines, at::TensorList norms,
           double eps, double scale, const Tensor& kv, int64_t block_size, int64_t head_dim,
           const Tensor& q) {
    TORCH_CHECK(parts.size() == formats.size() && (parts.size() == 1 || parts.size() == 3),
                "`parts` must be one or three matrices with a format each");
    TORCH_CHECK(norms.empty() || norms.size() == 2, "`norms` must be none or two");
    step::QkvParams params = {};
    params.kv = kv_of(kv, block_size, head_dim);
    params.num_parts = static_cast<int32_t>(parts.size());
    const int64_t unit_strips = norms.empty() ? 1 : head_dim / step::kStripRows;
    int64_t num_rows = 0;
    for (size_t i = 0; i < parts.size(); ++i) {
      params.parts[i] =
          linear(in, precision, parts[i], formats[i], columns, bias, num_rows, unit_strips);
      num_rows += params.parts[i].weight.num_rows;
    }
    const int64_t expected = (num_heads + 2 * params.kv.num_heads) * head_dim;
    TORCH_CHECK(num_heads > 0 && num_heads % params.kv.num_heads == 0 && num_rows == expected,
                "`parts` must have the rows of the heads, ", expected, ", got ", num_rows);
    check_tensor(cosines, "cosines", kFloat, {-1, head_dim / 2});
    check_tensor(sines, "sines", kFloat, {cosines.size(0), head_dim / 2});
    check_tensor(q, "q", kByte, {max_tokens_, num_heads * params.kv.query_bytes()});
    for (const Tensor& norm : norms) check_tensor(norm, "norms", kFloat, {head_dim});
    if (bias) check_tensor(*bias, "bias", kFloat, {expected});
    params.num_heads = num_heads;
    params.head_dim = head_dim;
    params.cosines = cosines.const_data_ptr<float>();
    params.sines = sines.const_data_ptr<float>();
    params.q_norm = norms.empty() ? nullptr : norms[0].const_data_ptr<float>();
    params.k_norm = norms.empty() ? nullptr : norms[1].const_data_ptr<float>();
    params.eps = static_cast<float>(eps);
    params.q_scale = static_cast<float>(scale * 1.4426950408889634);
    params.q = q.mutable_data_ptr();
    forward_.add(step::kernels().qkv, params);
    last_qkv_ = forward_.size();
    q_ = q;
    num_positions_ = std::min<int64_t>(num_positions_, cosines.size(0));
    keep(parts);
    keep(norms);
    keep({in, cosines, sines, kv, q});
    if (bias) keep({*bias});
  }

  void attention(const Tensor& q, const Tensor& pool, int64_t block_size, int64_t head_dim,
                 int64_t max_context, const Tensor& out, const std::string& precision) {
    const step::KvLayerView kv = kv_of(pool, block_size, head_dim);
    check_tensor(q, "q", kByte, {max_tokens_, -1});
    const int64_t num_heads = q.size(1) / kv.query_bytes(), width = num_heads * head_dim;
    TORCH_CHECK(q.size(1) % kv.query_bytes() == 0 && num_heads % kv.num_heads == 0,
                "`q` must have a multiple of ", kv.num_heads, " heads of ", kv.query_bytes(),
                " bytes, got ", q.size(1), " bytes");
    if (workspace_ == nullptr) {
      workspace_ = std::make_unique<step::AttentionWorkspace>(num_members_, max_context, head_dim);
      max_context_ = max_context;
      num_heads_ = num_heads;
      kv_ = kv;
    }
    TORCH_CHECK(kv.num_heads == kv_.num_heads && head_dim == kv_.head_dim &&
                    kv.num_blocks == kv_.num_blocks && block_size == kv_.block_size &&
                    num_heads_ == num_heads && max_context == max_context_,
                "all layers of a program must have one shape of attention");
    forward_.add(step::kernels().attention,
                 step::AttentionParams{q.const_data_ptr(), kv, num_heads_,
                                       activation_of(out, max_tokens_, width, precision),
                                       workspace_->partials()});
    keep({q, pool, out});
  }

  void linear_add(const Tensor& in, const std::string& precision, const Tensor& weight,
                  const std::string& format, int64_t columns, const std::optional<Tensor>& bias,
                  const Tensor& x) {
    // It writes to x, which other members may still be normalising for themselves.
    TORCH_CHECK(norms_.count(in.const_data_ptr()) == 0,
                "`linear_add` cannot take the result of `norm`");
    const step::LinearParams params = linear(in, precision, weight, format, columns, bias, 0, 1);
    check_tensor(x, "x", kFloat, {max_tokens_, params.weight.num_rows});
    if (bias) check_tensor(*bias, "bias", kFloat, {params.weight.num_rows});
    forward_.add(step::kernels().linear_add,
                 step::LinearAddParams{params, x.mutable_data_ptr<float>()});
    keep({in, weight, x});
    if (bias) keep({*bias});
  }

  void gate_up(const Tensor& in, const std::string& precision, const Tensor& weight,
               const std::string& format, int64_t columns, const std::optional<Tensor>& bias,
               const std::string& activation, const Tensor& out, const std::string& out_precision) {
    TORCH_CHECK(activation == "silu" || activation == "gelu_tanh",
                "`activation` must be silu or gelu_tanh, got ", activation);
    step::LinearParams params = linear(in, precision, weight, format, columns, bias, 0, 2);
    const int64_t rows = params.weight.num_rows;
    TORCH_CHECK(rows % (2 * step::kStripRows) == 0,
                "`weight` must have a multiple of 64 rows, got ", rows);
    if (bias) check_tensor(*bias, "bias", kFloat, {rows});
    const auto kind =
        activation == "silu" ? step::MlpActivation::kSilu : step::MlpActivation::kGeluTanh;
    forward_.add(
        step::kernels().gate_up,
        step::GateUpParams{params, kind, activation_of(out, max_tokens_, rows / 2, out_precision)});
    keep({in, weight, out});
    if (bias) keep({*bias});
  }

  void logits(const Tensor& in, const std::string& precision, const Tensor& weight,
              const std::string& format, int64_t columns, const std::optional<Tensor>& bias,
              double cap, const Tensor& out) {
    step::LinearParams params = linear(in, precision, weight, format, columns, bias, 0, 1);
    check_tensor(out, "logits", kFloat, {max_rows_, -1});
    TORCH_CHECK(out.size(1) > 0 && out.size(1) <= params.weight.num_rows,
                "`logits` must have at most ", params.weight.num_rows, " columns, got ",
                out.size(1));
    if (bias) check_tensor(*bias, "bias", kFloat, {params.weight.num_rows});
    head_.add(step::kernels().logits, step::LogitsParams{params, out.mutable_data_ptr<float>(),
                                                         out.size(1), static_cast<float>(cap)});
    logits_ = out;
    keep({in, weight, out});
    if (bias) keep({*bias});
  }

  // Runs the forward pass of a batch and, if rows are asked for, the head on these.
  void run(const Tensor& ids, const Tensor& positions, const Tensor& slots,
           const Tensor& query_start, const Tensor& context_len, const Tensor& block_table,
           const Tensor& rows) {
    set_header(ids, positions, slots, query_start, context_len, block_table);
    set_rows(rows);
    if (header_.num_tokens == 0) return;
    tgi::cpu::run_on_team([&](int num_members) { prepare(num_members, false); },
                          [&](int member, int num_members) { run_step(member, num_members); });
  }

  // The same and then one draw a row, all in one run of the team; of tokens that are not drawn
  // after only keys and values are computed. Operands from `row_slots` on are those of the operator
  // `sample`; the mask, if any, was computed before.
  void draw(const Tensor& ids, const Tensor& positions, const Tensor& slots,
            const Tensor& query_start, const Tensor& context_len, const Tensor& block_table,
            const Tensor& rows, const Tensor& row_slots, const Tensor& records,
            const Tensor& counts, const Tensor& biased_ids, const Tensor& biased_values,
            const Tensor& masked_ids, const std::optional<Tensor>& mask, const Tensor& scratch,
            const Tensor& token_ids, const Tensor& is_finite, const Tensor& logprobs,
            const Tensor& top_ids, const Tensor& top_logprobs, const Tensor& num_top) {
    set_header(ids, positions, slots, query_start, context_len, block_table);
    set_rows(rows);
    TORCH_CHECK(header_.num_rows > 0, "`rows` must not be empty");
    const tgi::SampleCall call =
        tgi::check_sample(logits_.narrow(0, 0, header_.num_rows), row_slots, records, counts,
                          biased_ids, biased_values, masked_ids, mask, scratch, token_ids,
                          is_finite, logprobs, top_ids, top_logprobs, num_top);
    tgi::cpu::run_on_team(
        [&](int num_members) {
          prepare(num_members, true);
          call.check_members(num_members);
        },
        [&](int member, int num_members) {
          run_step(member, num_members);
          call.run(member, num_members);
        });
  }

  // As `draw` without drawing; returns the seconds that each operator took, barrier included.
  Tensor profile(const Tensor& ids, const Tensor& positions, const Tensor& slots,
                 const Tensor& query_start, const Tensor& context_len, const Tensor& block_table,
                 const Tensor& rows) {
    set_header(ids, positions, slots, query_start, context_len, block_table);
    set_rows(rows);
    Tensor times = at::empty({num_operators() + 1}, at::kDouble);
    auto* const begin = times.mutable_data_ptr<double>();
    tgi::cpu::run_on_team([&](int num_members) { prepare(num_members, true); },
                          [&](int member, int num_members) {
                            if (member == 0)
                              *begin = std::chrono::duration<double>(
                                           std::chrono::steady_clock::now().time_since_epoch())
                                           .count();
                            run_step(member, num_members, begin + 1);
                          });
    return times.diff();
  }

  // Runs the head again on other rows of the last batch, which `run` must have computed.
  void run_head(const Tensor& rows) {
    TORCH_CHECK(!has_last_rows_, "`draw` has kept only what it drew after");
    set_rows(rows);
    if (header_.num_rows == 0) return;
    tgi::cpu::run_on_team([&](int num_members) { check_members(num_members); },
                          [&](int member, int num_members) {
                            head_.run(header_, 0, head_.size(), member, num_members);
                          });
  }

  int64_t num_operators() const { return forward_.size() + head_.size(); }

 private:
  static void check_limit(int64_t size, int64_t limit, const char* name) {
    TORCH_CHECK(size <= limit, "`", name, "` must have at most ", limit, " elements, got ", size);
  }

  void set_header(const Tensor& ids, const Tensor& positions, const Tensor& slots,
                  const Tensor& query_start, const Tensor& context_len, const Tensor& block_table) {
    check_tensor(ids, "ids", kInt, {-1});
    check_tensor(context_len, "context_len", kInt, {-1});
    const int64_t num_tokens = ids.size(0), num_sequences = context_len.size(0);
    check_limit(num_tokens, max_tokens_, "ids");
    check_limit(num_sequences, max_sequences_, "context_len");
    check_tensor(positions, "positions", kInt, {num_tokens});
    check_tensor(slots, "slots", kLong, {num_tokens});
    check_tensor(query_start, "query_start", kInt, {num_sequences + 1});
    check_tensor(block_table, "block_table", kInt, {num_sequences, -1});
    header_.num_tokens = num_tokens;
    header_.num_sequences = num_sequences;
    header_.num_rows = 0;
    header_.ids = ids.const_data_ptr<int32_t>();
    header_.positions = positions.const_data_ptr<int32_t>();
    header_.slots = slots.const_data_ptr<int64_t>();
    header_.query_start = query_start.const_data_ptr<int32_t>();
    header_.context_len = context_len.const_data_ptr<int32_t>();
    header_.block_table = block_table.const_data_ptr<int32_t>();
    header_.block_table_stride = block_table.size(1);
    check_header();
  }

  void check_header() const {
    const step::StepHeader& h = header_;
    check_range(h.ids, h.num_tokens, num_ids_, "ids");
    check_range(h.positions, h.num_tokens, num_positions_, "positions");
    check_range(h.slots, h.num_tokens, kv_.num_blocks * kv_.block_size, "slots");
    TORCH_CHECK(h.query_start[0] == 0 && h.query_start[h.num_sequences] == h.num_tokens,
                "`query_start` must run from 0 to ", h.num_tokens);
    for (int64_t s = 0; s < h.num_sequences; ++s) {
      const int64_t length = int64_t{h.query_start[s + 1]} - h.query_start[s];
      const int64_t longest = std::min(max_context_, h.block_table_stride * kv_.block_size);
      TORCH_CHECK(length > 0, "`query_start` must ascend, got ", h.query_start[s], " before ",
                  h.query_start[s + 1]);
      TORCH_CHECK(h.context_len[s] >= length && h.context_len[s] <= longest, "`context_len`[", s,
                  "] must be in [", length, ", ", longest, "], got ", h.context_len[s]);
      const int64_t num_blocks = (h.context_len[s] + kv_.block_size - 1) / kv_.block_size;
      check_range(h.block_table + s * h.block_table_stride, num_blocks, kv_.num_blocks,
                  "block_table");
    }
  }

  void set_rows(const Tensor& rows) {
    check_tensor(rows, "rows", kInt, {-1});
    check_limit(rows.size(0), max_rows_, "rows");
    check_range(rows.const_data_ptr<int32_t>(), rows.size(0), header_.num_tokens, "rows");
    header_.num_rows = rows.size(0);
    header_.rows = rows.const_data_ptr<int32_t>();
  }

  void check_members(int num_members) const {
    TORCH_CHECK(num_members <= num_members_, "the program was recorded for ", num_members_,
                " threads, not ", num_members);
  }

  // Before a forward pass, once the team is known.
  void prepare(int num_members, bool for_rows) {
    check_members(num_members);
    step::split_attention(header_, num_heads_, kv_.num_heads, num_members, split_.data());
    header_.attention_split = split_.data();
    has_last_rows_ = for_rows && last_rows_.prepare(header_, kv_.block_size, num_heads_,
                                                    kv_.num_heads, num_members);
  }

  void run_step(int member, int num_members, double* ends = nullptr) {
    const step::StepHeader& last = has_last_rows_ ? last_rows_.header() : header_;
    forward_.run(header_, 0, last_qkv_, member, num_members, ends);
    if (has_last_rows_) {
      if (member == 0) {
        last_rows_.gather(x_.mutable_data_ptr(), x_.stride(0) * x_.element_size());
        last_rows_.gather(q_.mutable_data_ptr(), q_.stride(0));
      }
      tgi::cpu::team_barrier();
    }
    forward_.run(last, last_qkv_, forward_.size(), member, num_members, ends);
    if (last.num_rows == 0) return;
    head_.run(last, 0, head_.size(), member, num_members,
              ends == nullptr ? nullptr : ends + forward_.size());
  }

  step::Activation activation_of(const Tensor& buffer, int64_t tokens, int64_t columns,
                                 const std::string& precision) const {
    TORCH_CHECK(columns % step::kBlockColumns == 0,
                "an activation must have a multiple of 32 columns, got ", columns);
    check_tensor(buffer, "activation", kByte, {activation_bytes(tokens, columns, precision)});
    return {buffer.mutable_data_ptr<uint8_t>(), precision_of(precision), columns};
  }

  // A product; `first_row` is where its rows begin in the bias. Makes room to widen a unit's
  // weights.
  step::LinearParams linear(const Tensor& in, const std::string& precision, const Tensor& weight,
                            const std::string& format, int64_t columns,
                            const std::optional<Tensor>& bias, int64_t first_row,
                            int64_t unit_strips) {
    step::LinearParams params = {};
    params.weight = tgi::matrix_of(weight, format, columns);
    params.in = {in.mutable_data_ptr<uint8_t>(), precision_of(precision), columns};
    check_tensor(in, "activation", kByte, {-1});
    const step::Format kind = params.weight.format;
    const bool is_float32 = params.in.precision == Precision::kFloat32;
    TORCH_CHECK(is_float32 ||
                    (params.in.precision == Precision::kInt8 && step::is_quantised(kind)) ||
                    (params.in.precision == Precision::kBF16 && kind == step::Format::kBF16),
                "a weight of format ", format, " cannot be multiplied in ", precision);
    if (norms_.count(in.const_data_ptr()) != 0) params.private_bytes = params.in.tile_bytes();
    if (bias) params.bias = bias->const_data_ptr<float>() + first_row;
    if (is_float32 && kind != step::Format::kF32) {
      params.scratch_floats = unit_strips * step::kStripRows * columns;
      params.scratch = scratch_of(num_members_ * params.scratch_floats);
    }
    return params;
  }

  // One buffer serves all operators, as they run one after the other; it only grows, and old ones
  // stay valid.
  float* scratch_of(int64_t floats) {
    if (scratch_.empty() || scratch_.back().numel() < floats)
      scratch_.push_back(at::empty({floats}, kFloat));
    return scratch_.back().mutable_data_ptr<float>();
  }

  step::KvLayerView kv_of(const Tensor& pool, int64_t block_size, int64_t head_dim) const {
    TORCH_CHECK(block_size > 0 && block_size % 16 == 0,
                "`block_size` must be a multiple of 16, got ", block_size);
    TORCH_CHECK(head_dim > 0 && head_dim % step::kStripRows == 0 && head_dim <= 256,
                "`head_dim` must be a multiple of 32 up to 256, got ", head_dim);
    const bool is_int8 = pool.scalar_type() == at::kChar;
    TORCH_CHECK(is_int8 || pool.scalar_type() == kFloat || pool.scalar_type() == at::kBFloat16,
                "`kv` must be float32, bfloat16 or int8, got ", pool.scalar_type());
    const step::KvLayerView view = {static_cast<uint8_t*>(pool.mutable_data_ptr()),
                                    is_int8                        ? Precision::kInt8
                                    : pool.scalar_type() == kFloat ? Precision::kFloat32
                                                                   : Precision::kBF16,
                                    pool.size(0),
                                    pool.stride(0) * pool.element_size(),
                                    block_size,
                                    pool.size(2),
                                    head_dim};
    check_kv(pool, block_size / 16 * view.sub_block_bytes() / pool.element_size());
    return view;
  }

  void keep(at::TensorList tensors) { kept_.insert(kept_.end(), tensors.begin(), tensors.end()); }

  const int64_t max_tokens_, max_sequences_, max_rows_;
  const int num_members_;
  int64_t num_ids_ = 0, num_heads_ = 0, max_context_ = 0;
  int64_t num_positions_ = INT32_MAX;
  step::KvLayerView kv_ = {};
  step::Segment forward_, head_;
  step::StepHeader header_ = {};
  std::vector<step::AttentionPoint> split_;
  step::LastRows last_rows_;
  bool has_last_rows_ = false;
  int64_t last_qkv_ = 0;  // operators up to the last that writes keys and values
  std::unique_ptr<step::AttentionWorkspace> workspace_;
  std::set<const void*> norms_;  // buffers that members may hold copies of, see kPrivateTokens
  Tensor x_, q_, logits_;
  std::vector<Tensor> scratch_, kept_;
};

}  // namespace

TORCH_LIBRARY_FRAGMENT(tgi, m) {
  m.class_<StepProgram>("StepProgram")
      .def(torch::init<int64_t, int64_t, int64_t>())
      .def("activation_bytes", &StepProgram::activation_bytes)
      .def("query_bytes", &StepProgram::query_bytes)
      .def("embed", &StepProgram::embed)
      .def("norm", &StepProgram::norm)
      .def("qkv",
           [](const c10::intrusive_ptr<StepProgram>& self, const Tensor& in,
              const std::string& precision, std::vector<Tensor> parts,
              std::vector<std::string> formats, int64_t columns, const std::optional<Tensor>& bias,
              int64_t num_heads, const Tensor& cosines, const Tensor& sines,
              std::vector<Tensor> norms, double eps, double scale, const Tensor& kv,
              int64_t block_size, int64_t head_dim, const Tensor& q) {
             self->qkv(in, precision, parts, std::move(formats), columns, bias, num_heads, cosines,
                       sines, norms, eps, scale, kv, block_size, head_dim, q);
           })
      .def("attention", &StepProgram::attention)
      .def("linear_add", &StepProgram::linear_add)
      .def("gate_up", &StepProgram::gate_up)
      .def("logits", &StepProgram::logits)
      .def("run", &StepProgram::run)
      .def("draw", &StepProgram::draw)
      .def("profile", &StepProgram::profile)
      .def("run_head", &StepProgram::run_head)
      .def("num_operators", &StepProgram::num_operators);
}
