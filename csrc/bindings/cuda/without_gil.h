// Calls without the GIL; exceptions of torch, Python and C++ are re-raised as torch does.
#pragma once

#include <pybind11/pybind11.h>
#include <torch/csrc/Exceptions.h>

#include <exception>

namespace tgi::cuda {

template <class Function>
void without_gil(const Function& function) {
  try {
    const pybind11::gil_scoped_release release;
    function();
  } catch (...) {
    torch::translate_exception_to_python(std::current_exception());
    throw pybind11::error_already_set();
  }
}

}  // namespace tgi::cuda
