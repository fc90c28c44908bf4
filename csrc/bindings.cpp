// pybind11 only: integers to pointers, GIL release, nothing else.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <tuple>

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

lddyn::ResidualRows residual_rows(uintptr_t logits, uintptr_t targets, uintptr_t peak,
                                  uintptr_t others, int64_t n, int64_t vocabulary,
                                  int64_t row_stride, int dtype) {
  return {pointer<const void>(logits),
          pointer<const int64_t>(targets),
          pointer<void>(peak),
          pointer<double>(others),
          n,
          vocabulary,
          row_stride,
          static_cast<lddyn::Dtype>(dtype)};
}

lddyn::Tile tile(uintptr_t data, int64_t row_stride, int64_t lo, int64_t hi) {
  return {pointer<void>(data), row_stride, lo, hi};
}

lddyn::Batch batch(uintptr_t data, int64_t c_stride, int64_t t_stride) {
  return {pointer<const void>(data), c_stride, t_stride};
}

lddyn::Sizes sizes(int64_t c, int64_t t, int64_t n, int dtype) {
  return {c, t, n, static_cast<lddyn::Dtype>(dtype)};
}

void gated_pullback_cpu(uintptr_t value, uintptr_t slope, const lddyn::Batch& grads, uintptr_t gate,
                        uintptr_t up, const lddyn::Sizes& s, int threads) {
  lddyn::gated_pullback_cpu(pointer<void>(value), pointer<void>(slope), grads, pointer<void>(gate),
                            pointer<void>(up), s, threads);
}

void gated_pushforward_cpu(uintptr_t value, uintptr_t slope, const lddyn::Batch& gate,
                           const lddyn::Batch& up, uintptr_t out, const lddyn::Sizes& s,
                           int threads) {
  lddyn::gated_pushforward_cpu(pointer<void>(value), pointer<void>(slope), gate, up,
                               pointer<void>(out), s, threads);
}

void norm_pullback_cpu(uintptr_t normalized, uintptr_t rstd, uintptr_t weight,
                       const lddyn::Batch& grads, uintptr_t grad_input, uintptr_t grad_weight,
                       bool centred, const lddyn::Sizes& s, int threads) {
  lddyn::norm_pullback_cpu(pointer<void>(normalized), pointer<void>(rstd), pointer<void>(weight),
                           grads, pointer<void>(grad_input), pointer<void>(grad_weight), centred, s,
                           threads);
}

void norm_pushforward_cpu(uintptr_t normalized, uintptr_t rstd, uintptr_t weight,
                          const lddyn::Batch& tangents, uintptr_t out, bool centred,
                          const lddyn::Sizes& s, int threads) {
  lddyn::norm_pushforward_cpu(pointer<void>(normalized), pointer<void>(rstd), pointer<void>(weight),
                              tangents, pointer<void>(out), centred, s, threads);
}

void rotary_cpu(const lddyn::Batch& x, int64_t heads, int64_t h_stride, uintptr_t cos,
                uintptr_t sin, uintptr_t out, bool transpose, const lddyn::Sizes& s, int threads) {
  lddyn::rotary_cpu(x, heads, h_stride, pointer<void>(cos), pointer<void>(sin), pointer<void>(out),
                    transpose, s, threads);
}

#ifdef LDDYN_CUDA
lddyn::Gram gram(uintptr_t similarity, uintptr_t grads_o, uintptr_t grads_u, uintptr_t lengths_o,
                 uintptr_t lengths_u, uintptr_t reach_u, uintptr_t pushed, uintptr_t partial,
                 uintptr_t out, int64_t s, int64_t t, int64_t d_out, int64_t m, int64_t n,
                 int64_t pitch_s, int64_t pitch, int64_t splits, int dtype) {
  return {pointer<const void>(similarity),
          pointer<const void>(grads_o),
          pointer<const void>(grads_u),
          pointer<const int64_t>(lengths_o),
          pointer<const int64_t>(lengths_u),
          pointer<const int64_t>(reach_u),
          pointer<void>(pushed),
          pointer<float>(partial),
          pointer<float>(out),
          s,
          t,
          d_out,
          m,
          n,
          pitch_s,
          pitch,
          splits,
          static_cast<lddyn::Dtype>(dtype)};
}

lddyn::Sketch sketch(uintptr_t activations, uintptr_t grads, uintptr_t projected, uintptr_t pushed,
                     uintptr_t out, int64_t c, int64_t t, int64_t d_in, int64_t d_out,
                     int64_t size_out, int64_t size_in, int64_t repeats, int64_t key_out,
                     int64_t key_in, float scale, int dtype) {
  return {pointer<const void>(activations),
          pointer<const void>(grads),
          pointer<float>(projected),
          pointer<float>(pushed),
          pointer<float>(out),
          c,
          t,
          d_in,
          d_out,
          size_out,
          size_in,
          repeats,
          key_out,
          key_in,
          scale,
          static_cast<lddyn::Dtype>(dtype)};
}
#endif

