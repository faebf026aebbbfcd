#include "bindings/adapter.h"

#include <pybind11/stl.h>

#include <cstring>
#include <tuple>

#include "cpu/step/packed.h"

namespace tgi {

namespace {

constexpr int64_t kAlignment = 64;

int64_t aligned(int64_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

// The memory that a part occupies: scales, `down`, `up`.
int64_t bytes_of(const Adapter::Part& part) {
  return aligned(part.scales.nbytes()) + aligned(part.down.nbytes()) + aligned(part.up.nbytes());
}

// Returns where a copy of the array will be, and moves `memory` behind it.
template <class T>
const T* copied(const Array<T>& from, uint8_t*& memory, std::vector<Adapter::Copy>& copies) {
  uint8_t* const to = memory;
  copies.push_back({to, from.data(), static_cast<size_t>(from.nbytes())});
  memory += aligned(from.nbytes());
  return reinterpret_cast<const T*>(to);
}

using PartTuple =
    std::tuple<int64_t, Array<uint16_t>, Array<float>, Array<int64_t>, Array<uint16_t>>;

std::shared_ptr<Adapter> make_adapter(LayoutPtr layout, const std::vector<PartTuple>& tuples,
                                      int64_t number) {
  std::vector<Adapter::Part> parts;
  for (const auto& [product, down, scales, panels, up] : tuples) {
    parts.push_back({product, down, scales, panels, up});
  }
  return std::make_shared<Adapter>(std::move(layout), parts, number);
}

std::shared_ptr<AdapterLayout> make_layout(
    const std::vector<std::tuple<int64_t, int64_t, int64_t>>& products) {
  auto layout = std::make_shared<AdapterLayout>();
  for (const auto& [columns, rows, max_inner] : products) {
    check_size(columns, "columns");
    check_size(rows, "rows");
    check_size(max_inner, "max_inner");
    check(columns % step::kBlockColumns == 0 && rows % step::kStripRows == 0,
          "a product has whole blocks and strips, got [", rows, ", ", columns, "]");
    layout->products.push_back({columns, rows / step::kPanelRows, max_inner});
  }
  return layout;
}

}  // namespace

const AdapterLayout::Product& AdapterLayout::at(int64_t product) const {
  check(product >= 0 && product < static_cast<int64_t>(products.size()),
        "`adapter` must be in [0, ", products.size(), "), got ", product);
  return products[static_cast<size_t>(product)];
}

Adapter::Adapter(LayoutPtr layout, const std::vector<Part>& parts, int64_t number)
    : layout_(std::move(layout)), number_(number) {
  check(number >= 0, "`number` must not be negative, got ", number);
  terms_.resize(layout_->products.size());
  for (const Part& part : parts) num_bytes_ += bytes_of(part);
  if (num_bytes_ == 0) return;
  memory_ = cpu::allocate(num_bytes_);
  uint8_t* memory = memory_.get();
  std::vector<Copy> copies;
  for (const Part& part : parts) add(part, memory, copies);
  // 20 to 130 ms for 67 MB, because the system clears the pages first.
  const py::gil_scoped_release release;
  for (const Copy& copy : copies) std::memcpy(copy.to, copy.from, copy.bytes);
}

void Adapter::add(const Part& part, uint8_t*& memory, std::vector<Copy>& copies) {
  const AdapterLayout::Product& product = layout_->at(part.product);
  step::AdapterTerm& term = terms_[static_cast<size_t>(part.product)];
  const int64_t num_inner = part.scales.size(), num_up = part.up.size() / step::kPanelRows;
  check(term.num_inner == 0, "product ", part.product, " is given twice");
  check(num_inner > 0 && num_inner <= product.max_inner, "product ", part.product, " has at most ",
        product.max_inner, " inner values, got ", num_inner);
  check_shape(part.scales, "scales", {num_inner});
  check_shape(part.down, "down", {num_inner, product.num_columns});
  check_shape(part.panels, "panels", {product.num_panels, 2});
  check_shape(part.up, "up", {-1, step::kPanelRows});
  term.num_inner = num_inner;
  term.scales = copied(part.scales, memory, copies);
  term.down = copied(part.down, memory, copies);
  const uint16_t* const up = copied(part.up, memory, copies);
  std::vector<step::AdapterPanel>& panels = panels_.emplace_back();
  int64_t before = 0;
  for (int64_t i = 0; i < product.num_panels; ++i) {
    const int64_t first = part.panels.at(i, 0), count = part.panels.at(i, 1);
    check(count >= 0 && count <= num_inner && first >= 0 && first <= num_inner - count &&
              count <= num_up - before,
          "`panels`[", i, "] must lie in ", num_inner, " inner values and ", num_up, " rows");
    panels.push_back(
        {up + before * step::kPanelRows, static_cast<int32_t>(first), static_cast<int32_t>(count)});
    before += count;
  }
  check(before == num_up, "`panels` have ", before, " of the ", num_up, " rows of `up`");
  term.panels = panels.data();
}

void bind_adapters(py::module_& module) {
  py::class_<AdapterLayout, std::shared_ptr<AdapterLayout>>(
      module, "AdapterLayout", "The products of a model that adapters may change.")
      .def(py::init(&make_layout), py::arg("products"));
  py::class_<Adapter, std::shared_ptr<Adapter>>(module, "Adapter", "See csrc/bindings/adapter.h.")
      .def(py::init(&make_adapter), py::arg("layout").none(false), py::arg("parts"),
           py::arg("number") = 0)
      .def_property_readonly("number", &Adapter::number)
      .def_property_readonly("num_bytes", &Adapter::num_bytes);
}

}  // namespace tgi
