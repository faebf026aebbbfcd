#include "bindings/state_pool.h"

#include <pybind11/stl.h>

#include <tuple>
#include <utility>

#include "bindings/float_tensors.h"

namespace tgi {

namespace step = cpu::step;

namespace {

constexpr int64_t kMostLayers = 1 << 16;
constexpr int64_t kMostFloats = int64_t{1} << 40;  // of a layer
constexpr int64_t kLineFloats = 16;

}  // namespace

int64_t StateShape::window_bytes() const {
  return cpu::product_of_sizes({num_taps - 1, step::padded_columns(num_channels), kFloatBytes});
}

int64_t StateShape::num_bytes() const {
  const int64_t padded = (num_floats + kLineFloats - 1) / kLineFloats * kLineFloats;
  return window_bytes() + padded * kFloatBytes;
}

StatePool::StatePool(std::vector<StateShape> layers, int64_t num_slots)
    : layers_(std::move(layers)) {
  check(!layers_.empty() && num_layers() <= kMostLayers, "`layers` must be 1 to ", kMostLayers,
        ", got ", num_layers());
  check(num_slots > 0 && num_slots <= INT32_MAX / 2, "`num_slots` must be in [1, ", INT32_MAX / 2,
        "], got ", num_slots);
  for (const StateShape& each : layers_) {
    check_size(each.num_channels, "num_channels");
    check(each.num_taps >= 2 && each.num_taps <= step::kMaxTaps, "`num_taps` must be in [2, ",
          step::kMaxTaps, "], got ", each.num_taps);
    check(each.num_floats >= 0 && each.num_floats <= kMostFloats, "`num_floats` must be in [0, ",
          kMostFloats, "], got ", each.num_floats);
    offsets_.push_back(stride_);
    stride_ = cpu::product_of_sizes({1, stride_ + each.num_bytes()});
  }
  memory_ = cpu::allocate(cpu::product_of_sizes({2 * num_slots, stride_}));
  places_.resize(static_cast<size_t>(2 * num_slots));
}

const StateShape& StatePool::shape(int64_t layer) const {
  check(layer >= 0 && layer < num_layers(), "`layer` must be in [0, ", num_layers(), "), got ",
        layer);
  return layers_[static_cast<size_t>(layer)];
}

step::StateView StatePool::window(int64_t layer) const {
  shape(layer);
  return {memory_.get() + offsets_[static_cast<size_t>(layer)], stride_};
}

step::StateView StatePool::floats(int64_t layer) const {
  const int64_t offset = shape(layer).window_bytes();
  return {window(layer).data + offset, stride_};
}

void StatePool::begin(const std::vector<int32_t>& slots, step::StepHeader& header) {
  const auto count = static_cast<size_t>(header.num_sequences);
  check(slots.size() == count, "a model with states needs the slot of each sequence");
  check_range(slots.data(), header.num_sequences, static_cast<int64_t>(places_.size() / 2),
              "row_slots");
  from_.resize(count);
  to_.resize(count);
  ends_.resize(count);
  for (size_t s = 0; s < count; ++s) {
    const int32_t first = 2 * slots[s];
    const int64_t start =
        header.context_len[s] - (header.query_start[s + 1] - header.query_start[s]);
    const auto holds = [&](int32_t place) {
      return places_[static_cast<size_t>(place)].num_tokens == start;
    };
    check(start == 0 || holds(first) || holds(first + 1), "slot ", slots[s], " has no state of ",
          start, " tokens");
    from_[s] = start == 0 ? -1 : holds(first) ? first : first + 1;
    to_[s] = from_[s] == first ? first + 1 : first;
    ends_[s] = header.context_len[s];
  }
  for (size_t s = 0; s < count; ++s) {
    places_[static_cast<size_t>(to_[s])] = {};
    if (from_[s] < 0) places_[static_cast<size_t>(to_[s]) + 1] = {};  // another sequence's
  }
  header.state_from = from_.data();
  header.state_to = to_.data();
}

void StatePool::commit() {
  for (size_t s = 0; s < to_.size(); ++s) {
    places_[static_cast<size_t>(to_[s])].num_tokens = ends_[s];
  }
}

void bind_state_pool(py::module_& module) {
  py::class_<StatePool, std::shared_ptr<StatePool>>(module, "StatePool", "See ops.StatePool.")
      .def(py::init([](const std::vector<std::tuple<int64_t, int64_t, int64_t>>& layers,
                       int64_t num_slots) {
             std::vector<StateShape> shapes;
             for (const auto& [channels, taps, floats] : layers) {
               shapes.push_back({channels, taps, floats});
             }
             return std::make_shared<StatePool>(std::move(shapes), num_slots);
           }),
           py::kw_only(), py::arg("layers"), py::arg("num_slots"))
      .def_property_readonly("slot_bytes", &StatePool::slot_bytes);
}

}  // namespace tgi
