#pragma once

#include <pybind11/pybind11.h>

namespace tgi {

void bind_formats(pybind11::module_& module);

}  // namespace tgi
