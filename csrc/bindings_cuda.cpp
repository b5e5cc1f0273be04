// sparsekern._cuda: the CUDA kernels as functions of addresses and sizes.
//
// Pointers travel as integers (0 is null); `context` is the CUDA stream. The device of the stream
// must be the current one. sparsekern._native has the same functions with the same arguments. Where
// that module returns the position of an index outside 0..n-1, this one returns -1 without looking:
// that would take a synchronisation.
//
// With SPARSEKERN_EMULATION this is _cuda_emulation: the same kernels, run on the host (for tests).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>

#include "cuda/adam_step/adam_step.h"
#include "cuda/channel_threshold/channel_threshold.h"
#include "cuda/common/architectures.h"
#include "cuda/count_active/count_active.h"
#include "cuda/pointwise_conv/pointwise_conv.h"
#include "cuda/sparse_matmul/sparse_matmul.h"
#include "cuda/topk/topk.h"
#include "cuda/transpose_codes/transpose_codes.h"

#ifdef SPARSEKERN_EMULATION
#define SPARSEKERN_CUDA_MODULE _cuda_emulation
#else
#define SPARSEKERN_CUDA_MODULE _cuda
#endif

namespace py = pybind11;
namespace cuda = sparsekern::cuda;
using Address = uintptr_t;

