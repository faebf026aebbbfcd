// Weights in the layout of the kernels, as Python holds them.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "bindings/checks.h"
#include "cpu/memory.h"
#include "cpu/step/packed.h"

namespace tgi {

namespace step = cpu::step;

// A matrix in panels. Whoever records a product with it shares its memory.
struct Matrix {
  cpu::Memory memory;
  step::PackedMatrix packed;
  int64_t num_rows;     // without padding
  int64_t num_columns;  // as packed from: where the server quantised, padded to 32
  bool has_padding_last;
  int64_t nbytes() const { return packed.num_rows / step::kPanelRows * packed.panel_size(); }
};

step::Format format_of(const std::string& name);
step::Precision precision_of(const std::string& name);
const char* precision_name(step::Precision precision);

// Throws where no product in this precision, of units of so many strips, reads this weight.
void check_product(const step::PackedMatrix& weight, step::Precision precision,
                   int64_t unit_strips);

// Packing, and the table of formats with its readers, as parts of tgi_asgi._C.
void bind_matrices(py::module_& module);
void bind_formats(py::module_& module);

}  // namespace tgi
