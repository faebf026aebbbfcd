// The sampling filters: which of a row's scores may be sampled.
#pragma once

#include <cstdint>

#include "params.h"
#include "sample_team.h"

namespace tgi::cpu {

// Applies top-k, top-p, min-p and typical-p to scores [vocab] (the best is 0) and returns the
// lowest score that remains. scratch: 2 * vocab floats, shared by all members. Every member of the
// team calls it.
float filter_scores(RowTeam& team, const SampleSlot& slot, float* scores, int64_t vocab,
                    float* scratch);

}  // namespace tgi::cpu
