#include "bindings/experts.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <mutex>
#include <numeric>
#include <utility>

#include "bindings/float_tensors.h"
#include "cpu/step/kernel_sets.h"
#include "cpu/team.h"

namespace tgi {

using step::Precision;

namespace {

step::RouteKind kind_of(const std::string& name) {
  if (name == "softmax") return step::RouteKind::kSoftmax;
  if (name == "sigmoid") return step::RouteKind::kSigmoid;
  check(name == "sparsemixer", "`kind` must be softmax, sigmoid or sparsemixer, got ", name);
  return step::RouteKind::kSparseMixer;
}

float finite(double value, const char* name) {
  const auto narrow = static_cast<float>(value);
  check(std::isfinite(narrow), "`", name, "` must be finite, got ", value);
  return narrow;
}

void check_experts(int64_t num_experts, int64_t top_k) {
  check(num_experts >= 1 && num_experts <= step::kMaxExperts, "`num_experts` must be in [1, ",
        step::kMaxExperts, "], got ", num_experts);
  check(top_k >= 1 && top_k <= num_experts, "`top_k` must be in [1, ", num_experts, "], got ",
        top_k);
}

// Copies finite numbers, one per expert.
std::vector<float> per_expert(const Array<float>& values, const char* name, int64_t num_experts) {
  check_shape(values, name, {num_experts});
  std::vector<float> copied;
  for (int64_t i = 0; i < num_experts; ++i) copied.push_back(finite(values.at(i), name));
  return copied;
}

}  // namespace

RouteSpec::RouteSpec(int64_t num_experts, int64_t top_k, const std::string& kind,
                     const std::optional<Array<float>>& correction, int64_t num_groups,
                     int64_t top_groups, bool sums_top_two, bool is_renormalised, double eps,
                     double scale, double jitter,
                     const std::optional<Array<float>>& expert_scales) {
  check_experts(num_experts, top_k);
  check(num_groups >= 1 && num_experts % num_groups == 0, "`num_groups` must divide the ",
        num_experts, " experts, got ", num_groups);
  check(top_groups >= 1 && top_groups <= num_groups, "`top_groups` must be in [1, ", num_groups,
        "], got ", top_groups);
  check(top_k <= num_experts / num_groups * top_groups, "`top_groups` have fewer than `top_k` ",
        "experts: ", top_groups, " of ", num_experts / num_groups, ", ", top_k, " wanted");
  params_.kind = kind_of(kind);
  check(params_.kind != step::RouteKind::kSparseMixer || (!correction && num_groups == 1),
        "sparsemixer has neither a correction nor groups");
  if (correction) {
    correction_ = per_expert(*correction, "correction", num_experts);
    params_.correction = correction_.data();
  }
  if (expert_scales) {
    expert_scales_ = per_expert(*expert_scales, "expert_scales", num_experts);
    params_.expert_scales = expert_scales_.data();
  }
  params_.num_groups = num_groups;
  params_.top_groups = top_groups;
  params_.sums_top_two = sums_top_two;
  params_.is_renormalised = is_renormalised;
  params_.eps = finite(eps, "eps");
  params_.scale = finite(scale, "scale");
  params_.jitter = finite(jitter, "jitter");
  params_.out.num_experts = num_experts;
  params_.out.top_k = top_k;
}

RoutingBuffer RoutingBuffer::make(int64_t num_tokens, int64_t num_experts, int64_t top_k) {
  check_experts(num_experts, top_k);
  const int64_t size = cpu::product_of_sizes({num_tokens, top_k});
  check(size <= INT32_MAX, "a routing has at most ", INT32_MAX, " entries, got ", size);
  const int64_t list_bytes = (size * 4 + 63) / 64 * 64;
  const int64_t experts_bytes = num_experts * static_cast<int64_t>(sizeof(step::ExpertTokens));
  RoutingBuffer made = {
      .memory = cpu::allocate(64 + 4 * list_bytes + experts_bytes),
      .num_rows = num_tokens,
  };
  uint8_t* at = made.memory.get();
  const auto take = [&](int64_t bytes) {
    uint8_t* const taken = at;
    at += bytes;
    return taken;
  };
  step::ExpertRouting& view = made.view;
  view.num_experts = num_experts;
  view.top_k = top_k;
  view.num_used = reinterpret_cast<int64_t*>(take(64));
  view.ids = reinterpret_cast<int32_t*>(take(list_bytes));
  view.weights = reinterpret_cast<float*>(take(list_bytes));
  view.tokens = reinterpret_cast<int32_t*>(take(list_bytes));
  view.token_weights = reinterpret_cast<float*>(take(list_bytes));
  view.experts = reinterpret_cast<step::ExpertTokens*>(take(experts_bytes));
  return made;
}

ExpertStack::ExpertStack(const std::vector<const Matrix*>& matrices,
                         const std::optional<std::vector<Array<float>>>& biases) {
  check(!matrices.empty() && static_cast<int64_t>(matrices.size()) <= step::kMaxExperts,
        "a layer has between 1 and ", step::kMaxExperts, " experts, got ", matrices.size());
  for (const Matrix* const matrix : matrices) {
    check(matrix != nullptr, "`matrices` must be matrices");
    const step::PackedMatrix &first = matrices.front()->packed, &packed = matrix->packed;
    check(packed.num_rows == first.num_rows && packed.num_columns == first.num_columns,
          "the experts of a layer must have one shape, got [", first.num_rows, ", ",
          first.num_columns, "] and [", packed.num_rows, ", ", packed.num_columns, "]");
    memories_.push_back(matrix->memory);
    weights_.push_back(packed);
  }
  if (!biases) return;
  check(biases->size() == matrices.size(), "`biases` must be one an expert, got ", biases->size(),
        " of ", matrices.size());
  for (const Array<float>& bias : *biases) {
    check_shape(bias, "biases", {num_rows()});
    arrays_.push_back(bias);
    biases_.push_back(bias.data());
  }
}

int64_t ExpertStack::nbytes() const {
  int64_t bytes = 0;
  for (const step::PackedMatrix& weight : weights_) {
    bytes += weight.num_rows / step::kPanelRows * weight.panel_size();
  }
  return bytes;
}

void ExpertStack::check_precision(Precision precision, int64_t unit_strips) const {
  for (const step::PackedMatrix& weight : weights_) check_product(weight, precision, unit_strips);
}

int64_t ExpertStack::scratch_floats(Precision precision, int64_t unit_strips) const {
  int64_t most = 0;
  for (const step::PackedMatrix& weight : weights_) {
    most = std::max(most, step::kernels().scratch_floats(weight, precision, unit_strips));
  }
  return most;
}

ExpertMlps ExpertMlps::make(std::vector<StackPtr> gate_up, StackPtr down,
                            const std::string& activation, double limit, double slope,
                            double offset, bool is_gated) {
  check(gate_up.size() == 1 || (is_gated && gate_up.size() == 2),
        "`gate_up` must be one stack, or two of gates and ups, got ", gate_up.size());
  const bool is_joined = is_gated && gate_up.size() == 1;
  for (const StackPtr& part : gate_up) {
    check(part != nullptr, "`gate_up` must be stacks");
    check(part->num_experts() == down->num_experts(), "the products must have the same experts");
    check(part->num_columns() == gate_up.front()->num_columns(),
          "gate and up must have the same columns");
    const int64_t rows = is_joined ? 2 * down->num_columns() : down->num_columns();
    check(part->num_rows() == rows, "gate and up must have ", rows, " rows, got ",
          part->num_rows());
  }
  const MlpActivation function = check_activation(activation, is_gated);
  check(is_gated || function != MlpActivation::kXielu, "xIELU's parameters are those of a layer");
  check(limit == 0 || (is_gated && function == MlpActivation::kSilu),
        "only silu's gates are clamped");
  check(limit >= 0, "`limit` must not be negative, got ", limit);
  return {
      .is_gated = is_gated,
      .gate_up = std::move(gate_up),
      .down = std::move(down),
      .activation = function,
      .clamped = {.limit = finite(limit, "limit"),
                  .slope = finite(slope, "slope"),
                  .offset = finite(offset, "offset")},
  };
}

int64_t set_experts(const ExpertMlps& mlps, step::ExpertsParams& params) {
  int64_t floats = 0;
  const auto product_of = [&](const ExpertStack& stack, const step::Activation& in,
                              int64_t unit_strips) {
    stack.check_precision(in.precision, unit_strips);
    step::ExpertProduct product = {};
    product.matrices = stack.view();
    int64_t wanted = stack.scratch_floats(in.precision, unit_strips);
    product.linear.prompt_scratch = wanted;
    if (in.is_by_kind()) {
      const Precision of_prompts = in.of_prompts().precision;
      stack.check_precision(of_prompts, unit_strips);
      wanted += stack.scratch_floats(of_prompts, unit_strips);
    }
    floats = std::max(floats, wanted);
    return product;
  };
  params.is_gated = mlps.is_gated;
  params.num_parts = static_cast<int32_t>(mlps.gate_up.size());
  for (size_t i = 0; i < mlps.gate_up.size(); ++i) {
    params.gate_up[i] = product_of(*mlps.gate_up[i], params.gathered, mlps.unit_strips());
  }
  params.down = product_of(*mlps.down, params.inner, 1);
  params.function = {mlps.activation};
  params.clamped = mlps.clamped;
  return floats;
}

void set_scratch(step::ExpertsParams& params, float* scratch, int64_t floats) {
  for (step::ExpertProduct* each : {&params.gate_up[0], &params.gate_up[1], &params.down}) {
    each->linear.scratch = floats > 0 ? scratch : nullptr;
    each->linear.scratch_floats = floats;
  }
}

namespace {

// Work memory of direct calls, which the mutex serialises.
struct ExpertsMemory {
  std::mutex mutex;
  Workspace in, gathered, inner, gates, scratch;
};

ExpertsMemory& experts_memory() {
  static auto& memory = *new ExpertsMemory;  // never destroyed: at exit, a thread may still compute
  return memory;
}

void check_columns(const FloatArray& x, int64_t columns) {
  check(x.shape(1) > 0 && step::padded_columns(x.shape(1)) == columns,
        "`x` must have the experts' columns, ", columns, " with padding, got ", x.shape(1));
}

// Builds the routing from arrays; ids beyond the number of experts are ignored.
RoutingBuffer routing_of(const Array<int32_t>& ids, const Array<float>& weights,
                         int64_t num_experts) {
  check_shape(ids, "ids", {-1, -1});
  check_shape(weights, "weights", {ids.shape(0), ids.shape(1)});
  RoutingBuffer made = RoutingBuffer::make(ids.shape(0), num_experts, ids.shape(1));
  check_range(ids.data(), ids.size(), INT32_MAX, "ids");
  std::copy_n(ids.data(), ids.size(), made.view.ids);
  std::copy_n(weights.data(), ids.size(), made.view.weights);
  return made;
}

// Writes each token's experts, weighted and summed, to out: gate, up and down applied to x.
void experts_rows(const ExpertMlps& mlps, const Array<int32_t>& ids, const Array<float>& weights,
                  const FloatArray& x, FloatArray& out, const std::string& precision,
                  const std::string& inner_precision) {
  check_rows_of(x, 2, "x");
  const int64_t num_tokens = x.shape(0), columns = mlps.gate_up.front()->num_columns();
  check_columns(x, columns);
  check(ids.ndim() == 2 && ids.shape(0) == num_tokens, "`ids` must be of the rows of `x`");
  const int64_t width = mlps.down->num_rows();
  check_out(out, num_tokens, width);
  if (num_tokens == 0) return;
  const RoutingBuffer routing = routing_of(ids, weights, mlps.down->num_experts());
  step::StepHeader header = {};
  header.num_tokens = header.num_generated = num_tokens;
  const step::Kernels& kernels = step::kernels();
  step::PackParams pack = {};
  pack.stride = float_stride(x, 0, "x");
  pack.rows = x.data();
  pack.width = x.shape(1);
  step::ExpertsParams params = {};
  params.routing = routing.view;
  params.in = params.gathered = {
      .data = nullptr,
      .precision = precision_of(precision),
      .num_columns = columns,
  };
  params.inner = {
      .data = nullptr,
      .precision = precision_of(inner_precision),
      .num_columns = mlps.num_columns(),
  };
  params.factor = 1;
  params.adds = false;
  params.out = out.mutable_data();
  const int64_t floats = set_experts(mlps, params);
  const py::gil_scoped_release release;
  step::sort_by_expert(routing.view, num_tokens, num_tokens);
  int64_t most = 0;  // tokens of one expert; a token may name the same id twice
  for (int64_t i = 0; i < *routing.view.num_used; ++i) {
    most = std::max<int64_t>(most, routing.view.experts[i].num_tokens);
  }
  params.num_tiles = std::max({tiles_of(num_tokens), tiles_of(most), *routing.view.num_used});
  ExpertsMemory& memory = experts_memory();
  const std::lock_guard<std::mutex> lock(memory.mutex);
  const auto allocate = [&](Workspace& of, const step::Activation& activation, int64_t tiles) {
    const int64_t tile_bytes = activation.tile_bytes(kernels.tile_tokens);
    return of.reserve(cpu::product_of_sizes({tiles, tile_bytes}));
  };
  params.in.data = allocate(memory.in, params.in, tiles_of(num_tokens));
  params.gathered.data = allocate(memory.gathered, params.gathered, params.num_tiles);
  params.inner.data = allocate(memory.inner, params.inner, params.num_tiles);
  pack.out = params.in;
  params.gate_floats = most * step::kStripRows;
  const auto prepare = [&](int num_members) {
    const auto floats_of = [&](Workspace& of, int64_t each) {
      return reinterpret_cast<float*>(
          of.reserve(cpu::product_of_sizes({num_members, each, kFloatBytes})));
    };
    set_scratch(params, floats_of(memory.scratch, floats), floats);
    if (params.num_parts == 2) params.gates = floats_of(memory.gates, params.gate_floats);
  };
  const auto run = [&](int member, int num_members) {
    kernels.pack(pack, header, member, num_members);
    cpu::team_barrier();
    kernels.experts(params, header, member, num_members);
  };
  cpu::run_small(ids.size() * 3 * width * mlps.num_columns(), prepare, run);
}

// Multiplies rows that are grouped by expert, `sizes` per expert, by each expert's own matrix.
void rows_by_expert(const ExpertStack& stack, const Array<int32_t>& sizes, const FloatArray& x,
                    FloatArray& out, const std::string& precision_name) {
  check_rows_of(x, 2, "x");
  check_shape(sizes, "sizes", {stack.num_experts()});
  check_range(sizes.data(), sizes.size(), INT32_MAX, "sizes");
  const int64_t num_rows = std::accumulate(sizes.data(), sizes.data() + sizes.size(), int64_t{0});
  check(num_rows == x.shape(0), "`sizes` must add up to the rows of `x`, ", x.shape(0), ", got ",
        num_rows);
  check_columns(x, stack.num_columns());
  check_out(out, num_rows, stack.num_rows());
  const Precision precision = precision_of(precision_name);
  stack.check_precision(precision, 1);
  const step::Kernels& kernels = step::kernels();
  const step::ExpertMatrices view = stack.view();
  step::Activation in = {
      .data = nullptr,
      .precision = precision,
      .num_columns = stack.num_columns(),
  };
  const int64_t tile_bytes = in.tile_bytes(kernels.tile_tokens), stride = float_stride(x, 0, "x");
  int64_t num_tiles = 0;
  for (int64_t e = 0; e < stack.num_experts(); ++e) num_tiles += tiles_of(sizes.at(e));
  struct Part {
    step::StepHeader header;
    step::PackParams pack;
    step::LinearRowsParams product;
  };
  std::vector<Part> parts;
  const float* from = x.data();
  float* to = out.mutable_data();
  const int32_t* const size_of = sizes.data();
  const int64_t floats = stack.scratch_floats(precision, 1);
  const py::gil_scoped_release release;
  ExpertsMemory& memory = experts_memory();
  const std::lock_guard<std::mutex> lock(memory.mutex);
  in.data = memory.in.reserve(cpu::product_of_sizes({num_tiles, tile_bytes}));
  for (int64_t e = 0; e < stack.num_experts(); ++e) {
    const int64_t size = size_of[e];
    if (size == 0) continue;
    Part part = {};
    part.header.num_tokens = size;
    part.pack = {.rows = from, .stride = stride, .width = x.shape(1), .out = in};
    part.product.linear.weight = view.weights[e];
    part.product.linear.bias = view.biases == nullptr ? nullptr : view.biases[e];
    part.product.linear.in = in;
    part.product.linear.scratch_floats = floats;
    part.product.out = to;
    part.product.stride = stack.num_rows();
    parts.push_back(part);
    from += size * stride;
    to += size * stack.num_rows();
    in.data += tiles_of(size) * tile_bytes;
  }
  const auto prepare = [&](int num_members) {
    if (floats == 0) return;
    auto* const scratch = reinterpret_cast<float*>(
        memory.scratch.reserve(cpu::product_of_sizes({num_members, floats, kFloatBytes})));
    for (Part& part : parts) part.product.linear.scratch = scratch;
  };
  const auto run = [&](int member, int num_members) {
    for (const Part& part : parts) kernels.pack(part.pack, part.header, member, num_members);
    cpu::team_barrier();
    for (const Part& part : parts) {
      kernels.linear_rows(part.product, part.header, member, num_members);
    }
  };
  cpu::run_small(num_rows * stack.num_rows() * stack.num_columns(), prepare, run);
}

}  // namespace

void bind_experts(py::module_& module) {
  py::class_<RouteSpec, RoutePtr>(module, "RouteSpec", "See tgi_asgi.ops.RouteSpec.")
      .def(py::init<int64_t, int64_t, const std::string&, const std::optional<Array<float>>&,
                    int64_t, int64_t, bool, bool, double, double, double,
                    const std::optional<Array<float>>&>(),
           py::kw_only(), py::arg("num_experts"), py::arg("top_k"), py::arg("kind"),
           py::arg("correction").noconvert() = py::none(), py::arg("num_groups") = 1,
           py::arg("top_groups") = 1, py::arg("sums_top_two") = false,
           py::arg("is_renormalised") = false, py::arg("eps") = 0.0, py::arg("scale") = 1.0,
           py::arg("jitter") = 0.0, py::arg("expert_scales").noconvert() = py::none());
  py::class_<ExpertStack, StackPtr>(module, "ExpertStack",
                                    "The matrices of a layer's experts for one product.")
      .def(py::init<const std::vector<const Matrix*>&,
                    const std::optional<std::vector<Array<float>>>&>(),
           py::arg("matrices"), py::arg("biases") = py::none())
      .def_property_readonly("nbytes", &ExpertStack::nbytes);
  py::class_<ExpertMlps, MlpsPtr>(module, "ExpertMlps", "The experts of a layer.")
      .def(py::init(&ExpertMlps::make), py::kw_only(), py::arg("gate_up"),
           py::arg("down").none(false), py::arg("activation"), py::arg("limit") = 0.0,
           py::arg("slope") = 1.0, py::arg("offset") = 0.0, py::arg("is_gated") = true);
  py::class_<RoutingBuffer, RoutingPtr>(module, "Routing", "The experts selected for each token.")
      .def(
          "arrays",
          [](const RoutingBuffer& routing) {
            const step::ExpertRouting& view = routing.view;
            Array<int32_t> ids({routing.num_rows, view.top_k});
            Array<float> weights({routing.num_rows, view.top_k});
            std::copy_n(view.ids, ids.size(), ids.mutable_data());
            std::copy_n(view.weights, weights.size(), weights.mutable_data());
            return py::make_tuple(ids, weights);
          },
          "Return copies of the ids and weights, [capacity in tokens, top_k] each (for tests and "
          "benchmarks).");
  module.def("experts_rows", &experts_rows, py::arg("mlps"), py::arg("ids").noconvert(),
             py::arg("weights").noconvert(), py::arg("x").noconvert(), py::arg("out").noconvert(),
             py::arg("precision"), py::arg("inner_precision"),
             "Write the weighted sum of each token's experts to out [n, down's stored rows].");
  module.def("rows_by_expert", &rows_by_expert, py::arg("stack"), py::arg("sizes").noconvert(),
             py::arg("x").noconvert(), py::arg("out").noconvert(), py::arg("precision"),
             "Write the products of rows grouped by expert to out [n, stored rows].");
}

}  // namespace tgi
