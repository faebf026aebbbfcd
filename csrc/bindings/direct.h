// Products, norms and embeddings on caller-provided tensors, one call each, for models that compute
// in torch. A row's bits are the same in any batch.
#pragma once

#include "bindings/checks.h"

namespace tgi {

void bind_direct(py::module_& module);

}  // namespace tgi
