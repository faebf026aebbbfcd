// The filters of sampling: which of a row's scores may be drawn.
#pragma once

#include <cstdint>

#include "params.h"
#include "sample_team.h"

namespace tgi::cpu {

// Applies top-k, top-p, min-p and typical-p to scores [vocab] (best 0): returns the least score
// that stays. room: 2 * vocab floats, the members' own in common. Called by all of the team.
float cut_off(RowTeam& team, const SampleSlot& slot, float* scores, int64_t vocab, float* room);

}  // namespace tgi::cpu
