// Drafts of a step's rows, for Python (tgi_asgi/runner/drafts.py) and for steps without it.
#pragma once

#include <vector>

#include "bindings/rows.h"
#include "bindings/sample.h"
#include "cpu/drafter.h"

namespace tgi {

// Where each row's slot is; what is no slot's row has any place. Throws where a slot does not
// exist.
std::vector<SlotPlace> places_of(const PlannedRows& planned, const SampleArrays& state);

// The drafts of each row that may have some.
std::vector<std::vector<int32_t>> drafts_of(const PlannedRows& planned,
                                            const std::vector<SlotPlace>& places,
                                            const cpu::Drafter& drafter, const cpu::StepCost& cost);

// Tells the drafter what was drawn.
void tell(cpu::Drafter& drafter, const Draws& draws);

void bind_drafting(py::module_& module);

}  // namespace tgi
