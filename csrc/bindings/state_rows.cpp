#include "bindings/state_rows.h"

#include <utility>

#include "bindings/state_params.h"
#include "cpu/step/kernel_sets.h"
#include "cpu/team.h"

namespace tgi {

namespace step = cpu::step;

namespace {

void check_operand(const FloatArray& rows, const char* name, int64_t num_tokens, int64_t columns) {
  check_rows_of(rows, 2, name);
  check(rows.shape(0) == num_tokens && rows.shape(1) == columns, "`", name, "` must be [",
        num_tokens, ", ", columns, "], got [", rows.shape(0), ", ", rows.shape(1), "]");
}

}  // namespace

void StateRows::begin(const FlatRows& batch) {
  has_begun_ = false;
  batch_ = batch;
  header_ = batch_.header();
  pool_->begin(batch_, header_);
  has_begun_ = true;
}

void StateRows::commit() {
  check(has_begun_, "no step has begun");
  pool_->commit();
  has_begun_ = false;
}

void StateRows::delta_net(int64_t layer, const ShortConv& conv, const DeltaRule& rule,
                          const FloatArray& qkv, const FloatArray& steps, FloatArray& out) {
  check(has_begun_, "no step has begun");
  const int64_t num_tokens = header_.num_tokens, columns = columns_of(rule);
  step::ShortConvParams convolving = params_of(conv, *pool_, layer);
  step::DeltaRuleParams applying = params_of(rule, *pool_, layer);
  check(convolving.num_channels == columns, "the layer must have ", columns, " channels, got ",
        convolving.num_channels);
  check_operand(qkv, "qkv", num_tokens, columns);
  check_operand(steps, "steps", num_tokens, 2 * rule.num_heads);
  const int64_t out_columns = step::padded_columns(width_of(rule));
  check_out(out, num_tokens, out_columns);
  if (num_tokens == 0) return;
  const int64_t padded = convolving.padded_channels();
  convolving.in = qkv.data();
  convolving.stride = float_stride(qkv, 0, "qkv");
  convolving.out = reinterpret_cast<float*>(
      convolved_.reserve(cpu::product_of_sizes({num_tokens, padded, kFloatBytes})));
  applying.in = convolving.out;
  applying.in_stride = padded;
  applying.steps = steps.data();
  applying.steps_stride = float_stride(steps, 0, "steps");
  applying.out = out.mutable_data();
  applying.out_stride = out_columns;
  const step::Kernels& kernels = step::kernels();
  const py::gil_scoped_release release;
  cpu::run_small(
      num_tokens * width_of(rule) * rule.key_dim, [](int) {},
      [&](int member, int num_members) {
        kernels.short_conv(convolving, header_, member, num_members);
        cpu::team_barrier();
        kernels.delta_rule(applying, header_, member, num_members);
      });
}

void bind_state_rows(py::module_& module) {
  py::class_<StateRows>(module, "StateRows", "See tgi_asgi.ops.state_rows.")
      .def(py::init<std::shared_ptr<StatePool>>(), py::arg("pool").none(false))
      .def("begin", &StateRows::begin, py::arg("batch"))
      .def("commit", &StateRows::commit)
      .def("roll_back", &StateRows::roll_back)
      .def("discard", &StateRows::discard, py::arg("slot"), py::arg("num_tokens"))
      .def("delta_net", &StateRows::delta_net, py::arg("layer"), py::arg("conv"), py::arg("rule"),
           py::arg("qkv").noconvert(), py::arg("steps").noconvert(), py::arg("out").noconvert());
}

}  // namespace tgi
