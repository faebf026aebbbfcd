// The parts of the recurrent operators' parameters that their operands and a pool of states decide.
#pragma once

#include <cstdint>

#include "bindings/operands.h"
#include "bindings/state_pool.h"
#include "cpu/step/states.h"

namespace tgi {

// The result refers to the operands' arrays; input and output are not set. Throws
// std::invalid_argument if an array or the layer's state has another shape.
cpu::step::ShortConvParams params_of(const ShortConv& conv, const StatePool& states, int64_t layer);
cpu::step::DeltaRuleParams params_of(const DeltaRule& rule, const StatePool& states, int64_t layer);

// Columns of q, k and v together, and of the results.
int64_t columns_of(const DeltaRule& rule);
int64_t width_of(const DeltaRule& rule);

constexpr int64_t kMaxStateSize = 1 << 20;  // bounds each factor of a state's size
constexpr int64_t kVectorFloats = 16;       // heads are multiples of it

}  // namespace tgi
