// Attention's pullback and pushforward on CPU, for many cotangents (tangents) that share one
// forward pass. The caller has computed the probabilities.
//
//   pullback      M = W o (g V^T - <g, O>),      dQ = M K,   dK += M^T Q,   dV += P^T g
//   pushforward   M = W o (tQ K^T + Q tK^T),     O' = M V - rowsum(M) O + P tV
//
// W = scale cap' o P. One task is one batch entry and one head of keys. It takes tiles of kQueries
// queries and kKeys keys, so that M stays in the first-level cache while all products use it; four
// calls of BLAS would write M to memory and read it back. Keys that the mask closes to a block of
// eight queries are skipped, and so are rows after the last one that is not zero: under a causal
// mask this halves the work. Each entry is summed in a fixed order, which depends neither on
// `threads` nor on the batch.
#include <omp.h>

#include <algorithm>
#include <vector>

#include "tile.h"

namespace lddyn {
namespace {

constexpr int64_t kQueries = 64, kKeys = 256, kBlock = 8;

struct Range {
  int64_t lo, hi;
};

// Keys open to a block of queries [i0, i1), clipped to [keys.lo, keys.hi); may be empty.
LDDYN_INLINE Range seen(const Attention& p, int64_t i0, int64_t i1, const Range& keys) {
  Range range{keys.hi, keys.lo};
  for (int64_t i = i0; i < i1; ++i) {
    range.lo = std::min(range.lo, p.first[i]);
    range.hi = std::max(range.hi, p.last[i]);
  }
  return {std::max(range.lo, keys.lo), std::min(range.hi, keys.hi)};
}

// One past the last row of (rows, n) that has an entry other than zero.
LDDYN_INLINE int64_t live_rows(const float* x, int64_t stride, int64_t rows, int64_t n) {
  for (; rows > 0; --rows) {
    const float* row = x + (rows - 1) * stride;
    uint32_t bits = 0;
    for (int64_t j = 0; j < n; ++j) bits |= to_bits(row[j]) & 0x7fffffffu;
    if (bits) break;
  }
  return rows;
}

// A tile: queries [i0, i1) of the band, keys [keys.lo, keys.hi); M has kKeys columns.
struct Block {
  int64_t i0, i1;
  Range keys;
  float* m;
};

// Calls body(i, j, range) for each block of queries [i, j) and the range of keys open to it.
template <typename Body>
LDDYN_INLINE void each_block(const Attention& p, const Block& tile, const Body& body) {
  for (int64_t i = tile.i0; i < tile.i1; i += kBlock) {
    const int64_t j = std::min(i + kBlock, tile.i1);
    body(i, j, seen(p, i, j, tile.keys));
  }
}

// out (rows of left, columns) = left right, in blocks of R rows, then single rows.
template <typename V, int R, int C, bool kAdd>
LDDYN_INLINE void multiply(Left left, const Right& right, int64_t rows, int64_t depth,
                           int64_t columns, Into out) {
  for (; rows >= R; rows -= R, left.data += R * left.row, out.data += R * out.row) {
    multiply_rows<V, R, C, kAdd>(left, right, depth, columns, out);
  }
  for (; rows > 0; --rows, left.data += left.row, out.data += out.row) {
    multiply_rows<V, 1, C, kAdd>(left, right, depth, columns, out);
  }
}

// M[i, :] = left[i, :] right (depth, pitch) at the keys open to i's block, zero at the others.
template <typename V, int R, int C, bool kAdd>
LDDYN_INLINE void scores(const Attention& p, const Block& tile, const float* left, int64_t left_row,
                         const float* right, int64_t depth) {
  each_block(p, tile, [&](int64_t i, int64_t j, const Range& range) __attribute__((always_inline)) {
    float* m = tile.m + (i - tile.i0) * kKeys;
    const int64_t lo = range.lo / 16 * 16, hi = std::max(lo, (range.hi + 15) / 16 * 16);
    if (range.lo < range.hi) {
      multiply<V, R, C, kAdd>({left + (i - tile.i0) * left_row, left_row, 1}, {right + lo, p.pitch},
                              j - i, depth, hi - lo, {m + lo - tile.keys.lo, kKeys});
    }
    if (kAdd) return;
    const bool none = range.lo >= range.hi;
    for (int64_t r = 0; r < j - i; ++r) {
      float* row = m + r * kKeys;
      std::fill(row, row + (none ? kKeys : range.lo - tile.keys.lo), 0.0f);
      if (!none) std::fill(row + range.hi - tile.keys.lo, row + kKeys, 0.0f);
    }
  });
}

// Queries [lo, hi) of the tile to which some key of [j0, j1) is open, relative to the tile.
LDDYN_INLINE Range looking(const Attention& p, const Block& tile, int64_t j0, int64_t j1) {
  Range range{tile.i1, tile.i0};
  for (int64_t i = tile.i0; i < tile.i1; ++i) {
    if (p.first[i] < j1 && p.last[i] > j0) {
      range.lo = std::min(range.lo, i);
      range.hi = i + 1;
    }
  }
  return {range.lo - tile.i0, range.hi - tile.i0};
}

template <typename V, int R, int C>
LDDYN_INLINE void pull(const Attention& p, int64_t c, int64_t g, float* buffer) {
  const int64_t share = p.heads / p.groups;
  for (int64_t h = g * share; h < (g + 1) * share; ++h) {
    for (int64_t i0 = 0; i0 < p.rows; i0 += kQueries) {
      const int64_t count = std::min(kQueries, p.rows - i0);
      const float* grads = p.grads.data + c * p.grads.c + h * p.grads.h + i0 * p.grads.t;
      float* to_query = p.to_query.data + c * p.to_query.c + h * p.to_query.h + i0 * p.to_query.t;
      for (int64_t i = 0; i < count; ++i) {
        std::fill(to_query + i * p.to_query.t, to_query + i * p.to_query.t + p.e, 0.0f);
      }
      const int64_t live = live_rows(grads, p.grads.t, count, p.f);
      const float* out = p.out + (h * p.rows + i0) * p.f;
      float inner[kQueries];
      for (int64_t i = 0; i < live; ++i) {
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t j = 0; j < p.f; ++j) sum += grads[i * p.grads.t + j] * out[i * p.f + j];
        inner[i] = sum;
      }
      const Range all = live ? seen(p, i0, i0 + live, {0, p.keys}) : Range{0, 0};
      for (int64_t k0 = all.lo / 16 * 16; k0 < all.hi; k0 += kKeys) {
        const Block tile{i0, i0 + live, {k0, std::min(k0 + kKeys, p.keys)}, buffer};
        const float* weight = p.weight + (h * p.rows + i0) * p.keys + k0;
        const float* shares = p.probabilities + (h * p.rows + i0) * p.keys + k0;
        const float* key = p.key + (g * p.keys + k0) * p.e;
        scores<V, R, C, false>(p, tile, grads, p.grads.t, p.transposed + g * p.f * p.pitch, p.f);
        each_block(
            p, tile, [&](int64_t i, int64_t j, const Range& range) __attribute__((always_inline)) {
              const int64_t lo = range.lo - k0, n = std::max<int64_t>(0, range.hi - range.lo);
              for (int64_t r = i - i0; r < j - i0; ++r) {
                float* m = tile.m + r * kKeys + lo;
                const float* w = weight + r * p.keys + lo;
                const float mean = inner[r];
#pragma omp simd
                for (int64_t k = 0; k < n; ++k) m[k] = (m[k] - mean) * w[k];
              }
              multiply<V, R, C, true>({tile.m + (i - i0) * kKeys + lo, kKeys, 1},
                                      {key + lo * p.e, p.e}, j - i, n, p.e,
                                      {to_query + (i - i0) * p.to_query.t, p.to_query.t});
            });
        float* to_key = p.to_key.data + c * p.to_key.c + g * p.to_key.h;
        float* to_value = p.to_value.data + c * p.to_value.c + g * p.to_value.h;
        for (int64_t j = tile.keys.lo; j < tile.keys.hi; j += kBlock) {
          const int64_t stop = std::min(j + kBlock, tile.keys.hi);
          const Range range = looking(p, tile, j, stop);
          const int64_t depth = range.hi - range.lo;
          if (depth <= 0) continue;
          multiply<V, R, C, true>({tile.m + range.lo * kKeys + j - k0, 1, kKeys},
                                  {p.query + (h * p.rows + i0 + range.lo) * p.e, p.e}, stop - j,
                                  depth, p.e, {to_key + j * p.to_key.t, p.to_key.t});
          multiply<V, R, C, true>({shares + range.lo * p.keys + j - k0, 1, p.keys},
                                  {grads + range.lo * p.grads.t, p.grads.t}, stop - j, depth, p.f,
                                  {to_value + j * p.to_value.t, p.to_value.t});
        }
      }
    }
  }
}

template <typename V, int R, int C>
LDDYN_INLINE void push(const Attention& p, int64_t c, int64_t g, float* buffer) {
  const int64_t share = p.heads / p.groups;
  const float* tangent_key = p.tangent_key.data + c * p.tangent_key.c + g * p.tangent_key.h;
  const float* tangent_value = p.tangent_value.data + c * p.tangent_value.c + g * p.tangent_value.h;
  float* turned = buffer + kQueries * kKeys;  // tK^T (e, pitch), zero beyond the last key
  for (int64_t k = 0; k < p.e; ++k) {
    float* row = turned + k * p.pitch;
    for (int64_t j = 0; j < p.keys; ++j) row[j] = tangent_key[j * p.tangent_key.t + k];
    std::fill(row + p.keys, row + p.pitch, 0.0f);
  }
  for (int64_t h = g * share; h < (g + 1) * share; ++h) {
    for (int64_t i0 = 0; i0 < p.rows; i0 += kQueries) {
      const int64_t count = std::min(kQueries, p.rows - i0);
      const float* tangent = p.grads.data + c * p.grads.c + h * p.grads.h + i0 * p.grads.t;
      const float* query = p.query + (h * p.rows + i0) * p.e;
      float* to = p.to_query.data + c * p.to_query.c + h * p.to_query.h + i0 * p.to_query.t;
      float sums[kQueries] = {};
      for (int64_t i = 0; i < count; ++i) {
        std::fill(to + i * p.to_query.t, to + i * p.to_query.t + p.f, 0.0f);
      }
      const Range all = seen(p, i0, i0 + count, {0, p.keys});
      for (int64_t k0 = all.lo / 16 * 16; k0 < all.hi; k0 += kKeys) {
        const Block tile{i0, i0 + count, {k0, std::min(k0 + kKeys, p.keys)}, buffer};
        const float* weight = p.weight + (h * p.rows + i0) * p.keys + k0;
        const float* shares = p.probabilities + (h * p.rows + i0) * p.keys + k0;
        scores<V, R, C, false>(p, tile, tangent, p.grads.t, p.transposed + g * p.e * p.pitch, p.e);
        scores<V, R, C, true>(p, tile, query, p.e, turned, p.e);
        each_block(
            p, tile, [&](int64_t i, int64_t j, const Range& range) __attribute__((always_inline)) {
              const int64_t lo = range.lo - k0, n = std::max<int64_t>(0, range.hi - range.lo);
              for (int64_t r = i - i0; r < j - i0; ++r) {
                float* m = tile.m + r * kKeys + lo;
                const float* w = weight + r * p.keys + lo;
                float sum = 0;
#pragma omp simd reduction(+ : sum)
                for (int64_t k = 0; k < n; ++k) {
                  m[k] *= w[k];
                  sum += m[k];
                }
                sums[r] += sum;
              }
              const Into into{to + (i - i0) * p.to_query.t, p.to_query.t};
              multiply<V, R, C, true>({tile.m + (i - i0) * kKeys + lo, kKeys, 1},
                                      {p.key + (g * p.keys + range.lo) * p.f, p.f}, j - i, n, p.f,
                                      into);
              multiply<V, R, C, true>(
                  {shares + (i - i0) * p.keys + lo, p.keys, 1},
                  {tangent_value + range.lo * p.tangent_value.t, p.tangent_value.t}, j - i, n, p.f,
                  into);
            });
      }
      const float* out = p.out + (h * p.rows + i0) * p.f;
      for (int64_t i = 0; i < count; ++i) {
#pragma omp simd
        for (int64_t j = 0; j < p.f; ++j) to[i * p.to_query.t + j] -= sums[i] * out[i * p.f + j];
      }
    }
  }
}

using Task = void (*)(const Attention&, int64_t, int64_t, float*);

void pull_any(const Attention& p, int64_t c, int64_t g, float* m) { pull<Vec8, 4, 2>(p, c, g, m); }
void push_any(const Attention& p, int64_t c, int64_t g, float* m) { push<Vec8, 4, 2>(p, c, g, m); }

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
// The tile's size follows from the number of registers: 16 of 32 bytes, or 32 of 64.
#define LDDYN_TASKS(level, V, R, C)                                                               \
  __attribute__((target("arch=x86-64-" #level))) void pull_##level(const Attention& p, int64_t c, \
                                                                   int64_t g, float* m) {         \
    pull<V, R, C>(p, c, g, m);                                                                    \
  }                                                                                               \
  __attribute__((target("arch=x86-64-" #level))) void push_##level(const Attention& p, int64_t c, \
                                                                   int64_t g, float* m) {         \
    push<V, R, C>(p, c, g, m);                                                                    \
  }
LDDYN_TASKS(v3, Vec8, 4, 2)
LDDYN_TASKS(v4, Vec16, 8, 2)

Task choose(Task any, Task v3, Task v4) {
  __builtin_cpu_init();
  return __builtin_cpu_supports("x86-64-v4") ? v4 : __builtin_cpu_supports("x86-64-v3") ? v3 : any;
}
#else
#define pull_v3 pull_any
#define pull_v4 pull_any
#define push_v3 push_any
#define push_v4 push_any
Task choose(Task any, Task, Task) { return any; }
#endif

void each_task(const Attention& p, Task run, int64_t more, int threads) {
  const int64_t size = kQueries * kKeys + more, tasks = p.c * p.groups;
  // Allocated outside of the parallel region, which an exception must not leave.
  std::vector<float> buffers(size * std::max(1, threads));
  const bool parallel = tasks > 1 && tasks * p.rows * p.keys * (p.e + p.f) > 1 << 18;
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (parallel)
  for (int64_t i = 0; i < tasks; ++i) {
    run(p, i / p.groups, i % p.groups, buffers.data() + size * omp_get_thread_num());
  }
}

}  // namespace

void attention_pullback_cpu(const Attention& p, int threads) {
  static const Task run = choose(pull_any, pull_v3, pull_v4);
  each_task(p, run, 0, threads);
}

void attention_pushforward_cpu(const Attention& p, int threads) {
  static const Task run = choose(push_any, push_v3, push_v4);
  each_task(p, run, p.e * p.pitch, threads);
}

}  // namespace lddyn