namespace {

constexpr int64_t kNotLookedAt = -1;

template <class T = void>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

cudaStream_t stream_of(Address context) { return reinterpret_cast<cudaStream_t>(context); }

void topk(Address x, int dtype, int64_t rows, int64_t n, int64_t row_stride, int64_t col_stride,
          int64_t k, int flags, Address values, Address indices, Address masked, Address counts,
          Address workspace, Address context) {
  cuda::topk(at(x), dtype, rows, n, row_stride, col_stride, k, flags, at(values),
             at<int64_t>(indices), at(masked), at<int64_t>(counts), at(workspace),
             stream_of(context));
}

void codes_to_dense(Address values, int dtype, Address indices, int64_t rows, int64_t k, int64_t n,
                    Address dense, Address context) {
  cuda::codes_to_dense(at(values), dtype, at<int64_t>(indices), rows, k, n, at(dense),
                       stream_of(context));
}

int64_t sparse_matmul(Address values, int dtype, Address indices, int index_tag, int64_t rows,
                      int64_t k, Address weight, int weight_dtype, int64_t n, int64_t d,
                      int64_t stride_n, int64_t stride_d, Address bias, Address out,
                      Address context) {
  cuda::sparse_matmul(at(values), dtype, at(indices), index_tag, rows, k, at(weight), weight_dtype,
                      n, d, stride_n, stride_d, at(bias), at(out), stream_of(context));
  return kNotLookedAt;
}

int64_t transpose_codes(Address indices, int index_tag, int64_t count, int64_t n, Address offsets,
                        Address positions, Address workspace, Address context) {
  cuda::transpose_codes(at(indices), index_tag, count, n, at<int64_t>(offsets),
                        at<int32_t>(positions), at(workspace), stream_of(context));
  return kNotLookedAt;
}

bool sparse_matmul_backward(Address grad, int dtype, Address values, int64_t rows, int64_t k,
                            Address weight, int weight_dtype, int64_t n, int64_t d,
                            int64_t stride_n, int64_t stride_d, Address offsets, Address positions,
                            Address, int, Address grad_values, Address grad_weight,
                            int64_t grad_stride_n, int64_t grad_stride_d, Address context) {
  cuda::sparse_matmul_backward(at(grad), dtype, at(values), rows, k, at(weight), weight_dtype, n, d,
                               stride_n, stride_d, at<int64_t>(offsets), at<int32_t>(positions),
                               at(grad_values), at(grad_weight), grad_stride_n, grad_stride_d,
                               stream_of(context));
  return true;  // not looked at
}

int64_t count_active(Address indices, int index_tag, int64_t count, Address values, int dtype,
                     int64_t n, Address counts, Address context) {
  cuda::count_active(at(indices), index_tag, count, at(values), dtype, n, at<int64_t>(counts),
                     stream_of(context));
  return kNotLookedAt;
}

void adam_step(Address parameter, Address grad, Address mean, Address square, int64_t rows,
               int64_t d, double step_size, double new_mean, double beta2, double new_square,
               double root_scale, double eps, double weight_decay, bool unit_rows,
               Address context) {
  cuda::adam_step(at<float>(parameter), at<float>(grad), at<float>(mean), at<float>(square), rows,
                  d, static_cast<float>(step_size), static_cast<float>(new_mean),
                  static_cast<float>(beta2), static_cast<float>(new_square),
                  static_cast<float>(root_scale), static_cast<float>(eps),
                  static_cast<float>(weight_decay), unit_rows, stream_of(context));
}

void channel_threshold(Address x, int dtype, int64_t outer, int64_t channels, int64_t inner,
                       int64_t rank, Address thresholds, Address workspace, Address context) {
  cuda::channel_threshold(at(x), dtype, outer, channels, inner, rank, at(thresholds), at(workspace),
                          stream_of(context));
}

void threshold_relu(Address x, int dtype, int64_t outer, int64_t channels, int64_t inner,
                    Address threshold, Address scale, Address shift, Address y, Address counts,
                    Address context) {
  cuda::threshold_relu(at(x), dtype, outer, channels, inner, at<float>(threshold), at<float>(scale),
                       at<float>(shift), at(y), at<int64_t>(counts), stream_of(context));
}

void threshold_codes(Address x, int dtype, int64_t outer, int64_t channels, int64_t inner,
                     Address threshold, Address scale, Address shift, int64_t capacity,
                     Address values, Address indices, Address counts, Address workspace,
                     Address context) {
  cuda::threshold_codes(at(x), dtype, outer, channels, inner, at<float>(threshold),
                        at<float>(scale), at<float>(shift), capacity, at(values),
                        at<int64_t>(indices), at<int64_t>(counts), at(workspace),
                        stream_of(context));
}

void pointwise_conv(Address values, int dtype, Address indices, int index_tag, int64_t count,
                    int64_t outer, int64_t channels, int64_t inner, Address weight,
                    int weight_dtype, int64_t outputs, int64_t stride_outputs,
                    int64_t stride_channels, Address bias, Address out, Address workspace,
                    Address context) {
  cuda::pointwise_conv(at(values), dtype, at(indices), index_tag, count, outer, channels, inner,
                       at(weight), weight_dtype, outputs, stride_outputs, stride_channels, at(bias),
                       at(out), at(workspace), stream_of(context));
}

void pointwise_conv_backward(Address grad, int dtype, Address values, Address indices,
                             int index_tag, int64_t count, int64_t outer, int64_t channels,
                             int64_t inner, Address weight, int weight_dtype, int64_t outputs,
                             int64_t stride_outputs, int64_t stride_channels, Address grad_values,
                             Address grad_weight, Address grad_bias, Address workspace,
                             Address context) {
  cuda::pointwise_conv_backward(at(grad), dtype, at(values), at(indices), index_tag, count, outer,
                                channels, inner, at(weight), weight_dtype, outputs, stride_outputs,
                                stride_channels, at(grad_values), at(grad_weight), at(grad_bias),
                                at(workspace), stream_of(context));
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
  m.doc() = "CUDA kernels of sparsekern; called through sparsekern.native.";
  const auto release = py::call_guard<py::gil_scoped_release>();
  m.def("topk_workspace", &cuda::topk_workspace);
  m.def("transpose_workspace", &cuda::transpose_workspace);
  m.def("topk", &topk, release);
  m.def("codes_to_dense", &codes_to_dense, release);
  m.def("sparse_matmul", &sparse_matmul, release);
  m.def("transpose_codes", &transpose_codes, release);
  m.def("sparse_matmul_backward", &sparse_matmul_backward, release);
  m.def("count_active", &count_active, release);
  m.def("adam_step", &adam_step, release);
  m.def("channel_threshold_workspace", &cuda::channel_threshold_workspace);
  m.def("channel_threshold", &channel_threshold, release);
  m.def("threshold_relu", &threshold_relu, release);
  m.def("threshold_codes_workspace", &cuda::threshold_codes_workspace);
  m.def("threshold_codes", &threshold_codes, release);
  m.def("pointwise_conv_workspace", &cuda::pointwise_conv_workspace);
  m.def("pointwise_conv", &pointwise_conv, release);
  m.def("pointwise_conv_backward_workspace", &cuda::pointwise_conv_backward_workspace);
  m.def("pointwise_conv_backward", &pointwise_conv_backward, release);
  // Its two convolutions want the codes grouped, by site and by channel; those of _native do not.
  m.attr("GROUPED_CODES") = true;
  m.def("build_info", &build_info);
}
