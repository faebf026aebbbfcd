// Weights in the kernels' layout, as Python holds them.
#pragma once

#include <cstdint>
#include <string>

#include "bindings/checks.h"
#include "cpu/memory.h"
#include "cpu/step/packed.h"

namespace tgi {

namespace step = cpu::step;

// A matrix in panels. Recorded products share its memory.
struct Matrix {
  cpu::Memory memory;
  step::PackedMatrix packed;
  int64_t num_rows;     // without padding
  int64_t num_columns;  // as packed from; padded to 32 if the server quantised it
  bool has_padding_last;
  int64_t nbytes() const { return packed.num_rows / step::kPanelRows * packed.panel_size(); }
};

step::Format format_of(const std::string& name);
step::Precision precision_of(const std::string& name);
const char* precision_name(step::Precision precision);

// Throws if no product in this precision, with units of this many strips, can read this weight.
void check_product(const step::PackedMatrix& weight, step::Precision precision,
                   int64_t unit_strips);

// Returns how many tiles rows of an activation take.
int64_t tiles_of(int64_t num_rows);

// Binds packing, the table of formats with its readers, and those of integer codes in safetensors,
// in tgi_asgi._C.
void bind_matrices(py::module_& module);
void bind_formats(py::module_& module);
void bind_integer_codes(py::module_& module);

}  // namespace tgi
