// pybind11 only: integers to pointers, GIL release, nothing else.
#include <pybind11/pybind11.h>

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled ops of lddyn: raw pointers, sizes, strides; checked by lddyn.ops.";
  // Compute capabilities of the CUDA kernels, "80 90 100"; empty without CUDA.
  m.attr("cuda_archs") = LDDYN_CUDA_ARCHS;
}
