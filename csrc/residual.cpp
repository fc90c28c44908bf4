// Softmax residual e_y - pi of each row with its statistics, on CPU.
//
// Two passes over a row: (1) the two largest logits, (2) exp(z - z_top) into the output, with its
// sums; the output is then scaled in cache. The sums leave the top token out, so that
// partition = 1 + tail, and no digits cancel when pi_top -> 1. Sums are float over kChunk columns
// and double over chunks; the order is fixed, so the bits do not depend on `threads`.
#ifdef __linux__
#include <sys/mman.h>
#endif

#include <cmath>
#include <limits>

#include "element.h"

namespace lddyn {
namespace {

// Columns summed in float, and searched for the index of a maximum.
constexpr int64_t kChunk = 1024;

template <typename A>
constexpr A kLowest = sizeof(A) == 4 ? -87 : -746;  // exp is 0 below
// A NaN stays.
template <typename A>
LDDYN_INLINE A clamp(A x) {
  return x < kLowest<A> ? kLowest<A> : x;
}

LDDYN_INLINE double exponential(double x) { return std::exp(x); }
// exp(x) for x <= 0 within 2 ulp; 0 below the normal range. Branch-free, so that loops vectorise.
LDDYN_INLINE float exponential(float x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds
  const float clamped = clamp(x);
  const float shifted = clamped * 1.44269504f + kRound;
  const float whole = shifted - kRound;
  const float r = (clamped - whole * 0.693359375f) + whole * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const float scale = from_bits((to_bits(shifted) + 127u) << 23);
  return x < kLowest<float> ? 0.0f : p * scale;
}

template <typename T>
LDDYN_INLINE auto largest(const T* z, int64_t lo, int64_t hi) {
  using A = decltype(widen(*z));
  A best = -std::numeric_limits<A>::infinity();
#pragma omp simd reduction(max : best)
  for (int64_t v = lo; v < hi; ++v) {
    const A x = widen(z[v]);
    best = x > best ? x : best;
  }
  return best;
}

// First column in [lo, hi) that holds `value`; `none` if there is none (NaN alone).
template <typename T, typename A>
LDDYN_INLINE int64_t first_equal(const T* z, int64_t lo, int64_t hi, A value, int64_t none) {
  for (int64_t v = lo; v < hi; ++v) {
    if (widen(z[v]) == value) return v;
  }
  return none;
}

// Columns of the two largest logits, ties to the lower one. A pass over chunk maxima, then only the
// best two chunks are searched: the runner-up is in the best one, or it is the next one's maximum.
template <typename T>
LDDYN_INLINE void top_two(const T* z, int64_t vocabulary, int64_t* top) {
  using A = decltype(widen(*z));
  constexpr A kNone = -std::numeric_limits<A>::infinity();
  const auto end = [&](int64_t lo) { return lo + kChunk < vocabulary ? lo + kChunk : vocabulary; };
  A best = largest(z, 0, end(0)), next = kNone;
  int64_t at = 0, next_at = -1;
  for (int64_t lo = kChunk; lo < vocabulary; lo += kChunk) {
    const A peak = largest(z, lo, end(lo));
    if (peak > best) {
      next = best, next_at = at;
      best = peak, at = lo;
    } else if (next_at < 0 || peak > next) {
      next = peak, next_at = lo;
    }
  }
  const int64_t first = first_equal(z, at, end(at), best, at);
  const A left = largest(z, at, first), right = largest(z, first + 1, end(at));
  const A here = left > right ? left : right;
  const bool elsewhere = next_at >= 0 && (next > here || (next == here && next_at < at));
  int64_t second = first == 0 ? 1 : 0;  // all others are masked, and none is in this chunk
  if (elsewhere) {
    second = first_equal(z, next_at, end(next_at), next, second);
  } else if (left >= right && first > at) {
    second = first_equal(z, at, first, here, second);
  } else {
    second = first_equal(z, first + 1, end(at), here, second);
  }
  top[0] = first, top[1] = second;
}

template <typename A>
struct Sums {
  double tail = 0, moment = 0, squares = 0;  // sums of e, e * (z - peak), e * e
};

// out = exp(z - peak) for columns [lo, hi), and its sums.
template <typename T, typename A>
LDDYN_INLINE void exponentials(const T* z, A peak, int64_t lo, int64_t hi, A* out, Sums<A>* sums) {
  for (int64_t start = lo; start < hi; start += kChunk) {
    const int64_t stop = start + kChunk < hi ? start + kChunk : hi;
    A tail = 0, moment = 0, squares = 0;
#pragma omp simd reduction(+ : tail, moment, squares)
    for (int64_t v = start; v < stop; ++v) {
      const A d = widen(z[v]) - peak;
      const A e = exponential(d);
      out[v] = e;
      tail += e;
      moment += e * clamp(d);  // a masked token: not 0 * -inf
      squares += e * e;
    }
    sums->tail += tail, sums->moment += moment, sums->squares += squares;
  }
}

template <typename T, typename A>
LDDYN_INLINE void row(const Residual& p, int64_t n) {
  const T* z = static_cast<const T*>(p.logits) + n * p.row_stride;
  A* out = static_cast<A*>(p.residual) + n * p.vocabulary;
  const int64_t y = p.targets[n];
  int64_t* top = p.top + 2 * n;
  top_two(z, p.vocabulary, top);
  A peak = widen(z[top[0]]);
  if (!std::isfinite(peak)) peak = std::numeric_limits<A>::quiet_NaN();  // lddyn/ops reports it

  Sums<A> sums;
  exponentials(z, peak, 0, top[0], out, &sums);
  exponentials(z, peak, top[0] + 1, p.vocabulary, out, &sums);
  out[top[0]] = 1;

  const double partition = 1 + sums.tail, log_partition = std::log1p(sums.tail);
  const double others = y == top[0] ? sums.tail : 1 + (sums.tail - double(out[y]));
  static_cast<A*>(p.logp)[n] = A(double(widen(z[y])) - peak - log_partition);
  static_cast<A*>(p.entropy)[n] = A(log_partition - sums.moment / partition);
  static_cast<A*>(p.squared_norm)[n] =
      A((1 + (peak - peak) + sums.squares) / (partition * partition));
  const A scale = A(-1 / partition);
#pragma omp simd
  for (int64_t v = 0; v < p.vocabulary; ++v) out[v] *= scale;
  out[y] = A(others / partition);
}

// residual_gram: the largest logit but the target's, so that no other entry underflows when
// pi_y -> 1.
template <typename T>
LDDYN_INLINE void find_peak(const ResidualRows& p, int64_t n) {
  using A = decltype(widen(T{}));
  const T* z = static_cast<const T*>(p.logits) + n * p.row_stride;
  const int64_t y = p.targets[n];
  const A left = largest(z, 0, y), right = largest(z, y + 1, p.vocabulary), own = widen(z[y]);
  A peak = left > right ? left : right;
  if (peak == -std::numeric_limits<A>::infinity()) peak = own;  // all others are masked
  if (!std::isfinite(peak) || own > std::numeric_limits<A>::max()) {
    peak = std::numeric_limits<A>::quiet_NaN();  // lddyn/ops reports it
  }
  static_cast<A*>(p.peak)[n] = peak;
}

// residual_gram: columns [lo, hi) of exp(z - peak), 0 for the target, and their sum.
template <typename T>
LDDYN_INLINE void fill_row(const ResidualRows& p, const Tile& tile, int64_t n) {
  using A = decltype(widen(T{}));
  const T* z = static_cast<const T*>(p.logits) + n * p.row_stride + tile.lo;
  A* out = static_cast<A*>(tile.data) + n * tile.row_stride;
  const int64_t columns = tile.hi - tile.lo, y = p.targets[n] - tile.lo;
  const A peak = static_cast<const A*>(p.peak)[n];
  Sums<A> sums;
  if (y < 0 || y >= columns) {
    exponentials(z, peak, 0, columns, out, &sums);
  } else {
    exponentials(z, peak, 0, y, out, &sums);
    exponentials(z, peak, y + 1, columns, out, &sums);
    out[y] = 0;
  }
  p.others[n] += sums.tail;
}

LDDYN_SIMD void peak(const ResidualRows& p, int64_t n) {
  with_element(p.dtype, [&](auto element)
                            __attribute__((always_inline)) { find_peak<decltype(element)>(p, n); });
}

LDDYN_SIMD void fill(const ResidualRows& p, const Tile& tile, int64_t n) {
  with_element(p.dtype, [&](auto element) __attribute__((always_inline)) {
    fill_row<decltype(element)>(p, tile, n);
  });
}

LDDYN_SIMD void row_float32(const Residual& p, int64_t n) { row<float, float>(p, n); }
LDDYN_SIMD void row_bfloat16(const Residual& p, int64_t n) { row<BFloat16, float>(p, n); }
LDDYN_SIMD void row_float16(const Residual& p, int64_t n) { row<Float16, float>(p, n); }
LDDYN_SIMD void row_float64(const Residual& p, int64_t n) { row<double, double>(p, n); }

// Asks the system for large pages: first access to pages of 4 KiB takes longer than the op itself.
void prefer_large_pages(void* data, int64_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr intptr_t kPage = 1 << 21;
  const intptr_t begin = reinterpret_cast<intptr_t>(data), first = (begin + kPage - 1) & -kPage;
  const intptr_t last = (begin + bytes) & -kPage;
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // a hint
#endif
}

}  // namespace

void residual_cpu(const Residual& p, int threads) {
  const int64_t element = p.dtype == Dtype::kFloat64 ? 8 : 4;
  prefer_large_pages(p.residual, p.n * p.vocabulary * element);
  constexpr void (*kRows[])(const Residual&, int64_t) = {row_float32, row_bfloat16, row_float16,
                                                         row_float64};
  const auto compute = kRows[static_cast<int>(p.dtype)];
  // A parallel region takes tens of microseconds, more than a few thousand logits.
  const bool parallel = p.n > 1 && p.n * p.vocabulary > 1 << 15;
#pragma omp parallel for num_threads(threads) schedule(static) if (parallel)
  for (int64_t n = 0; n < p.n; ++n) compute(p, n);
}

void residual_gram_peaks_cpu(const ResidualRows& p, int threads) {
  const bool parallel = p.n > 1 && p.n * p.vocabulary > 1 << 15;
#pragma omp parallel for num_threads(threads) schedule(static) if (parallel)
  for (int64_t n = 0; n < p.n; ++n) peak(p, n);
}

void residual_gram_fill_cpu(const ResidualRows& p, const Tile& tile, int threads) {
  const bool parallel = p.n > 1 && p.n * (tile.hi - tile.lo) > 1 << 15;
#pragma omp parallel for num_threads(threads) schedule(static) if (parallel)
  for (int64_t n = 0; n < p.n; ++n) fill(p, tile, n);
}

}  // namespace lddyn
