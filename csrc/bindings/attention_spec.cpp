#include "bindings/attention_spec.h"

#include <pybind11/stl.h>

#include <cmath>

namespace tgi {

namespace {

constexpr double kLog2E = cpu::step::kLog2E;

int64_t positive_or_all(const std::optional<int64_t>& value, const char* name) {
  if (value) check_positive(*value, name);
  return value.value_or(INT64_MAX);
}

// Returns one value per head, times log2(e); a sink of minus infinity has no weight.
std::vector<float> of_heads(const std::optional<Array<float>>& given, const char* name,
                            bool may_be_minus_infinity) {
  std::vector<float> found;
  if (!given) return found;
  check_shape(*given, name, {-1});
  check(given->size() > 0, "`", name, "` must have an element a head");
  for (int64_t i = 0; i < given->size(); ++i) {
    const float value = given->at(i);
    check(std::isfinite(value) || (may_be_minus_infinity && value < 0), "`", name, "`[", i,
          "] must be finite, got ", value);
    found.push_back(static_cast<float>(value * kLog2E));
  }
  return found;
}

const float* data_or_null(const std::vector<float>& values, int64_t num_heads, const char* name) {
  if (values.empty()) return nullptr;
  check(static_cast<int64_t>(values.size()) == num_heads, "`", name, "` must have ", num_heads,
        " elements, one a head, got ", values.size());
  return values.data();
}

}  // namespace

AttentionSpec::AttentionSpec(double scale, std::optional<int64_t> window,
                             std::optional<int64_t> chunk, std::optional<double> soft_cap,
                             const std::optional<Array<float>>& sinks,
                             const std::optional<Array<float>>& slopes, bool sees_ahead)
    : q_scale_(static_cast<float>(scale * kLog2E)),
      cap_(static_cast<float>(soft_cap.value_or(0) * kLog2E)),
      rule_{positive_or_all(window, "window"), positive_or_all(chunk, "chunk"), sees_ahead},
      sinks_(of_heads(sinks, "sinks", true)),
      slopes_(of_heads(slopes, "slopes", false)) {
  check(std::isfinite(q_scale_), "`scale` must be finite, got ", scale);
  check(!soft_cap || (std::isfinite(cap_) && cap_ > 0), "`soft_cap` must be positive, got ",
        soft_cap.value_or(0));
}

cpu::step::ScoreParams AttentionSpec::scores(int64_t num_heads) const {
  return {
      .cap = cap_,
      .slopes = data_or_null(slopes_, num_heads, "slopes"),
      .sinks = data_or_null(sinks_, num_heads, "sinks"),
  };
}

void bind_attention_spec(py::module_& module) {
  py::class_<AttentionSpec, SpecPtr>(module, "AttentionSpec", "See tgi_asgi.ops.AttentionSpec.")
      .def(py::init<double, std::optional<int64_t>, std::optional<int64_t>, std::optional<double>,
                    const std::optional<Array<float>>&, const std::optional<Array<float>>&, bool>(),
           py::kw_only(), py::arg("scale"), py::arg("window") = py::none(),
           py::arg("chunk") = py::none(), py::arg("soft_cap") = py::none(),
           py::arg("sinks").noconvert() = py::none(), py::arg("slopes").noconvert() = py::none(),
           py::arg("sees_ahead") = true);
}

}  // namespace tgi
