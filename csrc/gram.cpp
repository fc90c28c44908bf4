// Inner products of one linear layer's token gradients on CPU, given S = a_u a_o^T: computes a tile
// of pushed gradients E and takes its inner products while the tile is in cache.
//
//   E[m, t] = sum_s S[t, s] g_o[m, s],   G[m, l] = sum_t <E[m, t], g_u[l, t]>
//
// A task is a tile of kTokens tokens and kRows cotangents m. Its E (kRows, kTokens, kColumns) stays
// in the second-level cache while all cotangents l are multiplied with it: E is never written to
// memory, and g_u is read once per kRows cotangents. Two calls of BLAS would do neither. Every task
// has its own partial sums, added in a fixed order, so that the bits do not depend on `threads`.
#include <omp.h>

#include <algorithm>
#include <vector>

#include "tile.h"

namespace lddyn {
namespace {

constexpr int64_t kRows = 32, kTokens = 16, kColumns = 192, kMostPaired = 6;
constexpr int64_t kPartial = 1 << 22;  // partial sums, in elements: 16 MiB, or one set of them

// out[r, c] += sum over `tokens` runs of `columns` of e[r] g[c], for R rows m and C cotangents l.
template <typename V, int R, int C>
LDDYN_INLINE void pair_tile(const float* e, int64_t e_stride, const float* const* g,
                            int64_t g_stride, int64_t tokens, int64_t columns, float* out,
                            int64_t out_stride, const int64_t* at) {
  constexpr int64_t kW = kWidth<V>;
  V sum[R][C] = {};
  // The columns after the last whole vector, padded with zeros, so that every R takes the same
  // instruction per product. The compiler may or may not fuse a scalar loop's multiply and add, and
  // then a row's bits would depend on the number of rows in its tile.
  const int64_t whole = columns / kW * kW;
  const size_t rest = (columns - whole) * sizeof(float);
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t j = 0; j < whole; j += kW) {
      V right[C];
      for (int c = 0; c < C; ++c) load(&right[c], g[c] + t * g_stride + j);
      for (int r = 0; r < R; ++r) {
        V left;
        load(&left, e + r * e_stride + t * columns + j);
        for (int c = 0; c < C; ++c) sum[r][c] += left * right[c];
      }
    }
    if (rest == 0) continue;
    V right[C] = {};
    for (int c = 0; c < C; ++c) std::memcpy(&right[c], g[c] + t * g_stride + whole, rest);
    for (int r = 0; r < R; ++r) {
      V left = {};
      std::memcpy(&left, e + r * e_stride + t * columns + whole, rest);
      for (int c = 0; c < C; ++c) sum[r][c] += left * right[c];
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < C; ++c) {
      float total = 0.0f;
      for (int i = 0; i < kW; ++i) total += sum[r][c][i];
      out[r * out_stride + at[c]] += total;
    }
  }
}

template <typename V, int C>
LDDYN_INLINE void pair_rows(int64_t rows, const float* e, int64_t e_stride, const float* const* g,
                            int64_t g_stride, int64_t tokens, int64_t columns, float* out,
                            int64_t out_stride, const int64_t* at) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) {
    pair_tile<V, 4, C>(e + r * e_stride, e_stride, g, g_stride, tokens, columns,
                       out + r * out_stride, out_stride, at);
  }
  for (; r < rows; ++r) {
    pair_tile<V, 1, C>(e + r * e_stride, e_stride, g, g_stride, tokens, columns,
                       out + r * out_stride, out_stride, at);
  }
}

