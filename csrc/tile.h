// Small dense products in registers, for C++ ops whose operands are in cache already.
#pragma once

#include <cstdint>
#include <cstring>

#include "element.h"

namespace lddyn {

typedef float Vec4 __attribute__((vector_size(16)));
typedef float Vec8 __attribute__((vector_size(32)));
typedef float Vec16 __attribute__((vector_size(64)));

// Unaligned; by pointer, since a vector in a signature would be part of the ABI.
template <typename V>
LDDYN_INLINE void load(V* x, const float* p) {
  std::memcpy(x, p, sizeof *x);
}

template <typename V>
constexpr int64_t kWidth = sizeof(V) / sizeof(float);

// The left operand of a product: element (r, k) at data[r * row + k * step].
struct Left {
  const float* data;
  int64_t row, step;
};
// Rows of contiguous columns.
struct Right {
  const float* data;
  int64_t row;
};
struct Into {
  float* data;
  int64_t row;
};

// out[r, 0 : C vectors] = (kAdd: +=) sum over k < depth of left[r, k] right[k, :], for R rows.
template <typename V, int R, int C, bool kAdd>
LDDYN_INLINE void multiply_tile(const Left& left, const Right& right, int64_t depth,
                                const Into& out) {
  V sum[R][C] = {};
  for (int64_t k = 0; k < depth; ++k) {
    V x[C];
    for (int c = 0; c < C; ++c) load(&x[c], right.data + k * right.row + c * kWidth<V>);
    for (int r = 0; r < R; ++r) {
      const float factor = left.data[r * left.row + k * left.step];
      for (int c = 0; c < C; ++c) sum[r][c] += factor * x[c];
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < C; ++c) {
      float* to = out.data + r * out.row + c * kWidth<V>;
      if (kAdd) {
        V before;
        load(&before, to);
        sum[r][c] += before;
      }
      std::memcpy(to, &sum[r][c], sizeof(V));
    }
  }
}

// The columns [*j, columns) in steps of C vectors.
template <typename V, int R, int C, bool kAdd>
LDDYN_INLINE void multiply_columns(const Left& left, const Right& right, int64_t depth,
                                   int64_t columns, const Into& out, int64_t* j) {
  for (; *j + C * kWidth<V> <= columns; *j += C * kWidth<V>) {
    multiply_tile<V, R, C, kAdd>(left, {right.data + *j, right.row}, depth,
                                 {out.data + *j, out.row});
  }
}

// R rows, all columns: C vectors at a time, then one, then narrower ones and scalars.
template <typename V, int R, int C, bool kAdd>
LDDYN_INLINE void multiply_rows(const Left& left, const Right& right, int64_t depth,
                                int64_t columns, const Into& out) {
  int64_t j = 0;
  multiply_columns<V, R, C, kAdd>(left, right, depth, columns, out, &j);
  multiply_columns<V, R, 1, kAdd>(left, right, depth, columns, out, &j);
  if (kWidth<V> > 8) multiply_columns<Vec8, R, 1, kAdd>(left, right, depth, columns, out, &j);
  multiply_columns<Vec4, R, 1, kAdd>(left, right, depth, columns, out, &j);
  for (; j < columns; ++j) {
    for (int r = 0; r < R; ++r) {
      float sum = kAdd ? out.data[r * out.row + j] : 0.0f;
      for (int64_t k = 0; k < depth; ++k) {
        sum += left.data[r * left.row + k * left.step] * right.data[k * right.row + j];
      }
      out.data[r * out.row + j] = sum;
    }
  }
}

}  // namespace lddyn
