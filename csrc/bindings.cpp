// pybind11 only: integers to pointers, GIL release, nothing else.
#include <pybind11/pybind11.h>

#include "lddyn.h"

namespace py = pybind11;

namespace {

template <typename T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

lddyn::Residual residual(uintptr_t logits, uintptr_t targets, uintptr_t residual, uintptr_t logp,
                         uintptr_t entropy, uintptr_t squared_norm, uintptr_t top, int64_t n,
                         int64_t vocabulary, int64_t row_stride, int dtype) {
  return {pointer<const void>(logits),
          pointer<const int64_t>(targets),
          pointer<void>(residual),
          pointer<void>(logp),
          pointer<void>(entropy),
          pointer<void>(squared_norm),
          pointer<int64_t>(top),
          n,
          vocabulary,
          row_stride,
          static_cast<lddyn::Dtype>(dtype)};
}

#ifdef LDDYN_CUDA
lddyn::Gram gram(uintptr_t activations_o, uintptr_t grads_o, uintptr_t activations_u,
                 uintptr_t grads_u, uintptr_t similarity, uintptr_t pushed, uintptr_t partial,
                 uintptr_t out, int64_t s, int64_t t, int64_t d_in, int64_t d_out, int64_t m,
                 int64_t n, int64_t splits, int dtype) {
  return {pointer<const void>(activations_o),
          pointer<const void>(grads_o),
          pointer<const void>(activations_u),
          pointer<const void>(grads_u),
          pointer<void>(similarity),
          pointer<void>(pushed),
          pointer<float>(partial),
          pointer<float>(out),
          s,
          t,
          d_in,
          d_out,
          m,
          n,
          splits,
          static_cast<lddyn::Dtype>(dtype)};
}
#endif

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled ops of lddyn: raw pointers, sizes, strides; checked by lddyn.ops.";
  // Compute capabilities of the CUDA kernels, "80 90 100"; empty without CUDA.
  m.attr("cuda_archs") = LDDYN_CUDA_ARCHS;
  py::class_<lddyn::Residual>(m, "Residual").def(py::init(&residual));
  m.def("residual_cpu", &lddyn::residual_cpu, py::call_guard<py::gil_scoped_release>());
#ifdef LDDYN_CUDA
  py::class_<lddyn::Gram>(m, "Gram").def(py::init(&gram));
  m.def("residual_cuda", &lddyn::residual_cuda, py::call_guard<py::gil_scoped_release>());
  m.def("gram_cuda", &lddyn::gram_cuda, py::call_guard<py::gil_scoped_release>());
#endif
}