// One task: columns [j0, j0 + columns), tokens [t0, t1), cotangents [m0, m1); out (m1 - m0, n) is
// added to. Workspaces: e (kRows, kTokens, kColumns), and ragged (kPaired, kTokens, kColumns).
template <typename V, int kPushed, int kPaired>
LDDYN_INLINE void task(const GramCpu& p, int64_t j0, int64_t columns, int64_t t0, int64_t t1,
                       int64_t m0, int64_t m1, float* e, float* ragged, float* out) {
  // Cotangents l that are not zero in the tile, and the number of their tokens in it.
  std::vector<int64_t> at, reach;
  for (int64_t l = 0; l < p.n; ++l) {
    const int64_t stop = p.lengths_u ? std::min(p.lengths_u[l], t1) : t1;
    if (stop > t0) at.push_back(l), reach.push_back(stop - t0);
  }
  if (at.empty()) return;
  const int64_t tokens = *std::max_element(reach.begin(), reach.end()), e_stride = tokens * columns;
  for (int64_t m = m0; m < m1; ++m) {
    const int64_t depth = p.lengths_o ? std::max<int64_t>(0, std::min(p.lengths_o[m], p.s)) : p.s;
    const float* d = p.grads_o + m * p.s * p.d + j0;
    float* row = e + (m - m0) * e_stride;
    int64_t t = 0;
    for (; t + kPushed <= tokens; t += kPushed) {
      multiply_rows<V, kPushed, 3, false>({p.similarity + (t0 + t) * p.s, p.s, 1}, {d, p.d}, depth,
                                          columns, {row + t * columns, columns});
    }
    for (; t < tokens; ++t) {
      multiply_rows<V, 1, 3, false>({p.similarity + (t0 + t) * p.s, p.s, 1}, {d, p.d}, depth,
                                    columns, {row + t * columns, columns});
    }
  }
  const int64_t count = static_cast<int64_t>(at.size());
  for (int64_t i = 0; i < count;) {
    const int64_t size = i + kPaired <= count ? kPaired : 1;
    const auto [least, most] = std::minmax_element(&reach[i], &reach[i] + size);
    const float* g[kPaired];
    for (int64_t c = 0; c < size; ++c) {
      const float* rows = p.grads_u + (at[i + c] * p.t + t0) * p.d + j0;
      g[c] = *least == *most ? rows : ragged + c * kTokens * columns;
      if (*least == *most) continue;
      // Tokens at or beyond a length are not read: the group is copied, with zeros in their place.
      float* copy = ragged + c * kTokens * columns;
      for (int64_t t = 0; t < reach[i + c]; ++t) {
        std::copy(rows + t * p.d, rows + t * p.d + columns, copy + t * columns);
      }
      std::fill(copy + reach[i + c] * columns, copy + *most * columns, 0.0f);
    }
    const int64_t stride = *least == *most ? p.d : columns;
    if (size == kPaired) {
      pair_rows<V, kPaired>(m1 - m0, e, e_stride, g, stride, *most, columns, out, p.n, &at[i]);
    } else {
      pair_rows<V, 1>(m1 - m0, e, e_stride, g, stride, *most, columns, out, p.n, &at[i]);
    }
    i += size;
  }
}

using Task = void (*)(const GramCpu&, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, float*,
                      float*, float*);

// The tile's size follows from the number of registers: 16 of 32 bytes, or 32 of 64.
#define LDDYN_TASK(name, V, pushed, paired)                                                    \
  void name(const GramCpu& p, int64_t j0, int64_t columns, int64_t t0, int64_t t1, int64_t m0, \
            int64_t m1, float* e, float* ragged, float* out) {                                 \
    task<V, pushed, paired>(p, j0, columns, t0, t1, m0, m1, e, ragged, out);                   \
  }
LDDYN_TASK(task_any, Vec8, 4, 3)

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
__attribute__((target("arch=x86-64-v3"))) LDDYN_TASK(task_v3, Vec8, 4, 3)
    __attribute__((target("arch=x86-64-v4"))) LDDYN_TASK(task_v4, Vec16, 8, 6)

        Task choose_task() {
  __builtin_cpu_init();
  if (__builtin_cpu_supports("x86-64-v4")) return task_v4;
  if (__builtin_cpu_supports("x86-64-v3")) return task_v3;
  return task_any;
}
#else
Task choose_task() { return task_any; }
#endif

}  // namespace

void gram_cpu(const GramCpu& p, int threads) {
  static const Task run = choose_task();
  const int64_t tiles = (p.t + kTokens - 1) / kTokens, blocks = (p.m + kRows - 1) / kRows;
  // Tiles of a group add to the same sums, one after the other.
  const int64_t most = std::max<int64_t>(1, kPartial / std::max<int64_t>(1, p.m * p.n));
  const int64_t deep = std::max<int64_t>(1, (tiles + most - 1) / most),
                groups = (tiles + deep - 1) / deep;
  std::vector<float> partial(groups * p.m * p.n);
  const bool parallel = groups * blocks > 1 && p.m * p.n * p.t * p.d > 1 << 20;
  // Allocated outside of the parallel region, which an exception must not leave.
  const int64_t width = std::min(kColumns, p.d), size = (kRows + kMostPaired) * kTokens * width;
  std::vector<float> buffers(size * std::max(1, threads));
#pragma omp parallel num_threads(threads) if (parallel)
  {
    float* e = buffers.data() + size * omp_get_thread_num();
    float* ragged = e + kRows * kTokens * width;
    // Columns outermost: a slice of both sides' gradients stays in the last cache for all tasks.
    for (int64_t j0 = 0; j0 < p.d; j0 += kColumns) {
#pragma omp for schedule(dynamic)
      for (int64_t i = 0; i < groups * blocks; ++i) {
        const int64_t group = i / blocks, m0 = i % blocks * kRows;
        const int64_t end = std::min(p.t, (group + 1) * deep * kTokens);
        for (int64_t t0 = group * deep * kTokens; t0 < end; t0 += kTokens) {
          run(p, j0, std::min(kColumns, p.d - j0), t0, std::min(p.t, t0 + kTokens), m0,
              std::min(p.m, m0 + kRows), e, ragged, partial.data() + (group * p.m + m0) * p.n);
        }
      }
    }
  }
  for (int64_t i = 0; i < p.m * p.n; ++i) {
    double total = 0;
    for (int64_t g = 0; g < groups; ++g) total += partial[g * p.m * p.n + i];
    p.out[i] = static_cast<float>(total);
  }
}

}  // namespace lddyn
