// Values of a plan (tgi_asgi/runner/plan.py), read and checked. Needs the GIL.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace tgi {

// Thrown if a plan names something that does not exist: a bug in the engine, never a client's
// error.
class PlanError : public std::invalid_argument {
 public:
  using std::invalid_argument::invalid_argument;
};

inline pybind11::object attribute(PyObject* object, PyObject* name) {
  PyObject* const value = PyObject_GetAttr(object, name);
  if (value == nullptr) throw pybind11::error_already_set();
  return pybind11::reinterpret_steal<pybind11::object>(value);
}

inline std::string bounds(const char* name, int64_t stop) {
  return std::string("a ") + name + " must be in [0, " + std::to_string(stop) + ")";
}

inline int64_t integer(PyObject* value, const char* name, int64_t stop) {
  const int64_t found = PyLong_AsLongLong(value);
  if (found == -1 && PyErr_Occurred() != nullptr) {
    if (PyErr_ExceptionMatches(PyExc_OverflowError) == 0) throw pybind11::error_already_set();
    PyErr_Clear();
    throw PlanError(bounds(name, stop));
  }
  if (found < 0 || found >= stop)
    throw PlanError(bounds(name, stop) + ", got " + std::to_string(found));
  return found;
}

// Uses a list or tuple as is and converts any other sequence to a list.
class Items {
 public:
  explicit Items(pybind11::handle sequence)
      : items_(pybind11::reinterpret_steal<pybind11::object>(
            PySequence_Fast(sequence.ptr(), "a plan's rows, ids and blocks are sequences"))) {
    if (!items_) throw pybind11::error_already_set();
  }
  int64_t size() const { return PySequence_Fast_GET_SIZE(items_.ptr()); }
  PyObject* operator[](int64_t index) const {
    return PySequence_Fast_GET_ITEM(items_.ptr(), index);
  }
  PyObject* const* data() const { return PySequence_Fast_ITEMS(items_.ptr()); }

 private:
  pybind11::object items_;
};

}  // namespace tgi
