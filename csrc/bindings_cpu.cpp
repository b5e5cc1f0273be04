// sparsekern._native: the CPU kernels as functions kernel(arguments, threads).
//
// The arguments are a dict, see bindings_arguments.h. sparsekern._cuda has the same functions of
// the same arguments.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <new>
#include <string>
#include <vector>

#include "bindings_arguments.h"
#include "cpu/common/threads.h"
#include "cpu/dispatch.h"

namespace py = pybind11;
using sparsekern::cpu::kernels;

namespace {

std::vector<std::string> instruction_sets() {
  int count = 0;
  const auto* sets = sparsekern::cpu::runnable_kernels(&count);
  std::vector<std::string> names;
  for (int i = 0; i < count; ++i) names.emplace_back(sets[i].instruction_set);
  return names;
}

std::map<std::string, std::string> build_info() {
  std::string runnable;
  for (const auto& name : instruction_sets()) runnable += (runnable.empty() ? "" : ", ") + name;
  return {{"compiler", __VERSION__},
          {"instruction set", kernels().instruction_set},
          {"runnable here", runnable},
#if defined(_OPENMP)
          {"threads", "OpenMP"}};
#else
          {"threads", "none: built without OpenMP"}};
#endif
}

// kernel(threads, x=..., k=..., ...), the fields of kernels.def in their order: a small selection
// takes less time than a dict of them and pybind11 do. `name` is the kernel's, a str.
template <class Arguments, void (*sparsekern::cpu::Kernels::*kKernel)(const Arguments&, int)>
PyObject* of_keywords(PyObject* name, PyObject* const* values, Py_ssize_t positional,
                      PyObject* names) {
  try {
    const char* kernel = PyUnicode_AsUTF8(name);
    if (positional != 1 || names == nullptr) {
      throw py::type_error(std::string(kernel) + "_of_keywords: takes the threads, and keywords");
    }
    Arguments call;
    sparsekern::KeywordReader reader(kernel, values + 1, names);
    sparsekern::read_fields(reader, &call);
    const int threads = static_cast<int>(sparsekern::integer_of(values[0]));
    const py::gil_scoped_release released;
    (kernels().*kKernel)(call, threads);
  } catch (py::error_already_set& error) {
    error.restore();
    return nullptr;
  } catch (const py::builtin_exception& error) {
    error.set_error();
    return nullptr;
  } catch (const std::bad_alloc&) {
    return PyErr_NoMemory();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
  Py_RETURN_NONE;
}

template <class Arguments, void (*sparsekern::cpu::Kernels::*kKernel)(const Arguments&, int)>
void export_of_keywords(py::module_& m, const char* kernel, const char* name) {
  static PyMethodDef method = {
      name,
      reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&of_keywords<Arguments, kKernel>)),
      METH_FASTCALL | METH_KEYWORDS, nullptr};
  m.attr(name) =
      py::reinterpret_steal<py::object>(PyCFunction_NewEx(&method, py::str(kernel).ptr(), nullptr));
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "CPU kernels of sparsekern; called through sparsekern.dispatch.launch.";
#define SPARSEKERN_KERNEL(name, Arguments, Result, ...)     \
  m.def(#name, [](const py::dict& arguments, int threads) { \
    sparsekern::Arguments call;                             \
    sparsekern::read_arguments(arguments, &call);           \
    const py::gil_scoped_release released;                  \
    return kernels().name(call, threads);                   \
  });
#define SPARSEKERN_CUDA_KERNEL(...)
#include "interface/kernels.def"
  sparsekern::export_dtypes(m);
  using sparsekern::cpu::Kernels;
  export_of_keywords<sparsekern::TopkArguments, &Kernels::topk>(m, "topk", "topk_of_keywords");
  export_of_keywords<sparsekern::LinearTopkArguments, &Kernels::linear_topk>(
      m, "linear_topk", "linear_topk_of_keywords");
  m.def("instruction_sets", &instruction_sets);
  m.def("multiplies_bfloat16", &sparsekern::cpu::multiplies_bfloat16);
  m.def("use_instruction_set", &sparsekern::cpu::use_instruction_set);
  m.def("useful_threads", &sparsekern::cpu::useful_threads);
  m.def("set_nanoseconds_per_thread", &sparsekern::cpu::set_nanoseconds_per_thread);
  m.def("started_teams", &sparsekern::cpu::started_teams);
  m.def("build_info", &build_info);
}
