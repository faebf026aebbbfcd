// What a step asks of the device besides kernels: copies, graphs and events, in one call.
#pragma once

#include <pybind11/pybind11.h>

namespace tgi::cuda {

// Binds `submit`, the `Event` and `Graph` that it takes, and `Prepared`, which is submitted later.
void bind_submit(pybind11::module_& module);

}  // namespace tgi::cuda
