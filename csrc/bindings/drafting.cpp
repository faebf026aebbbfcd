#include "bindings/drafting.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <tuple>
#include <utility>

namespace tgi {

std::vector<SlotPosition> slot_positions(const PlannedRows& planned, const SampleArrays& state) {
  std::vector<SlotPosition> places(planned.rows.size());
  for (size_t index = 0; index < places.size(); ++index) {
    const PlannedRows::Row& row = planned.rows[index];
    if (!row.is_from_slot) continue;
    const SampleSlot& record = state.record(row.slot);
    places[index] = {record.last_id, record.position};
  }
  return places;
}

std::vector<std::vector<int32_t>> choose_drafts(const PlannedRows& planned,
                                                const std::vector<SlotPosition>& places,
                                                const cpu::Drafter& drafter,
                                                const cpu::StepCost& cost) {
  std::vector<cpu::DraftRequest> requests;
  std::vector<size_t> rows;
  int64_t num_tokens = 0;
  for (size_t index = 0; index < planned.rows.size(); ++index) {
    const PlannedRows::Row& row = planned.rows[index];
    num_tokens += row.is_from_slot ? 1 : static_cast<int64_t>(row.num_ids);
    if (row.max_drafts == 0) continue;
    const int64_t num_left = row.stop - start_of(row, places[index]) - 1;
    if (num_left <= 0) continue;
    requests.push_back({row.slot, std::min<int64_t>(row.max_drafts, num_left), {}});
    rows.push_back(index);
  }
  if (requests.empty()) return {};
  std::vector<std::vector<int32_t>> chosen = drafter.choose(requests, cost, num_tokens);
  std::vector<std::vector<int32_t>> drafts(planned.rows.size());
  for (size_t i = 0; i < rows.size(); ++i) drafts[rows[i]] = std::move(chosen[i]);
  return drafts;
}

void observe(cpu::Drafter& drafter, const Samples& samples) {
  for (size_t row = 0; row < samples.slots.size(); ++row) {
    if (samples.is_accepted[row] && samples.is_finite[row])
      drafter.append(samples.slots[row], samples.token_ids[row]);
  }
}

namespace {

cpu::Drafter make_drafter(int64_t num_slots, int64_t shortest, int64_t longest) {
  check_size(num_slots, "num_slots");
  check_size(shortest, "shortest");
  check(shortest <= longest && longest <= 1024, "`longest` must be in [", shortest, ", 1024], got ",
        longest);
  return cpu::Drafter(num_slots, {shortest, longest});
}

void check_slot(const cpu::Drafter& drafter, int64_t slot) {
  check(slot >= 0 && slot < drafter.num_slots(), "`slot` must be in [0, ", drafter.num_slots(),
        "), got ", slot);
}

void start(cpu::Drafter& drafter, int64_t slot, const Array<int32_t>& ids) {
  check_slot(drafter, slot);
  check_shape(ids, "ids", {-1});
  drafter.start(static_cast<int32_t>(slot), {ids.data(), ids.data() + ids.size()});
}

using Request = std::tuple<int64_t, int64_t, std::vector<int32_t>>;

std::vector<std::vector<int32_t>> choose(const cpu::Drafter& drafter,
                                         const std::vector<Request>& given, double base,
                                         double token, int64_t num_tokens) {
  std::vector<cpu::DraftRequest> requests;
  for (const auto& [slot, max_drafts, certain] : given) {
    check_slot(drafter, slot);
    requests.push_back({static_cast<int32_t>(slot), max_drafts, certain});
  }
  return drafter.choose(requests, {base, token}, num_tokens);
}

void append(cpu::Drafter& drafter, int64_t slot, int32_t id) {
  check_slot(drafter, slot);
  drafter.append(static_cast<int32_t>(slot), id);
}

int64_t length(const cpu::Drafter& drafter, int64_t slot) {
  check_slot(drafter, slot);
  return drafter.length(static_cast<int32_t>(slot));
}

}  // namespace

void bind_drafting(py::module_& module) {
  py::class_<cpu::Drafter, std::shared_ptr<cpu::Drafter>>(
      module, "Drafter", "Drafts the next tokens of slots, see csrc/cpu/drafter.h.")
      .def(py::init([](int64_t num_slots, int64_t shortest, int64_t longest) {
             return std::make_shared<cpu::Drafter>(make_drafter(num_slots, shortest, longest));
           }),
           py::kw_only(), py::arg("num_slots"), py::arg("shortest"), py::arg("longest"))
      .def("start", &start, py::arg("slot"), py::arg("ids").noconvert(),
           "Assign a slot to a sequence with these tokens.")
      .def("append", &append, py::arg("slot"), py::arg("id"), "Append a sampled token.")
      .def("length", &length, py::arg("slot"), "Return the number of tokens of a slot's sequence.")
      .def("choose", &choose, py::arg("requests"), py::kw_only(), py::arg("base"), py::arg("token"),
           py::arg("num_tokens"),
           "Return the drafts for each (slot, maximum number, certain tokens), by a step's cost.");
}

}  // namespace tgi
