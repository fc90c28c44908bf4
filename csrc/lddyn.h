// Every host function of lddyn._C. Pointers are trusted: lddyn/ops.py checks shapes and dtypes.
// All strides are in elements, not bytes. CUDA functions take a stream, never allocate and never
// synchronise; they return 0 or a cudaError_t.
#pragma once

#include <cstdint>

namespace lddyn {

// Element types, as numbered in lddyn/ops.py.
enum class Dtype : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kFloat64 = 3 };

// Operands of `residual`. logits: n rows of `vocabulary` contiguous columns. Results are float64
// for float64 logits, else float32: residual (n, vocabulary), logp, entropy, squared_norm (n),
// all contiguous; top (n, 2) int64.
struct Residual {
  const void* logits;
  const int64_t* targets;
  void* residual;
  void* logp;
  void* entropy;
  void* squared_norm;
  int64_t* top;
  int64_t n;
  int64_t vocabulary;
  int64_t row_stride;
  Dtype dtype;
};

// residual.cpp: one row per OpenMP task, `threads` at most.
void residual_cpu(const Residual& p, int threads);

}  // namespace lddyn
