#include "image_rows.h"

#include <algorithm>

#include "../team.h"

namespace tgi::cpu::step {

void place_image_rows(const ImageRowsParams& p, const StepHeader& step, int member,
                      int num_members) {
  const int64_t columns = p.num_columns;
  const float* const level = step.image_rows + p.level * step.num_image_rows * columns;
  const Range rows = split(step.num_image_rows, member, num_members);
  for (int64_t i = rows.begin; i < rows.end; ++i) {
    const float* const from = level + i * columns;
    float* const x = p.x + step.image_tokens[i] * columns;
    if (p.adds) {
      for (int64_t k = 0; k < columns; ++k) x[k] += from[k];
    } else {
      std::copy_n(from, columns, x);
    }
  }
}

}  // namespace tgi::cpu::step