void gram_cpu(uintptr_t similarity, uintptr_t grads_o, uintptr_t grads_u, uintptr_t lengths_o,
              uintptr_t lengths_u, uintptr_t out, int64_t s, int64_t t, int64_t d, int64_t m,
              int64_t n, int threads) {
  lddyn::gram_cpu({pointer<const float>(similarity), pointer<const float>(grads_o),
                   pointer<const float>(grads_u), pointer<const int64_t>(lengths_o),
                   pointer<const int64_t>(lengths_u), pointer<float>(out), s, t, d, m, n},
                  threads);
}

// (address, stride of c, of h, of t) of a batch of heads.
using HeadsTuple = std::tuple<uintptr_t, int64_t, int64_t, int64_t>;

template <typename T>
lddyn::Heads<T> heads(const HeadsTuple& x) {
  return {pointer<T>(std::get<0>(x)), std::get<1>(x), std::get<2>(x), std::get<3>(x)};
}

// shared: the addresses of `Attention` in order; batches: its Heads; sizes: its sizes.
lddyn::Attention attention(const std::array<uintptr_t, 8>& shared,
                           const std::array<HeadsTuple, 6>& batches,
                           const std::array<int64_t, 8>& sizes) {
  const auto& x = shared;
  const auto& n = sizes;
  return {pointer<const float>(x[0]),
          pointer<const float>(x[1]),
          pointer<const float>(x[2]),
          pointer<const float>(x[3]),
          pointer<const float>(x[4]),
          pointer<const float>(x[5]),
          pointer<const int64_t>(x[6]),
          pointer<const int64_t>(x[7]),
          heads<const float>(batches[0]),
          heads<const float>(batches[1]),
          heads<const float>(batches[2]),
          heads<float>(batches[3]),
          heads<float>(batches[4]),
          heads<float>(batches[5]),
          n[0],
          n[1],
          n[2],
          n[3],
          n[4],
          n[5],
          n[6],
          n[7]};
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled ops of lddyn: raw pointers, sizes, strides; checked by lddyn.ops.";
  // Compute capabilities of the CUDA kernels, "80 90 100"; empty without CUDA.
  m.attr("cuda_archs") = LDDYN_CUDA_ARCHS;
  py::class_<lddyn::Residual>(m, "Residual").def(py::init(&residual));
  m.def("residual_cpu", &lddyn::residual_cpu, py::call_guard<py::gil_scoped_release>());
  py::class_<lddyn::ResidualRows>(m, "ResidualRows").def(py::init(&residual_rows));
  py::class_<lddyn::Tile>(m, "Tile").def(py::init(&tile));
  m.def("residual_gram_peaks_cpu", &lddyn::residual_gram_peaks_cpu,
        py::call_guard<py::gil_scoped_release>());
  m.def("residual_gram_fill_cpu", &lddyn::residual_gram_fill_cpu,
        py::call_guard<py::gil_scoped_release>());
  py::class_<lddyn::Batch>(m, "Batch").def(py::init(&batch));
  py::class_<lddyn::Sizes>(m, "Sizes").def(py::init(&sizes));
  using release = py::call_guard<py::gil_scoped_release>;
  m.def("gram_cpu", &gram_cpu, release());
  py::class_<lddyn::Attention>(m, "Attention").def(py::init(&attention));
  m.def("attention_pullback_cpu", &lddyn::attention_pullback_cpu, release());
  m.def("attention_pushforward_cpu", &lddyn::attention_pushforward_cpu, release());
  m.def("gated_pullback_cpu", &gated_pullback_cpu, release());
  m.def("gated_pushforward_cpu", &gated_pushforward_cpu, release());
  m.def("norm_pullback_cpu", &norm_pullback_cpu, release());
  m.def("norm_pushforward_cpu", &norm_pushforward_cpu, release());
  m.def("rotary_cpu", &rotary_cpu, release());
#ifdef LDDYN_CUDA
  py::class_<lddyn::Gram>(m, "Gram").def(py::init(&gram));
  py::class_<lddyn::Sketch>(m, "Sketch").def(py::init(&sketch));
  m.def("sketch_cuda", &lddyn::sketch_cuda, py::call_guard<py::gil_scoped_release>());
  m.def("residual_cuda", &lddyn::residual_cuda, py::call_guard<py::gil_scoped_release>());
  m.def("gram_cuda", &lddyn::gram_cuda, py::call_guard<py::gil_scoped_release>());
#endif
}
