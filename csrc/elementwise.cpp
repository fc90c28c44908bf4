// Gated activations, norms and rotary embeddings for many cotangents of one forward pass, on CPU.
//
// Every row of a batch is read once and written once. Positions are processed in blocks, so that
// the forward pass's rows of a block stay in L2 while all cotangents use them; longer blocks make
// longer streams, which the hardware prefetches better. A row's result depends on that row only,
// and sums over positions run in order: the bits depend neither on `threads` nor on the other rows
// of the batch.
#include <algorithm>

#include "element.h"

namespace lddyn {
namespace {

constexpr int64_t kShared = 256 << 10;    // bytes of a forward activation that stay in L2
constexpr int64_t kWorthwhile = 1 << 15;  // elements: a parallel region takes tens of microseconds

// Rows of a batch, and of the forward pass that its entries share, (t, n) contiguous.
template <typename T>
LDDYN_INLINE const T* at(const Batch& batch, int64_t c, int64_t t) {
  return static_cast<const T*>(batch.data) + c * batch.c_stride + t * batch.t_stride;
}
template <typename T>
LDDYN_INLINE const T* at(const void* shared, int64_t row, int64_t n) {
  return static_cast<const T*>(shared) + row * n;
}
template <typename T>
LDDYN_INLINE T* at(void* out, int64_t row, int64_t n) {
  return static_cast<T*>(out) + row * n;
}

struct GatedPullback {
  const void *value, *slope;
  Batch grads;
  void *gate, *up;

  template <typename T>
  LDDYN_INLINE void row(const Sizes& s, int64_t c, int64_t t) const {
    const T *a = at<T>(value, t, s.n), *b = at<T>(slope, t, s.n), *g = at<T>(grads, c, t);
    T *to_gate = at<T>(gate, c * s.t + t, s.n), *to_up = at<T>(up, c * s.t + t, s.n);
#pragma omp simd
    for (int64_t j = 0; j < s.n; ++j) {
      store(to_gate + j, widen(g[j]) * widen(b[j]));
      store(to_up + j, widen(g[j]) * widen(a[j]));
    }
  }
};

struct GatedPushforward {
  const void *value, *slope;
  Batch gate, up;
  void* out;

  template <typename T>
  LDDYN_INLINE void row(const Sizes& s, int64_t c, int64_t t) const {
    const T *a = at<T>(value, t, s.n), *b = at<T>(slope, t, s.n);
    const T *of_gate = at<T>(gate, c, t), *of_up = at<T>(up, c, t);
    T* to = at<T>(out, c * s.t + t, s.n);
#pragma omp simd
    for (int64_t j = 0; j < s.n; ++j) {
      store(to + j, widen(of_gate[j]) * widen(b[j]) + widen(of_up[j]) * widen(a[j]));
    }
  }
};

struct NormPullback {
  const void *normalized, *rstd, *weight;
  Batch grads;
  void *grad_input, *grad_weight;
  bool centred;

  template <typename T>
  LDDYN_INLINE void row(const Sizes& s, int64_t c, int64_t t) const {
    using A = decltype(widen(T{}));
    const T *x = at<T>(normalized, t, s.n), *w = static_cast<const T*>(weight);
    const T* g = at<T>(grads, c, t);
    T* to = at<T>(grad_input, c * s.t + t, s.n);
    A* to_weight = at<A>(grad_weight, c, s.n);
    A along = 0, mean = 0;
#pragma omp simd reduction(+ : along, mean)
    for (int64_t j = 0; j < s.n; ++j) {
      const A v = widen(g[j]) * widen(w[j]);
      along += v * widen(x[j]);
      mean += v;
    }
    along /= s.n, mean = centred ? mean / s.n : A(0);
    const A r = static_cast<const A*>(rstd)[t];
#pragma omp simd
    for (int64_t j = 0; j < s.n; ++j) {
      const A grad = widen(g[j]), hat = widen(x[j]);
      to_weight[j] += grad * hat;
      store(to + j, (grad * widen(w[j]) - hat * along - mean) * r);
    }
  }
};

struct NormPushforward {
  const void *normalized, *rstd, *weight;
  Batch tangents;
  void* out;
  bool centred;

  template <typename T>
  LDDYN_INLINE void row(const Sizes& s, int64_t c, int64_t t) const {
    using A = decltype(widen(T{}));
    const T *x = at<T>(normalized, t, s.n), *w = static_cast<const T*>(weight);
    const T* v = at<T>(tangents, c, t);
    T* to = at<T>(out, c * s.t + t, s.n);
    A along = 0, mean = 0;
#pragma omp simd reduction(+ : along, mean)
    for (int64_t j = 0; j < s.n; ++j) {
      along += widen(v[j]) * widen(x[j]);
      mean += widen(v[j]);
    }
    along /= s.n, mean = centred ? mean / s.n : A(0);
    const A r = static_cast<const A*>(rstd)[t];
#pragma omp simd
    for (int64_t j = 0; j < s.n; ++j) {
      store(to + j, (widen(v[j]) - widen(x[j]) * along - mean) * r * widen(w[j]));
    }
  }
};

struct Rotary {
  Batch x;
  int64_t heads, h_stride;
  const void *cos, *sin;
  void* out;
  bool transpose;

