#include "bindings/state_pool.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <tuple>
#include <utility>

#include "bindings/float_tensors.h"

namespace tgi {

namespace step = cpu::step;

namespace {

constexpr int64_t kMaxFloats = int64_t{1} << 40;  // per layer
constexpr int64_t kLineFloats = 16;
constexpr int64_t kMaxPlaces = INT32_MAX / 4;
constexpr int64_t kMaxDrafts = 1 << 10;  // per row

bool has_repeats(std::vector<int32_t> values) {
  std::sort(values.begin(), values.end());
  return std::adjacent_find(values.begin(), values.end()) != values.end();
}

}  // namespace

int64_t StateShape::window_bytes() const {
  return cpu::product_of_sizes({num_taps - 1, step::padded_columns(num_channels), kFloatBytes});
}

int64_t StateShape::num_bytes() const {
  const int64_t padded = (num_floats + kLineFloats - 1) / kLineFloats * kLineFloats;
  return window_bytes() + padded * kFloatBytes;
}

StatePool::StatePool(std::vector<StateShape> layers, int64_t num_slots, int64_t num_kept,
                     int64_t num_drafts)
    : layers_(std::move(layers)), num_slots_(num_slots), depth_(1 + num_drafts) {
  check(!layers_.empty() && num_layers() <= kMaxLayers, "`layers` must be 1 to ", kMaxLayers,
        ", got ", num_layers());
  check(num_slots > 0 && num_slots <= kMaxPlaces, "`num_slots` must be in [1, ", kMaxPlaces,
        "], got ", num_slots);
  check(num_drafts >= 0 && num_drafts <= kMaxDrafts && num_slots * depth_ <= kMaxPlaces,
        "`num_drafts` must be in [0, ", kMaxDrafts, "], and less with many slots, got ",
        num_drafts);
  check(num_kept >= 0 && num_kept <= kMaxPlaces, "`num_kept` must be in [0, ", kMaxPlaces,
        "], got ", num_kept);
  for (const StateShape& each : layers_) {
    check_size(each.num_channels, "num_channels");
    check(each.num_taps >= 2 && each.num_taps <= step::kMaxTaps, "`num_taps` must be in [2, ",
          step::kMaxTaps, "], got ", each.num_taps);
    check(each.num_floats >= 0 && each.num_floats <= kMaxFloats, "`num_floats` must be in [0, ",
          kMaxFloats, "], got ", each.num_floats);
    offsets_.push_back(stride_);
    stride_ = cpu::product_of_sizes({1, stride_ + each.num_bytes()});
  }
  const int64_t num_places = first_kept() + num_kept;
  memory_ = cpu::allocate(cpu::product_of_sizes({num_places, stride_}));
  places_.resize(static_cast<size_t>(num_places));
  newest_.resize(static_cast<size_t>(num_slots));
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

StatePool::Source StatePool::source_of(const FlatRows& rows, size_t row, int64_t start) const {
  if (!rows.resumes.empty() && rows.resumes[row] >= 0) {
    const int32_t kept = rows.resumes[row];
    check(start > 0 && holds(first_kept() + kept, start), "place ", kept, " keeps no state of ",
          start, " tokens");
    return {first_kept() + kept, -1};
  }
  if (start == 0) return {-1, -1};
  const int32_t slot = rows.row_slots[row], newest = newest_[static_cast<size_t>(slot)];
  for (const int32_t half : {newest, 1 - newest}) {
    const int32_t first = first_of(slot, half);
    for (int32_t place = first; place < first + depth_; ++place) {
      if (holds(place, start)) return {place, half};
    }
  }
  check(false, "slot ", slot, " has no state of ", start, " tokens");
  return {-1, -1};
}

void StatePool::check_rows(const FlatRows& rows, const step::StepHeader& header) const {
  const auto count = static_cast<size_t>(header.num_sequences);
  check(rows.row_slots.size() == count, "a model with states needs the slot of each sequence");
  check(rows.resumes.empty() || rows.resumes.size() == count, "`resumes` has an entry a sequence");
  check(rows.num_drafts.empty() || rows.num_drafts.size() == count,
        "`num_drafts` has an entry a sequence");
  check_range(rows.row_slots.data(), header.num_sequences, num_slots_, "row_slots");
  check(!has_repeats(rows.row_slots), "two rows of a step have one slot");
  for (const int32_t place : rows.resumes) {
    check(place >= -1 && place < static_cast<int64_t>(places_.size()) - first_kept(),
          "there is no place ", place, " of kept states");
  }
  for (size_t s = 0; s < rows.num_drafts.size(); ++s) {
    const int64_t length = header.query_start[s + 1] - header.query_start[s];
    check(rows.num_drafts[s] >= 0 && rows.num_drafts[s] < std::min(depth_, length),
          "a row has places for ", depth_ - 1, " drafts, got ", rows.num_drafts[s]);
  }
  if (!rows.keeps.empty()) check_keeps(rows, header);
}

void StatePool::check_keeps(const FlatRows& rows, const step::StepHeader& header) const {
  const auto num_kept = static_cast<int64_t>(places_.size()) - first_kept();
  const StateKeep* last = nullptr;
  std::vector<int32_t> touched;
  for (const StateKeep& each : rows.keeps) {
    check(each.row >= 0 && each.row < header.num_sequences, "a state is kept of no row");
    const int64_t end = header.context_len[each.row];
    const int64_t start = end - (header.query_start[each.row + 1] - header.query_start[each.row]);
    check(each.position > 0 && each.position >= start && each.position < end,
          "a state cannot be kept at ", each.position, " of a row of ", start, " to ", end);
    const bool has_drafts =
        !rows.num_drafts.empty() && rows.num_drafts[static_cast<size_t>(each.row)] > 0;
    check(!has_drafts || each.position == start, "no state is kept among drafts");
    check(last == nullptr || last->row < each.row ||
              (last->row == each.row && last->position <= each.position),
          "states are kept in the order of rows and positions");
    check_range(&each.place, 1, num_kept, "place of a kept state");
    touched.push_back(each.place);
    last = &each;
  }
  for (const int32_t place : rows.resumes) {  // two rows may resume from the same place
    check(std::find(touched.begin(), touched.end(), place) == touched.end(),
          "a state is kept where another row begins");
  }
  check(!has_repeats(std::move(touched)), "two states are kept in one place");
}

void StatePool::clear(int32_t slot, int32_t half, int64_t num_tokens) {
  const int32_t first = first_of(slot, half);
  for (int32_t place = first; place < first + depth_; ++place) {
    Place& each = places_[static_cast<size_t>(place)];
    if (each.num_tokens > num_tokens) each = {};
  }
}

void StatePool::begin(const FlatRows& rows, step::StepHeader& header) {
  check_rows(rows, header);
  const auto count = static_cast<size_t>(header.num_sequences);
  std::vector<Source> sources;
  for (size_t s = 0; s < count; ++s) {
    const int32_t length = header.query_start[s + 1] - header.query_start[s];
    sources.push_back(source_of(rows, s, header.context_len[s] - length));
  }
  spans_.clear();
  ends_.clear();
  targets_.clear();
  const auto add = [&](int32_t begin, int32_t end, int32_t from, int32_t to, int64_t num_tokens) {
    spans_.push_back({begin, end, from, to});
    ends_.push_back(num_tokens);
    places_[static_cast<size_t>(to)] = {};
  };
  auto keep = rows.keeps.begin();
  for (size_t s = 0; s < count; ++s) {
    const int32_t slot = rows.row_slots[s], half = sources[s].half == 0 ? 1 : 0;
    const int32_t first = header.query_start[s], end = header.query_start[s + 1];
    const int64_t start = header.context_len[s] - (end - first);
    clear(slot, half, -1);
    // Invalidates states after wrong drafts or, if the row does not start in its slot, those of an
    // earlier sequence.
    clear(slot, 1 - half, sources[s].half < 0 ? -1 : start);
    int32_t from = sources[s].place, begin = first;
    for (; keep != rows.keeps.end() && keep->row == static_cast<int32_t>(s); ++keep) {
      const auto stop = static_cast<int32_t>(first + (keep->position - start));
      add(begin, stop, from, first_kept() + keep->place, keep->position);
      begin = stop;
      from = first_kept() + keep->place;
    }
    int32_t to = first_of(slot, half);
    for (int32_t drafts = rows.num_drafts.empty() ? 0 : rows.num_drafts[s]; drafts > 0; --drafts) {
      add(begin, end - drafts, from, to, header.context_len[s] - drafts);
      begin = end - drafts;
      from = to++;
    }
    add(begin, end, from, to, header.context_len[s]);
    targets_.push_back({slot, half});
  }
  header.state_spans = spans_.data();
  header.num_state_spans = static_cast<int64_t>(spans_.size());
}

void StatePool::commit() {
  for (size_t i = 0; i < spans_.size(); ++i) {
    places_[static_cast<size_t>(spans_[i].to)].num_tokens = ends_[i];
  }
  for (const Target& each : targets_) newest_[static_cast<size_t>(each.slot)] = each.half;
}

void StatePool::roll_back() {
  for (const step::StateSpan& span : spans_) places_[static_cast<size_t>(span.to)] = {};
}

void StatePool::discard(int32_t slot, int64_t num_tokens) {
  check_range(&slot, 1, num_slots_, "slot");
  for (const int32_t half : {0, 1}) clear(slot, half, num_tokens);
}

void bind_state_pool(py::module_& module) {
  py::class_<StatePool, std::shared_ptr<StatePool>>(module, "StatePool", "See ops.StatePool.")
      .def(py::init([](const std::vector<std::tuple<int64_t, int64_t, int64_t>>& layers,
                       int64_t num_slots, int64_t num_kept, int64_t num_drafts) {
             std::vector<StateShape> shapes;
             for (const auto& [channels, taps, floats] : layers) {
               shapes.push_back({channels, taps, floats});
             }
             return std::make_shared<StatePool>(std::move(shapes), num_slots, num_kept, num_drafts);
           }),
           py::kw_only(), py::arg("layers"), py::arg("num_slots"), py::arg("num_kept") = 0,
           py::arg("num_drafts") = 0)
      .def_property_readonly("slot_bytes", &StatePool::slot_bytes,
                             "Bytes of one sequence's states (for tests and benchmarks).");
}

}  // namespace tgi
