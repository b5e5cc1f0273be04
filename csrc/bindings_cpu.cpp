// sparsekern._native: the CPU kernels as functions kernel(arguments, threads).
//
// The arguments are a dict, see bindings_arguments.h. sparsekern._cuda has the same functions of
// the same arguments.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
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
  m.def("instruction_sets", &instruction_sets);
  m.def("use_instruction_set", &sparsekern::cpu::use_instruction_set);
  m.def("useful_threads", &sparsekern::cpu::useful_threads);
  m.def("set_nanoseconds_per_thread", &sparsekern::cpu::set_nanoseconds_per_thread);
  m.def("started_teams", &sparsekern::cpu::started_teams);
  m.def("build_info", &build_info);
}
