#include "bindings/image_rows.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <functional>
#include <optional>
#include <utility>

#include "bindings/checks.h"

namespace tgi {

namespace py = pybind11;

void ImageRows::add_to(cpu::step::StepHeader& header) const {
  header.image_tokens = tokens.data();
  header.image_rows = rows.data();
  header.num_image_rows = static_cast<int64_t>(tokens.size());
  if (!rotary.empty()) {
    header.rotary = rotary.data();
    header.cosines = cosines.data();
    header.sines = sines.data();
  }
  if (!visible_until.empty()) header.visible_until = visible_until.data();
}

namespace {

std::vector<float> copy_of(const Array<float>& values) {
  return {values.data(), values.data() + values.size()};
}

// Checks what does not depend on the step; a program checks the rest.
ImageRows make_image_rows(std::vector<int32_t> tokens, const Array<float>& rows,
                          std::vector<int32_t> rotary, const std::optional<Array<float>>& cosines,
                          const std::optional<Array<float>>& sines,
                          std::vector<int32_t> visible_until) {
  const auto count = static_cast<int64_t>(tokens.size());
  check(rows.ndim() == 3 && rows.shape(1) == count,
        "`rows` must be [levels, images' tokens, columns]");
  check(std::adjacent_find(tokens.begin(), tokens.end(), std::greater_equal<>()) == tokens.end(),
        "`tokens` must ascend");
  check(cosines.has_value() == sines.has_value(), "cosines and sines come together");
  ImageRows made;
  made.tokens = std::move(tokens);
  made.num_levels = rows.shape(0);
  made.num_columns = rows.shape(2);
  made.rows = copy_of(rows);
  made.rotary = std::move(rotary);
  made.visible_until = std::move(visible_until);
  if (cosines) {
    check_shape(*cosines, "cosines", {-1, -1});
    check_shape(*sines, "sines", {cosines->shape(0), cosines->shape(1)});
    made.num_angles = cosines->shape(1);
    made.cosines = copy_of(*cosines);
    made.sines = copy_of(*sines);
  }
  const int64_t own_rows =
      made.num_angles == 0 ? 0 : static_cast<int64_t>(made.cosines.size()) / made.num_angles;
  for (const int32_t row : made.rotary) {
    check(row >= -own_rows, "`rotary` must be at least ", -own_rows, ", got ", row);
  }
  return made;
}

}  // namespace

void bind_image_rows(py::module_& module) {
  py::class_<ImageRows, std::shared_ptr<ImageRows>>(
      module, "ImageRows", "What images bring to a step, see csrc/bindings/image_rows.h.")
      .def(py::init(&make_image_rows), py::kw_only(), py::arg("tokens"),
           py::arg("rows").noconvert(), py::arg("rotary") = std::vector<int32_t>(),
           py::arg("cosines").noconvert() = py::none(), py::arg("sines").noconvert() = py::none(),
           py::arg("visible_until") = std::vector<int32_t>());
}

}  // namespace tgi
