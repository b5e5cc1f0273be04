// sparsekern._native: the CPU kernels as functions of addresses and sizes.
//
// Pointers travel as integers (0 is null); `context` is the number of threads. sparsekern._cuda has
// the same functions with the same arguments, and more that tell the sizes of the workspaces it
// needs.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>
#include <vector>

#include "cpu/common/threads.h"
#include "cpu/dispatch.h"

namespace py = pybind11;
using sparsekern::cpu::KeepDenormals;
using sparsekern::cpu::kernels;
using Address = uintptr_t;

namespace {

template <class T = void>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

void topk(Address x, int dtype, int64_t rows, int64_t n, int64_t row_stride, int64_t col_stride,
          int64_t k, int flags, Address values, Address indices, Address masked, Address counts,
          Address, int64_t threads) {
  const KeepDenormals mode;
  kernels().topk(at(x), dtype, rows, n, row_stride, col_stride, k, flags, at(values),
                 at<int64_t>(indices), at(masked), at<int64_t>(counts), static_cast<int>(threads));
}

void codes_to_dense(Address values, int dtype, Address indices, int64_t rows, int64_t k, int64_t n,
                    Address dense, int64_t threads) {
  kernels().codes_to_dense(at(values), dtype, at<int64_t>(indices), rows, k, n, at(dense),
                           static_cast<int>(threads));
}

int64_t sparse_matmul(Address values, int dtype, Address indices, int index_tag, int64_t rows,
                      int64_t k, Address weight, int weight_dtype, int64_t n, int64_t d,
                      int64_t stride_n, int64_t stride_d, Address bias, Address out,
                      int64_t threads) {
  return kernels().sparse_matmul(at(values), dtype, at(indices), index_tag, rows, k, at(weight),
                                 weight_dtype, n, d, stride_n, stride_d, at(bias), at(out),
                                 static_cast<int>(threads));
}

int64_t transpose_codes(Address indices, int index_tag, int64_t count, int64_t n, Address offsets,
                        Address positions, Address, int64_t threads) {
  return kernels().transpose_codes(at(indices), index_tag, count, n, at<int64_t>(offsets),
                                   at<int32_t>(positions), static_cast<int>(threads));
}

bool sparse_matmul_backward(Address grad, int dtype, Address values, int64_t rows, int64_t k,
                            Address weight, int weight_dtype, int64_t n, int64_t d,
                            int64_t stride_n, int64_t stride_d, Address offsets, Address positions,
                            Address indices, int index_tag, Address grad_values,
                            Address grad_weight, int64_t grad_stride_n, int64_t grad_stride_d,
                            int64_t threads) {
  return kernels().sparse_matmul_backward(
      at(grad), dtype, at(values), rows, k, at(weight), weight_dtype, n, d, stride_n, stride_d,
      at<int64_t>(offsets), at<int32_t>(positions), at(indices), index_tag, at(grad_values),
      at(grad_weight), grad_stride_n, grad_stride_d, static_cast<int>(threads));
}

int64_t count_active(Address indices, int index_tag, int64_t count, Address values, int dtype,
                     int64_t n, Address counts, int64_t threads) {
  const KeepDenormals mode;
  return kernels().count_active(at(indices), index_tag, count, at(values), dtype, n,
                                at<int64_t>(counts), static_cast<int>(threads));
}

void adam_step(Address parameter, Address grad, Address mean, Address square, int64_t rows,
               int64_t d, double step_size, double new_mean, double beta2, double new_square,
               double root_scale, double eps, double weight_decay, bool unit_rows,
               int64_t threads) {
  kernels().adam_step(at<float>(parameter), at<float>(grad), at<float>(mean), at<float>(square),
                      rows, d, static_cast<float>(step_size), static_cast<float>(new_mean),
                      static_cast<float>(beta2), static_cast<float>(new_square),
                      static_cast<float>(root_scale), static_cast<float>(eps),
                      static_cast<float>(weight_decay), unit_rows, static_cast<int>(threads));
}

void channel_threshold(Address x, int dtype, int64_t outer, int64_t channels, int64_t inner,
                       int64_t rank, Address out, Address, int64_t threads) {
  const KeepDenormals mode;
  kernels().channel_threshold(at(x), dtype, outer, channels, inner, rank, at(out),
                              static_cast<int>(threads));
}

void threshold_relu(Address x, int dtype, int64_t outer, int64_t channels, int64_t inner,
                    Address threshold, Address scale, Address shift, Address y, Address counts,
                    int64_t threads) {
  const KeepDenormals mode;
  kernels().threshold_relu(at(x), dtype, outer, channels, inner, at(threshold), at(scale),
                           at(shift), at(y), at<int64_t>(counts), static_cast<int>(threads));
}

void threshold_codes(Address x, int dtype, int64_t outer, int64_t channels, int64_t inner,
                     Address threshold, Address scale, Address shift, int64_t capacity,
                     Address values, Address indices, Address counts, Address, int64_t threads) {
  const KeepDenormals mode;
  kernels().threshold_codes(at(x), dtype, outer, channels, inner, at(threshold), at(scale),
                            at(shift), capacity, at(values), at<int64_t>(indices),
                            at<int64_t>(counts), static_cast<int>(threads));
}

void batch_norm(Address x, int dtype, int64_t outer, int64_t channels, int64_t inner,
                Address weight, Address bias, double eps, Address z, Address mean, Address var,
                int64_t threads) {
  kernels().batch_norm(at(x), dtype, outer, channels, inner, at(weight), at(bias), eps, at(z),
                       at(mean), at(var), static_cast<int>(threads));
}

void batch_norm_backward(Address grad, Address x, int dtype, int64_t outer, int64_t channels,
                         int64_t inner, Address weight, Address mean, Address var, double eps,
                         Address grad_x, Address grad_weight, Address grad_bias, int64_t threads) {
  kernels().batch_norm_backward(at(grad), at(x), dtype, outer, channels, inner, at(weight),
                                at(mean), at(var), eps, at(grad_x), at(grad_weight), at(grad_bias),
                                static_cast<int>(threads));
}

void pointwise_conv(Address values, int dtype, Address indices, int index_tag, int64_t count,
                    int64_t outer, int64_t channels, int64_t inner, Address weight,
                    int weight_dtype, int64_t outputs, int64_t stride_output,
                    int64_t stride_channel, Address bias, Address out, Address, int64_t threads) {
  kernels().pointwise_conv(at(values), dtype, at(indices), index_tag, count, outer, channels, inner,
                           at(weight), weight_dtype, outputs, stride_output, stride_channel,
                           at(bias), at(out), static_cast<int>(threads));
}

void pointwise_conv_backward(Address grad, int dtype, Address values, Address indices,
                             int index_tag, int64_t count, int64_t outer, int64_t channels,
                             int64_t inner, Address weight, int weight_dtype, int64_t outputs,
                             int64_t stride_output, int64_t stride_channel, Address grad_values,
                             Address grad_weight, Address grad_bias, Address, int64_t threads) {
  kernels().pointwise_conv_backward(at(grad), dtype, at(values), at(indices), index_tag, count,
                                    outer, channels, inner, at(weight), weight_dtype, outputs,
                                    stride_output, stride_channel, at(grad_values), at(grad_weight),
                                    at(grad_bias), static_cast<int>(threads));
}

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
  m.doc() = "CPU kernels of sparsekern; called through sparsekern.native.";
  const auto release = py::call_guard<py::gil_scoped_release>();
  m.def("topk", &topk, release);
  m.def("codes_to_dense", &codes_to_dense, release);
  m.def("sparse_matmul", &sparse_matmul, release);
  m.def("transpose_codes", &transpose_codes, release);
  m.def("sparse_matmul_backward", &sparse_matmul_backward, release);
  m.def("count_active", &count_active, release);
  m.def("adam_step", &adam_step, release);
  m.def("channel_threshold", &channel_threshold, release);
  m.def("threshold_relu", &threshold_relu, release);
  m.def("threshold_codes", &threshold_codes, release);
  m.def("batch_norm", &batch_norm, release);
  m.def("batch_norm_backward", &batch_norm_backward, release);
  m.def("pointwise_conv", &pointwise_conv, release);
  m.def("pointwise_conv_backward", &pointwise_conv_backward, release);
  m.def("instruction_sets", &instruction_sets);
  m.def("use_instruction_set", &sparsekern::cpu::use_instruction_set);
  m.def("useful_threads", &sparsekern::cpu::useful_threads);
  m.def("set_nanoseconds_per_thread", &sparsekern::cpu::set_nanoseconds_per_thread);
  m.def("started_teams", &sparsekern::cpu::started_teams);
  m.def("build_info", &build_info);
}
