// Every host function of lddyn._C. Nothing is checked here: lddyn/ops/ checks shapes and dtypes.
// All strides are in elements, not bytes. CUDA functions take a stream, never allocate and never
// synchronise; they return 0 or a cudaError_t.
#pragma once

#include <cstdint>

namespace lddyn {

// Element types, as numbered in lddyn/ops/dispatch.py.
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

// One side of `residual_gram` on CPU: logits and dtypes as above; peak (n), the largest logit but
// the target's; others (n), the sum of exp(z - peak) over all but the target, which filling adds
// to.
struct ResidualRows {
  const void* logits;
  const int64_t* targets;
  void* peak;
  double* others;
  int64_t n;
  int64_t vocabulary;
  int64_t row_stride;
  Dtype dtype;
};
// Columns [lo, hi) of exp(z - peak) with 0 for the targets: n rows, `row_stride` apart.
struct Tile {
  void* data;
  int64_t row_stride;
  int64_t lo;
  int64_t hi;
};
void residual_gram_peaks_cpu(const ResidualRows& p, int threads);
void residual_gram_fill_cpu(const ResidualRows& p, const Tile& tile, int threads);

// residual.cu: one block per row; not float64.
int residual_cuda(const Residual& p, uintptr_t stream);

// A batch (c, t, n) of cotangents or tangents; its rows of n are contiguous.
struct Batch {
  const void* data;
  int64_t c_stride;
  int64_t t_stride;
};
struct Sizes {
  int64_t c;
  int64_t t;
  int64_t n;
  Dtype dtype;
};

// elementwise.cpp. The forward pass's operands, (t, n) or (n), and the results, (c, t, n), are
// contiguous. rstd (t) and grad_weight (c, n), which is added to, are float64 for float64, else
// float32.
void gated_pullback_cpu(const void* value, const void* slope, const Batch& grads, void* gate,
                        void* up, const Sizes& s, int threads);
void gated_pushforward_cpu(const void* value, const void* slope, const Batch& gate, const Batch& up,
                           void* out, const Sizes& s, int threads);
void norm_pullback_cpu(const void* normalized, const void* rstd, const void* weight,
                       const Batch& grads, void* grad_input, void* grad_weight, bool centred,
                       const Sizes& s, int threads);
void norm_pushforward_cpu(const void* normalized, const void* rstd, const void* weight,
                          const Batch& tangents, void* out, bool centred, const Sizes& s,
                          int threads);
// x: (c, heads, t, n); out: (c, t, heads, n).
void rotary_cpu(const Batch& x, int64_t heads, int64_t h_stride, const void* cos, const void* sin,
                void* out, bool transpose, const Sizes& s, int threads);

// Operands of `gram`, contiguous but for `similarity`, a_u a_o^T (t, s) with rows pitch_s apart, a
// multiple of 8: grads_o (m, s, d_out), grads_u (n, t, d_out), lengths_o (m) and lengths_u (n),
// each null for none, and reach_u, null or the largest of lengths_u; result out (m, n) float32.
// Workspaces: pushed (m, t, pitch), pitch a multiple of 64, and partial (splits, m, n) float32.
// similarity and pushed are bfloat16 for bfloat16 operands, else float32.
struct Gram {
  const void* similarity;
  const void* grads_o;
  const void* grads_u;
  const int64_t* lengths_o;
  const int64_t* lengths_u;
  const int64_t* reach_u;
  void* pushed;
  float* partial;
  float* out;
  int64_t s;
  int64_t t;
  int64_t d_out;
  int64_t m;
  int64_t n;
  int64_t pitch_s;
  int64_t pitch;
  int64_t splits;
  Dtype dtype;
};

// gram.cu: push, pair and a sum over splits; not float64; no size may be 0, m and splits <= 65535.
int gram_cuda(const Gram& p, uintptr_t stream);

// Operands of `sketch`, contiguous: activations (t, d_in), grads (c, t, d_out), SplitMix64's seeds
// key_in and key_out; result out (c, repeats, size_out, size_in) float32, times scale. Workspaces,
// float32: projected (repeats * size_in, t) and pushed (c, repeats * size_out, t).
struct Sketch {
  const void* activations;
  const void* grads;
  float* projected;
  float* pushed;
  float* out;
  int64_t c;
  int64_t t;
  int64_t d_in;
  int64_t d_out;
  int64_t size_out;
  int64_t size_in;
  int64_t repeats;
  int64_t key_out;
  int64_t key_in;
  float scale;
  Dtype dtype;
};

// sketch.cu: project both sides, then pair; not float64; no size may be 0, and c <= 65535.
int sketch_cuda(const Sketch& p, uintptr_t stream);

// Operands of `gram` on CPU, all contiguous float32: similarity S (t, s), grads_o (m, s, d),
// grads_u (n, t, d), result out (m, n). lengths_o (m,) and lengths_u (n,) may be null: tokens at or
// beyond them are not read.
struct GramCpu {
  const float* similarity;
  const float* grads_o;
  const float* grads_u;
  const int64_t* lengths_o;
  const int64_t* lengths_u;
  float* out;
  int64_t s;
  int64_t t;
  int64_t d;
  int64_t m;
  int64_t n;
};

// gram.cpp: one tile of tokens per OpenMP task, `threads` at most.
void gram_cpu(const GramCpu& p, int threads);

// A batch (c, h, t, n) of heads; rows of n are contiguous.
template <typename T>
struct Heads {
  T* data;
  int64_t c, h, t;  // strides
};

// Operands of `attention_pullback` and `attention_pushforward` on CPU, float32, for a band of
// `rows` queries and the `keys` keys open to them. Shared, contiguous: probabilities P and weight
// scale cap' o P (heads, rows, keys), query (heads, rows, e), output P V (heads, rows, f), and
// transposed (groups, e or f, pitch) with pitch >= keys a multiple of 16: values for the pullback,
// keys for the pushforward. key (groups, keys, e) for the pullback; in its place value (groups,
// keys, f) for the pushforward. first, last (rows): keys [first[i], last[i]) are open to query i.
// Pullback: grads (c, heads, rows, f); to_query is set, to_key and to_value are added to.
// Pushforward: grads is the queries' tangent, to_query (c, heads, rows, f) the result, set.
struct Attention {
  const float* probabilities;
  const float* weight;
  const float* query;
  const float* key;
  const float* transposed;
  const float* out;
  const int64_t* first;
  const int64_t* last;
  Heads<const float> grads, tangent_key, tangent_value;
  Heads<float> to_query, to_key, to_value;
  int64_t c, heads, groups, rows, keys, pitch, e, f;
};

// attention.cpp: one batch entry and head of keys per OpenMP task, `threads` at most.
void attention_pullback_cpu(const Attention& p, int threads);
void attention_pushforward_cpu(const Attention& p, int threads);

}  // namespace lddyn
