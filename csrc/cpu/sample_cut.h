// The filters of sampling: which of a row's scores may be drawn.
#pragma once

#include <cstdint>

#include "params.h"
#include "sample.h"

namespace tgi::cpu {

// Applies top-k, top-p, min-p and typical-p to scores [vocab] (best 0): returns the least score
// that stays. room: 2 * vocab floats.
float cut_off(const RowPasses& rows, const SampleSlot& slot, float* scores, int64_t vocab,
              float* room);

}  // namespace tgi::cpu
