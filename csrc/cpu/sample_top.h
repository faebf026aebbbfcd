// Lists the best values of a row in the caller's own arrays. A team's run must not allocate,
// because a failure there would end the process.
#pragma once

#include <cstdint>

#include "sample.h"

namespace tgi::cpu {

// Writes the `wanted` best of values [n] that are >= floor, best first and lowest id first on ties,
// to best [wanted] and ids [wanted]; returns their number.
int64_t list_top(const RowPasses& rows, const float* values, int64_t n, float floor, int64_t wanted,
                 float* best, int32_t* ids);

}  // namespace tgi::cpu
