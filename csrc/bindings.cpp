// The only file that knows Python. Tensors come as addresses and strides; the caller keeps them alive.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <tuple>

#include "attention.h"
#include "linear.h"

namespace py = pybind11;
namespace lk = luke_kernels;

namespace {

// Plain tuples: objects of their own would cost as much as the attention of a few tokens.
using Buffer = std::tuple<uintptr_t, int64_t, int64_t, int64_t>;      // address; strides of tokens, slots, heads
using Segments = std::tuple<uintptr_t, uintptr_t, int64_t, int64_t>;  // offsets, lengths; num_tokens, max_length
template <class T>
using Kinds = std::array<T, lk::kKinds>;

lk::Buffer buffer(const Buffer& given) {
  const auto [data, token_stride, slot_stride, head_stride] = given;
  return {reinterpret_cast<void*>(data), token_stride, slot_stride, head_stride};
}

lk::Segments segments(const Segments& given) {
  const auto [offsets, lengths, num_tokens, max_length] = given;
  return {reinterpret_cast<const int32_t*>(offsets), reinterpret_cast<const int32_t*>(lengths), num_tokens, max_length};
}

Kinds<lk::Buffer> buffers(const Kinds<Buffer>& given) { return {buffer(given[0]), buffer(given[1])}; }

lk::AttentionParams attention_params(lk::DType dtype, int64_t batch_size, int64_t stack, int64_t num_heads,
                                     int64_t head_dim, const Kinds<Segments>& places,
                                     const Kinds<Buffer>& projections, const Buffer& out, const Buffer& lse,
                                     double scale, double dropout_p, uint64_t seed, uint64_t offset, int num_threads) {
  lk::AttentionParams params;
  params.dtype = dtype;
  params.batch_size = batch_size;
  params.stack = stack;
  params.num_heads = num_heads;
  params.head_dim = head_dim;
  params.segments = {segments(places[0]), segments(places[1])};
  params.projections = buffers(projections);
  params.out = buffer(out);
  params.lse = buffer(lse);
  params.scale = scale;
  params.dropout_p = dropout_p;
  params.seed = seed;
  params.offset = offset;
  params.num_threads = num_threads;
  return params;
}

#ifdef LUKE_CUDA
void attention_cuda(lk::AttentionParams params, int device, uintptr_t stream, uintptr_t seed, bool forward) {
  params.device = device;
  params.stream = reinterpret_cast<void*>(stream);
  params.device_seed = reinterpret_cast<const int64_t*>(seed);
  forward ? lk::attention_forward_cuda(params) : lk::attention_backward_cuda(params);
}

void attention_forward_cuda(const lk::AttentionParams& params, int device, uintptr_t stream, uintptr_t seed) {
  attention_cuda(params, device, stream, seed, true);
}

void attention_backward_cuda(lk::AttentionParams params, int device, uintptr_t stream, uintptr_t seed,
                             const Kinds<Buffer>& dout, const Kinds<Buffer>& dprojections, uintptr_t statistics) {
  params.dout = buffers(dout);
  params.dprojections = buffers(dprojections);
  params.statistics = reinterpret_cast<float*>(statistics);
  attention_cuda(params, device, stream, seed, false);
}
#endif

void attention_backward_cpu(lk::AttentionParams params, const Kinds<Buffer>& dout, const Kinds<Buffer>& dprojections) {
  params.dout = buffers(dout);
  params.dprojections = buffers(dprojections);
  lk::attention_backward_cpu(params);
}

void linear_pack_cpu(lk::DType dtype, uintptr_t weight, int64_t stride, int64_t in_size, int64_t out_size,
                     uintptr_t packed) {
  lk::linear_pack_cpu(dtype, reinterpret_cast<void*>(weight), stride, in_size, out_size,
                      reinterpret_cast<void*>(packed));
}

// Matrices as (address, stride); a null address where there is none.
using Matrix = std::tuple<uintptr_t, int64_t>;

void linear_cpu(lk::DType dtype, int64_t rows, int64_t in_size, int64_t out_size, const Matrix& x, uintptr_t packed,
                uintptr_t bias, const Matrix& residual, const Matrix& out, bool gelu, int num_threads) {
  lk::LinearParams params;
  params.dtype = dtype;
  params.rows = rows;
  params.in_size = in_size;
  params.out_size = out_size;
  params.x = reinterpret_cast<void*>(std::get<0>(x));
  params.x_stride = std::get<1>(x);
  params.packed = reinterpret_cast<void*>(packed);
  params.bias = reinterpret_cast<void*>(bias);
  params.residual = reinterpret_cast<void*>(std::get<0>(residual));
  params.residual_stride = std::get<1>(residual);
  params.out = reinterpret_cast<void*>(std::get<0>(out));
  params.out_stride = std::get<1>(out);
  params.gelu = gelu;
  params.num_threads = num_threads;
  lk::linear_cpu(params);
}

void layer_norm_cpu(lk::DType dtype, int64_t rows, int64_t size, const Matrix& x, uintptr_t weight, uintptr_t bias,
                    float eps, const Matrix& out, int num_threads) {
  lk::NormParams params;
  params.dtype = dtype;
  params.rows = rows;
  params.size = size;
  params.x = reinterpret_cast<void*>(std::get<0>(x));
  params.x_stride = std::get<1>(x);
  params.weight = reinterpret_cast<void*>(weight);
  params.bias = reinterpret_cast<void*>(bias);
  params.eps = eps;
  params.out = reinterpret_cast<void*>(std::get<0>(out));
  params.out_stride = std::get<1>(out);
  params.num_threads = num_threads;
  lk::layer_norm_cpu(params);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Kernels of luke_kernels in C++.";

  py::enum_<lk::DType>(m, "DType", py::module_local())
      .value("float32", lk::DType::kFloat32)
      .value("float64", lk::DType::kFloat64)
      .value("bfloat16", lk::DType::kBFloat16)
      .value("float16", lk::DType::kFloat16);

  py::class_<lk::AttentionParams>(m, "AttentionParams", py::module_local()).def(py::init(&attention_params));

  m.def("has_openmp", &lk::has_openmp);
  m.def("cpu_isa", &lk::cpu_isa);
  m.def("set_cpu_isa", &lk::set_cpu_isa, py::arg("name"));
  m.def("multiply_add_cpu", &lk::multiply_add_cpu, py::arg("dtype"), py::arg("num_threads"), py::arg("rounds"),
        py::call_guard<py::gil_scoped_release>());
  m.def("attention_scratch_bytes_cpu", &lk::attention_scratch_bytes_cpu);
  m.def("attention_forward_cpu", &lk::attention_forward_cpu, py::call_guard<py::gil_scoped_release>());
  m.def("attention_backward_cpu", &attention_backward_cpu, py::call_guard<py::gil_scoped_release>());

  m.def("linear_packed_bytes_cpu", &lk::linear_packed_bytes_cpu);
  m.def("linear_pack_cpu", &linear_pack_cpu, py::call_guard<py::gil_scoped_release>());
  m.def("linear_cpu", &linear_cpu, py::call_guard<py::gil_scoped_release>());
  m.def("layer_norm_cpu", &layer_norm_cpu, py::call_guard<py::gil_scoped_release>());

#ifdef LUKE_CUDA
  m.def("cuda_architectures", &lk::cuda_architectures);
  m.def("cuda_missing", &lk::cuda_missing, py::arg("device"));
  m.def("attention_forward_cuda", &attention_forward_cuda, py::call_guard<py::gil_scoped_release>());
  m.def("attention_backward_cuda", &attention_backward_cuda, py::call_guard<py::gil_scoped_release>());
#endif
}
