// Memory of the tensors that a step makes and drops. It is used again, because the system would
// clear the pages of new memory: 1.2 to 1.5 GB for 48 texts.
#pragma once

#include "bindings/float_tensors.h"

namespace tgi {

// Returns an array [num_rows, columns] whose values are arbitrary. Needs the GIL.
FloatArray new_rows(int64_t num_rows, int64_t columns);

// Returns to the system what no array uses; the compute thread calls it when it has been idle.
void return_free_rows();

void bind_tensor_memory(py::module_& module);

}  // namespace tgi
