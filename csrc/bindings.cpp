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

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled ops of lddyn: raw pointers, sizes, strides; checked by lddyn.ops.";
  // Compute capabilities of the CUDA kernels, "80 90 100"; empty without CUDA.
  m.attr("cuda_archs") = LDDYN_CUDA_ARCHS;
  py::class_<lddyn::Residual>(m, "Residual").def(py::init(&residual));
  m.def("residual_cpu", &lddyn::residual_cpu, py::call_guard<py::gil_scoped_release>());
}
