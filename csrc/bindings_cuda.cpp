// sparsekern._cuda: the CUDA kernels as functions kernel(arguments, stream), or kernel(arguments,
// stream, workspace) beside kernel_workspace(arguments), which says how many bytes that has.
//
// The arguments are a dict, see bindings_arguments.h. The device of the stream must be the current
// one. sparsekern._native has the same functions of the same arguments. What that module finds in
// indices and lists, this one does not look for: it would take a synchronisation.
//
// With SPARSEKERN_EMULATION this is _cuda_emulation: the same kernels, run on the host (for tests).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>

#include "bindings_arguments.h"
#include "cuda/common/architectures.h"
#include "cuda/kernels.h"
#include "cuda/topk/regimes.h"

#ifdef SPARSEKERN_EMULATION
#define SPARSEKERN_CUDA_MODULE _cuda_emulation
#else
#define SPARSEKERN_CUDA_MODULE _cuda
#endif

namespace py = pybind11;
namespace cuda = sparsekern::cuda;
using Address = uintptr_t;

namespace {

// The result of a kernel that did not look: all indices, and all lists, are right.
template <class Result>
Result not_looked_at();
template <>
void not_looked_at() {}
template <>
bool not_looked_at() {
  return true;
}
template <>
int64_t not_looked_at() {
  return -1;
}

cudaStream_t stream_of(Address context) { return reinterpret_cast<cudaStream_t>(context); }

template <class Arguments>
Arguments read(const py::dict& given) {
  Arguments call;
  sparsekern::read_arguments(given, &call);
  return call;
}

std::map<std::string, std::string> build_info() {
#ifdef SPARSEKERN_EMULATION
  const char* kind = "emulation";
#else
  const char* kind = "cuda";
#endif
  return {{"kind", kind}, {"compiler", cuda::compiler()}, {"architectures", cuda::architectures()}};
}

}  // namespace

PYBIND11_MODULE(SPARSEKERN_CUDA_MODULE, m) {
  m.doc() = "CUDA kernels of sparsekern; called through sparsekern.dispatch.launch.";
#define SPARSEKERN_KERNEL(name, Arguments, Result, ...)        \
  m.def(#name, [](const py::dict& arguments, Address stream) { \
    const auto call = read<sparsekern::Arguments>(arguments);  \
    const py::gil_scoped_release released;                     \
    cuda::name(call, stream_of(stream));                       \
    return not_looked_at<Result>();                            \
  });
#define SPARSEKERN_KERNEL_WITH_WORKSPACE(name, Arguments, Result, ...)            \
  m.def(#name "_workspace", [](const py::dict& arguments) {                       \
    return cuda::name##_workspace(read<sparsekern::Arguments>(arguments));        \
  });                                                                             \
  m.def(#name, [](const py::dict& arguments, Address stream, Address workspace) { \
    const auto call = read<sparsekern::Arguments>(arguments);                     \
    const py::gil_scoped_release released;                                        \
    cuda::name(call, reinterpret_cast<void*>(workspace), stream_of(stream));      \
    return not_looked_at<Result>();                                               \
  });
#define SPARSEKERN_CPU_KERNEL(...)
#include "interface/kernels.def"
  sparsekern::export_dtypes(m);
  // Its two convolutions want the codes grouped, by site and by channel; those of _native do not.
  m.attr("GROUPED_CODES") = true;
  m.attr("MOST_UPDATED_CODES") = cuda::kCandidateK;
  m.def("build_info", &build_info);
}
