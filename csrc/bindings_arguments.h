// Arguments of kernels, read by name from what Python gives: each function of both modules takes a
// dict of the fields that interface/kernels.def lists. Addresses travel as integers (0 is null),
// the operands of interface/operands.h as tuples of their fields.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "interface/arguments.h"

namespace sparsekern {

namespace py = pybind11;

// ---- one value ----

inline int64_t integer_of(PyObject* value) {
  const int64_t x = PyLong_AsLongLong(value);
  if (x == -1 && PyErr_Occurred() != nullptr) throw py::error_already_set();
  return x;
}

inline void read(PyObject* value, int64_t* field) { *field = integer_of(value); }
inline void read(PyObject* value, bool* field) { *field = integer_of(value) != 0; }
inline void read(PyObject* value, Dtype* field) { *field = static_cast<Dtype>(integer_of(value)); }
inline void read(PyObject* value, IndexType* field) {
  *field = static_cast<IndexType>(integer_of(value));
}
inline void read(PyObject* value, double* field) {
  *field = PyFloat_AsDouble(value);
  if (*field == -1 && PyErr_Occurred() != nullptr) throw py::error_already_set();
}
inline void read(PyObject* value, float* field) {
  double x;
  read(value, &x);
  *field = static_cast<float>(x);
}
template <class T>
void read(PyObject* value, T** field) {
  *field = reinterpret_cast<T*>(static_cast<uintptr_t>(integer_of(value)));
}

// ---- operands: tuples ----

template <class... Fields>
void read_tuple(PyObject* value, Fields*... fields) {
  constexpr Py_ssize_t kCount = sizeof...(fields);
  if (!PyTuple_Check(value) || PyTuple_GET_SIZE(value) != kCount) {
    throw py::type_error("an operand must be a tuple of " + std::to_string(kCount) + " fields");
  }
  Py_ssize_t i = 0;
  (read(PyTuple_GET_ITEM(value, i++), fields), ...);
}

inline void read(PyObject* value, Matrix* m) {
  read_tuple(value, &m->data, &m->dtype, &m->rows, &m->columns, &m->row_stride, &m->column_stride);
}
inline void read(PyObject* value, ChannelTensor* x) {
  read_tuple(value, &x->data, &x->dtype, &x->outer, &x->channels, &x->inner);
}
inline void read(PyObject* value, Codes* c) {
  read_tuple(value, &c->values, &c->dtype, &c->indices, &c->index_type, &c->rows, &c->k);
}
inline void read(PyObject* value, IndexList* i) {
  read_tuple(value, &i->data, &i->type, &i->count);
}

// ---- all fields of a kernel ----

class ArgumentReader {
 public:
  ArgumentReader(const char* kernel, PyObject* given) : kernel_(kernel), given_(given) {}

  // `name` is interned, so that it is found by its address.
  template <class T>
  void field(PyObject* name, T* field) {
    PyObject* value = PyDict_GetItemWithError(given_, name);
    if (value == nullptr) fail("lacks the argument " + text(name));
    read(value, field);
    ++count_;
  }

  void finish() const {
    if (PyDict_Size(given_) == count_) return;
    fail("takes " + std::to_string(count_) + " arguments, got " + names());
  }

 private:
  [[noreturn]] void fail(const std::string& what) const {
    throw py::type_error(std::string(kernel_) + ": " + what);
  }
  std::string names() const {
    const auto list = py::reinterpret_steal<py::object>(PyDict_Keys(given_));
    return text(list.ptr());
  }
  static std::string text(PyObject* object) { return py::str(py::handle(object)); }

  const char* kernel_;
  PyObject* given_;
  Py_ssize_t count_ = 0;
};

// The keywords of a call, in the order of the fields, without a dict made of them.
class KeywordReader {
 public:
  KeywordReader(const char* kernel, PyObject* const* values, PyObject* names)
      : kernel_(kernel), values_(values), names_(names), given_(PyTuple_GET_SIZE(names)) {}

  template <class T>
  void field(PyObject* name, T* field) {
    if (count_ == given_ || PyTuple_GET_ITEM(names_, count_) != name) fail();
    read(values_[count_++], field);
  }

  void finish() const {
    if (count_ != given_) fail();
  }

 private:
  [[noreturn]] void fail() const {
    throw py::type_error(std::string(kernel_) +
                         ": keywords must be all fields in their order, got " +
                         std::string(py::str(py::handle(names_))));
  }

  const char* kernel_;
  PyObject* const* values_;
  PyObject* names_;
  Py_ssize_t given_, count_ = 0;
};

#define SPARSEKERN_FIELD(type, name)                                \
  {                                                                 \
    static PyObject* const key = PyUnicode_InternFromString(#name); \
    reader.field(key, &call->name);                                 \
  }
#define SPARSEKERN_KERNEL(kernel, Arguments, Result, ...)              \
  template <class Reader>                                              \
  void read_fields(Reader& reader, Arguments* call) {                  \
    __VA_ARGS__                                                        \
    reader.finish();                                                   \
  }                                                                    \
  inline void read_arguments(const py::dict& given, Arguments* call) { \
    ArgumentReader reader(#kernel, given.ptr());                       \
    read_fields(reader, call);                                         \
  }
#include "interface/kernels.def"

// The names of the dtypes, in the order of their numbers.
inline void export_dtypes(py::module_& m) {
  py::list dtypes, index_dtypes;
  for (const char* name : kDtypes) dtypes.append(name);
  for (const char* name : kIndexTypes) index_dtypes.append(name);
  m.attr("DTYPES") = py::tuple(dtypes);
  m.attr("INDEX_DTYPES") = py::tuple(index_dtypes);
}

}  // namespace sparsekern
