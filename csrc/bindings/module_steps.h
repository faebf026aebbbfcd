#pragma once

#include <pybind11/pybind11.h>

namespace tgi {

namespace py = pybind11;

void bind_steps(py::module_& module);

}  // namespace tgi
