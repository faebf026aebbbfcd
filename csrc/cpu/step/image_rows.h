// The operator that brings images' rows into the residual.
#pragma once

#include "step.h"

namespace tgi::cpu::step {

void place_image_rows(const ImageRowsParams& params, const StepHeader& step, int member,
                      int num_members);

}  // namespace tgi::cpu::step
