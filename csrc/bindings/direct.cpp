#include "bindings/direct.h"

#include <pybind11/stl.h>

#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "bindings/float_tensors.h"
#include "bindings/matrix.h"
#include "bindings/rows.h"
#include "cpu/step/kernel_sets.h"
#include "cpu/team.h"

namespace tgi {

namespace {

// Work memory shared by all calls, which the mutex serialises.
struct DirectMemory {
  std::mutex mutex;
  Workspace input, scratch, inner;
};

DirectMemory& direct_memory() {
  static auto& memory = *new DirectMemory;  // never destroyed: at exit, a thread may still compute
  return memory;
}

// Returns the row stride of a tensor [rows, columns].
int64_t row_stride(const FloatArray& rows, const char* name) {
  check_rows_of(rows, 2, name);
  return float_stride(rows, 0, name);
}

// The adapters that change a product; the rows of x are the tokens of a step.
struct Adapted {
  const FlatRows* rows = nullptr;  // null: no adapters
  int64_t product = 0;

  static Adapted of(const FlatRows* rows, int64_t product) {
    return rows == nullptr || rows->adapter_spans.empty() ? Adapted() : Adapted{rows, product};
  }
  // Returns the stride of a token's inner values; throws unless the adapters fit this weight and
  // these rows.
  int64_t check_fits(const step::PackedMatrix& weight, int64_t num_rows) const {
    check(static_cast<int64_t>(rows->ids.size()) == num_rows,
          "the product of a step with adapters has ", num_rows, " rows, the step ",
          rows->ids.size(), " tokens");
    int64_t stride = 0;
    for (const AdapterPtr& adapter : rows->adapters) {
      if (adapter == nullptr) continue;
      const AdapterLayout::Product& found = adapter->layout()->at(product);
      check(found.num_columns == weight.num_columns &&
                found.num_panels * step::kPanelRows == weight.num_rows,
            "product ", product, " of the adapters is of another weight");
      stride = found.max_inner > stride ? found.max_inner : stride;
    }
    return stride;
  }
};

// Computes a product on tensors: packs x in `precision`, then `function(linear, header)` does the
// rest.
template <class Function>
void multiply(const Matrix& weight, const std::optional<Array<float>>& bias, const FloatArray& x,
              const std::string& precision_name, int64_t unit_strips, const Adapted& adapted,
              const Function& function) {
  const step::PackedMatrix& packed = weight.packed;
  const step::Precision precision = precision_of(precision_name);
  check_product(packed, precision, unit_strips);
  step::PackParams pack = {};
  pack.stride = row_stride(x, "x");
  pack.rows = x.data();
  pack.width = x.shape(1);
  check(pack.width > 0 && step::padded_columns(pack.width) == packed.num_columns,
        "`x` must have the weight's ", weight.num_columns, " columns, got ", pack.width);
  step::LinearParams linear = {};
  linear.weight = packed;
  if (bias) {
    check_shape(*bias, "bias", {packed.num_rows});
    linear.bias = bias->data();
  }
  pack.out = {
      .data = nullptr,
      .precision = precision,
      .num_columns = packed.num_columns,
  };
  step::StepHeader header = {};
  header.num_tokens = x.shape(0);
  if (header.num_tokens == 0) return;
  const bool has_adapters = adapted.rows != nullptr;
  if (has_adapters) {
    linear.adapter.product = adapted.product;
    linear.adapter.stride = adapted.check_fits(packed, header.num_tokens);
    header.adapters = adapted.rows->adapter_spans.data();
    header.num_adapters = static_cast<int64_t>(adapted.rows->adapter_spans.size());
  }
  const step::Kernels& kernels = step::kernels();
  const py::gil_scoped_release release;
  DirectMemory& memory = direct_memory();
  const std::lock_guard<std::mutex> lock(memory.mutex);
  const int64_t tile_bytes = pack.out.tile_bytes(kernels.tile_tokens);
  pack.out.data =
      memory.input.reserve(cpu::product_of_sizes({tiles_of(header.num_tokens), tile_bytes}));
  linear.in = pack.out;
  if (has_adapters) {
    linear.adapter.inner = reinterpret_cast<float*>(memory.inner.reserve(
        cpu::product_of_sizes({header.num_tokens, linear.adapter.stride, kFloatBytes})));
  }
  linear.scratch_floats = kernels.scratch_floats(packed, precision, unit_strips);
  const auto prepare = [&](int num_members) {
    if (linear.scratch_floats == 0) return;
    linear.scratch = reinterpret_cast<float*>(memory.scratch.reserve(
        cpu::product_of_sizes({num_members, linear.scratch_floats, kFloatBytes})));
  };
  const auto run = [&](int member, int num_members) {
    kernels.pack(pack, header, member, num_members);
    cpu::team_barrier();
    if (has_adapters) {
      kernels.shrink({linear}, header, member, num_members);
      cpu::team_barrier();
    }
    function(kernels, linear, header, member, num_members);
  };
  cpu::run_small(header.num_tokens * packed.num_rows * packed.num_columns, prepare, run);
}

void linear_rows(const Matrix& weight, const std::optional<Array<float>>& bias, const FloatArray& x,
                 FloatArray& out, const std::string& precision, const FlatRows* adapters,
                 int64_t product) {
  check_rows_of(x, 2, "x");
  check_out(out, x.shape(0), weight.packed.num_rows);
  float* const to = out.mutable_data();
  multiply(weight, bias, x, precision, 1, Adapted::of(adapters, product),
           [&](const step::Kernels& kernels, const step::LinearParams& linear,
               const step::StepHeader& header, int member, int num_members) {
             kernels.linear_rows({linear, to, weight.packed.num_rows}, header, member, num_members);
           });
}

void gate_up_rows(const Matrix& weight, const std::optional<Array<float>>& bias,
                  const FloatArray& x, FloatArray& out, const std::string& precision,
                  const std::string& activation_name, const FlatRows* adapters, int64_t product) {
  check_rows_of(x, 2, "x");
  const int64_t columns = weight.packed.num_rows / 2;
  check_out(out, x.shape(0), columns);
  const MlpActivation activation = check_activation(activation_name, true);
  float* const to = out.mutable_data();
  multiply(weight, bias, x, precision, 2, Adapted::of(adapters, product),
           [&](const step::Kernels& kernels, const step::LinearParams& linear,
               const step::StepHeader& header, int member, int num_members) {
             kernels.gate_up({linear, {activation}, {}, to, columns}, header, member, num_members);
           });
}

// Up to this size a lookup or norm is not worth waking the team for.
constexpr int64_t kAloneFloats = 16384;

void embed_rows(const Matrix& table, const Array<int32_t>& ids, double factor, FloatArray& out) {
  check(table.num_rows > 0 && table.has_padding_last,
        "`table` must have its padding after all of its rows");
  check_shape(ids, "ids", {-1});
  check_out(out, ids.size(), table.packed.num_columns);
  check_range(ids.data(), ids.size(), table.num_rows, "ids");
  step::StepHeader header = {};
  header.num_tokens = ids.size();
  header.ids = ids.data();
  const step::EmbedParams params = {
      .table = table.packed,
      .factor = static_cast<float>(factor),
      .x = out.mutable_data(),
  };
  const py::gil_scoped_release release;
  const step::Kernels& kernels = step::kernels();
  const auto run = [&](int member, int num_members) {
    kernels.embed(params, header, member, num_members);
  };
  if (ids.size() * params.table.num_columns <= kAloneFloats) {
    cpu::run_on_caller(run);
  } else {
    cpu::run_on_team(run);
  }
}

// Runs a kernel that reads rows x and writes rows `out` of the same width.
template <class Params>
void run_rows(step::StepFunction<Params> kernel, const Params& params, const FloatArray& x) {
  step::StepHeader header = {};
  header.num_tokens = x.shape(0);
  const int64_t num_floats = x.shape(0) * x.shape(1);
  const py::gil_scoped_release release;
  const auto run = [&](int member, int num_members) {
    kernel(params, header, member, num_members);
  };
  if (num_floats <= kAloneFloats) {
    cpu::run_on_caller(run);
  } else {
    cpu::run_on_team(run);
  }
}

void norm_rows(const FloatArray& x, const Array<float>& weight,
               const std::optional<Array<float>>& bias, double eps, FloatArray& out) {
  const int64_t stride = row_stride(x, "x"), width = x.shape(1);
  check(width > 0, "`x` must have columns");
  check_shape(weight, "weight", {width});
  if (bias) check_shape(*bias, "bias", {width});
  check_out(out, x.shape(0), width);
  run_rows(step::kernels().norm_rows,
           step::NormRowsParams{
               .x = x.data(),
               .stride = stride,
               .weight = weight.data(),
               .bias = bias ? bias->data() : nullptr,
               .width = width,
               .num_groups = 1,
               .eps = static_cast<float>(eps),
               .out = out.mutable_data(),
               .out_stride = width,
           },
           x);
}

void activate_rows(const FloatArray& x, const std::string& activation_name, FloatArray& out) {
  const int64_t stride = row_stride(x, "x"), width = x.shape(1);
  check_out(out, x.shape(0), width);
  const MlpActivation activation = check_activation(activation_name, true);
  run_rows(step::kernels().activate,
           step::ActivateParams{
               .x = x.data(),
               .stride = stride,
               .width = width,
               .function = {.kind = activation},
               .out = out.mutable_data(),
           },
           x);
}

}  // namespace

void bind_direct(py::module_& module) {
  module.def("linear_rows", &linear_rows, py::arg("weight"), py::arg("bias").noconvert(),
             py::arg("x").noconvert(), py::arg("out").noconvert(), py::arg("precision"),
             py::arg("adapters") = py::none(), py::arg("product") = 0,
             "Write x @ weight.T (+ bias) to out [n, stored rows].");
  module.def("gate_up_rows", &gate_up_rows, py::arg("weight"), py::arg("bias").noconvert(),
             py::arg("x").noconvert(), py::arg("out").noconvert(), py::arg("precision"),
             py::arg("activation"), py::arg("adapters") = py::none(), py::arg("product") = 0,
             "Write f(gate) * up to out [n, half the stored rows].");
  module.def("embed_rows", &embed_rows, py::arg("table"), py::arg("ids").noconvert(),
             py::arg("factor"), py::arg("out").noconvert(),
             "Write factor * table[ids] to out [n, stored columns].");
  module.def("norm_rows", &norm_rows, py::arg("x").noconvert(), py::arg("weight").noconvert(),
             py::arg("bias").noconvert(), py::arg("eps"), py::arg("out").noconvert(),
             "Write the RMSNorm of x to out, or with a bias its LayerNorm.");
  module.def("activate_rows", &activate_rows, py::arg("x").noconvert(), py::arg("activation"),
             py::arg("out").noconvert(), "Write f(x) to out.");
}

}  // namespace tgi
