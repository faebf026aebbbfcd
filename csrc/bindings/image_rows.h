// What images bring to a step: rows in place of the embeddings of their tokens, and where those are
// in the model's rotary tables and attention.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "cpu/step/step.h"

namespace tgi {

struct ImageRows {
  std::vector<int32_t> tokens;  // ascending indices of the step's tokens
  int64_t num_levels = 0;       // the first replaces, the others are added later
  int64_t num_columns = 0;
  std::vector<float> rows;      // [num_levels, tokens, num_columns]
  std::vector<int32_t> rotary;  // [num_tokens], see StepHeader::rotary; or empty: the positions
  int64_t num_angles = 0;       // columns of these
  std::vector<float> cosines, sines;   // [own rotary rows, num_angles]
  std::vector<int32_t> visible_until;  // [num_tokens], see StepHeader; or empty

  // Makes a step's header point into this struct.
  void add_to(cpu::step::StepHeader& header) const;
};

using ImagesPtr = std::shared_ptr<const ImageRows>;

void bind_image_rows(pybind11::module_& module);

}  // namespace tgi
