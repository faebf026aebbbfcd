// Draft tokens for a step's rows, for Python (tgi_asgi/runner/drafts.py) and for steps that run
// without it.
#pragma once

#include <vector>

#include "bindings/rows.h"
#include "bindings/sample.h"
#include "cpu/drafter.h"

namespace tgi {

// Returns each row's slot position; entries of rows that are not from a slot are unspecified.
// Throws if a slot does not exist.
std::vector<SlotPosition> slot_positions(const PlannedRows& planned, const SampleArrays& state);

// Returns the drafts for each row that may have some.
std::vector<std::vector<int32_t>> choose_drafts(const PlannedRows& planned,
                                                const std::vector<SlotPosition>& places,
                                                const cpu::Drafter& drafter,
                                                const cpu::StepCost& cost);

// Appends the sampled tokens to the drafter.
void observe(cpu::Drafter& drafter, const Samples& samples);

void bind_drafting(py::module_& module);

}  // namespace tgi
