// The only file that knows Python. Tensors come as addresses and strides; the caller keeps them alive.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "attention.h"

namespace py = pybind11;
namespace lk = luke_kernels;

PYBIND11_MODULE(_C, m) {
  m.doc() = "Kernels of luke_kernels in C++.";

  py::enum_<lk::DType>(m, "DType")
      .value("float32", lk::DType::kFloat32)
      .value("float64", lk::DType::kFloat64)
      .value("bfloat16", lk::DType::kBFloat16)
      .value("float16", lk::DType::kFloat16);

  py::class_<lk::Buffer>(m, "Buffer")
      .def(py::init([](uintptr_t data, int64_t token_stride, int64_t slot_stride, int64_t head_stride) {
        return lk::Buffer{reinterpret_cast<void*>(data), token_stride, slot_stride, head_stride};
      }));

  py::class_<lk::Segments>(m, "Segments")
      .def(py::init([](uintptr_t offsets, uintptr_t lengths, int64_t num_tokens, int64_t max_length) {
        return lk::Segments{reinterpret_cast<const int32_t*>(offsets), reinterpret_cast<const int32_t*>(lengths),
                            num_tokens, max_length};
      }));

  py::class_<lk::AttentionParams>(m, "AttentionParams")
      .def(py::init<>())
      .def_readwrite("dtype", &lk::AttentionParams::dtype)
      .def_readwrite("batch_size", &lk::AttentionParams::batch_size)
      .def_readwrite("num_heads", &lk::AttentionParams::num_heads)
      .def_readwrite("head_dim", &lk::AttentionParams::head_dim)
      .def_readwrite("stack", &lk::AttentionParams::stack)
      .def_readwrite("segments", &lk::AttentionParams::segments)
      .def_readwrite("projections", &lk::AttentionParams::projections)
      .def_readwrite("out", &lk::AttentionParams::out)
      .def_readwrite("lse", &lk::AttentionParams::lse)
      .def_readwrite("dout", &lk::AttentionParams::dout)
      .def_readwrite("dprojections", &lk::AttentionParams::dprojections)
      .def_readwrite("scale", &lk::AttentionParams::scale)
      .def_readwrite("dropout_p", &lk::AttentionParams::dropout_p)
      .def_readwrite("seed", &lk::AttentionParams::seed)
      .def_readwrite("offset", &lk::AttentionParams::offset)
      .def_readwrite("num_threads", &lk::AttentionParams::num_threads);

  m.def("has_openmp", &lk::has_openmp);
  m.def("cpu_isa", &lk::cpu_isa);
  m.def("set_cpu_isa", &lk::set_cpu_isa, py::arg("name"));
  m.def("multiply_add_cpu", &lk::multiply_add_cpu, py::arg("dtype"), py::arg("num_threads"), py::arg("rounds"),
        py::call_guard<py::gil_scoped_release>());
  m.def("attention_scratch_bytes_cpu", &lk::attention_scratch_bytes_cpu);
  m.def("attention_forward_cpu", &lk::attention_forward_cpu,
        py::call_guard<py::gil_scoped_release>());
  m.def("attention_backward_cpu", &lk::attention_backward_cpu,
        py::call_guard<py::gil_scoped_release>());
}