  template <typename T>
  LDDYN_INLINE void row(const Sizes& s, int64_t c, int64_t t) const {
    using A = decltype(widen(T{}));
    const int64_t half = s.n / 2;
    const T *turn = at<T>(cos, t, s.n), *lift = at<T>(sin, t, s.n);
    // y1 = x1 cos1 - x2 sin1, y2 = x2 cos2 + x1 sin2; the transpose exchanges the sines and signs.
    const T *first = transpose ? lift + half : lift, *second = transpose ? lift : lift + half;
    const A sign = transpose ? A(1) : A(-1);
    const T* from = at<T>(x, c, t);
    T* to = at<T>(out, (c * s.t + t) * heads, s.n);
    for (int64_t h = 0; h < heads; ++h, from += h_stride, to += s.n) {
#pragma omp simd
      for (int64_t j = 0; j < half; ++j) {
        const A left = widen(from[j]), right = widen(from[half + j]);
        store(to + j, left * widen(turn[j]) + sign * right * widen(first[j]));
        store(to + half + j, right * widen(turn[half + j]) - sign * left * widen(second[j]));
      }
    }
  }
};

// Positions [lo, hi) of cotangent c.
struct Span {
  int64_t c, lo, hi;
};

template <typename Op>
LDDYN_INLINE void each_row(const Op& op, const Sizes& s, const Span& span) {
  with_element(s.dtype, [&](auto element) __attribute__((always_inline)) {
    for (int64_t t = span.lo; t < span.hi; ++t) op.template row<decltype(element)>(s, span.c, t);
  });
}
LDDYN_SIMD void run(const GatedPullback& op, const Sizes& s, Span span) { each_row(op, s, span); }
LDDYN_SIMD void run(const GatedPushforward& op, const Sizes& s, Span span) {
  each_row(op, s, span);
}
LDDYN_SIMD void run(const NormPullback& op, const Sizes& s, Span span) { each_row(op, s, span); }
LDDYN_SIMD void run(const NormPushforward& op, const Sizes& s, Span span) { each_row(op, s, span); }
LDDYN_SIMD void run(const Rotary& op, const Sizes& s, Span span) { each_row(op, s, span); }

// Number of positions in a block.
int64_t block_size(const Sizes& s) {
  const int64_t bytes = s.n * (s.dtype == Dtype::kFloat64 ? 8 : 4);
  return std::max<int64_t>(1, kShared / std::max<int64_t>(1, bytes));
}

// Loops over blocks of positions, within them over cotangents; threads divide all iterations.
template <typename Op>
void over_rows(const Op& op, const Sizes& s, int threads) {
  const int64_t step = block_size(s), spans = (s.t + step - 1) / step * s.c;
#pragma omp parallel for num_threads(threads) schedule(static) if (s.c * s.t * s.n > kWorthwhile)
  for (int64_t i = 0; i < spans; ++i) {
    const int64_t lo = i / s.c * step;
    run(op, s, {i % s.c, lo, std::min(lo + step, s.t)});
  }
}

// The same for sums over positions: threads divide the cotangents, and each sums in order.
template <typename Op>
void over_cotangents(const Op& op, const Sizes& s, int threads) {
  const int64_t step = block_size(s), share = std::max<int64_t>(1, (s.c + threads - 1) / threads);
#pragma omp parallel for num_threads(threads) schedule(static) if (s.c * s.t * s.n > kWorthwhile)
  for (int64_t first = 0; first < s.c; first += share) {
    for (int64_t lo = 0; lo < s.t; lo += step) {
      for (int64_t c = first; c < std::min(first + share, s.c); ++c) {
        run(op, s, {c, lo, std::min(lo + step, s.t)});
      }
    }
  }
}

}  // namespace

void gated_pullback_cpu(const void* value, const void* slope, const Batch& grads, void* gate,
                        void* up, const Sizes& s, int threads) {
  over_rows(GatedPullback{value, slope, grads, gate, up}, s, threads);
}

void gated_pushforward_cpu(const void* value, const void* slope, const Batch& gate, const Batch& up,
                           void* out, const Sizes& s, int threads) {
  over_rows(GatedPushforward{value, slope, gate, up, out}, s, threads);
}

void norm_pullback_cpu(const void* normalized, const void* rstd, const void* weight,
                       const Batch& grads, void* grad_input, void* grad_weight, bool centred,
                       const Sizes& s, int threads) {
  const NormPullback op{normalized, rstd, weight, grads, grad_input, grad_weight, centred};
  over_cotangents(op, s, threads);
}

void norm_pushforward_cpu(const void* normalized, const void* rstd, const void* weight,
                          const Batch& tangents, void* out, bool centred, const Sizes& s,
                          int threads) {
  over_rows(NormPushforward{normalized, rstd, weight, tangents, out, centred}, s, threads);
}

void rotary_cpu(const Batch& x, int64_t heads, int64_t h_stride, const void* cos, const void* sin,
                void* out, bool transpose, const Sizes& s, int threads) {
  over_rows(Rotary{x, heads, h_stride, cos, sin, out, transpose}, s, threads);
}

}  // namespace lddyn
