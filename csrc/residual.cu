// Softmax residual e_y - pi of each row with its statistics, on CUDA: one block per row.
//
// Three passes over a row: the two largest logits, the sums of exp(z - z_top) without the top token
// (so that no digits cancel when pi_top -> 1), the result. The first reads from memory, the others
// mostly from the second-level cache. Sums are float in a fixed order: equal inputs, equal bits.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "lddyn.h"

namespace lddyn {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
static_assert(kThreads % 32 == 0 && kWarps <= 32, "one warp reduces the warps' results");

__device__ float widen(float x) { return x; }
__device__ float widen(__half x) { return __half2float(x); }
__device__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

// The two largest logits with their columns, ties to the lower column; -1 where there is none.
struct TopTwo {
  float peak = -INFINITY, next = -INFINITY;
  int64_t top = -1, runner = -1;

  __device__ static bool before(float x, int64_t x_at, float y, int64_t y_at) {
    return x_at >= 0 && (y_at < 0 || x > y || (x == y && x_at < y_at));
  }
  __device__ void insert(float x, int64_t at) {
    if (before(x, at, peak, top)) {
      next = peak, runner = top;
      peak = x, top = at;
    } else if (before(x, at, next, runner)) {
      next = x, runner = at;
    }
  }
};

struct Sums {
  float tail = 0, moment = 0, squares = 0;  // sums of e, e * (z - peak), e * e
};

// Value of another lane of the warp.
__device__ TopTwo from_lane(const TopTwo& x, int offset) {
  TopTwo y;
  y.peak = __shfl_down_sync(~0u, x.peak, offset), y.top = __shfl_down_sync(~0u, x.top, offset);
  y.next = __shfl_down_sync(~0u, x.next, offset),
  y.runner = __shfl_down_sync(~0u, x.runner, offset);
  return y;
}
__device__ Sums from_lane(const Sums& x, int offset) {
  Sums y;
  y.tail = __shfl_down_sync(~0u, x.tail, offset);
  y.moment = __shfl_down_sync(~0u, x.moment, offset);
  y.squares = __shfl_down_sync(~0u, x.squares, offset);
  return y;
}
__device__ void merge(TopTwo& x, const TopTwo& y) {
  x.insert(y.peak, y.top);
  x.insert(y.next, y.runner);
}
__device__ void merge(Sums& x, const Sums& y) {
  x.tail += y.tail, x.moment += y.moment, x.squares += y.squares;
}

// Merge over the block; every thread gets the result. `shared` holds one value per warp.
template <typename R>
__device__ R reduce(R x, R* shared) {
  for (int offset = 16; offset > 0; offset /= 2) merge(x, from_lane(x, offset));
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
  __syncthreads();
  if (threadIdx.x < 32) {
    x = threadIdx.x < kWarps ? shared[threadIdx.x] : R();
    for (int offset = 16; offset > 0; offset /= 2) merge(x, from_lane(x, offset));
    if (threadIdx.x == 0) shared[0] = x;
  }
  __syncthreads();
  return shared[0];
}

template <typename T>
__global__ void __launch_bounds__(kThreads) residual_kernel(Residual p) {
  __shared__ __align__(alignof(TopTwo)) unsigned char top_bytes[kWarps * sizeof(TopTwo)];
  __shared__ __align__(alignof(Sums)) unsigned char sums_bytes[kWarps * sizeof(Sums)];
  const int64_t n = blockIdx.x, vocabulary = p.vocabulary, y = p.targets[n];
  const T* z = static_cast<const T*>(p.logits) + n * p.row_stride;
  float* out = static_cast<float*>(p.residual) + n * vocabulary;

  TopTwo two;
  for (int64_t v = threadIdx.x; v < vocabulary; v += kThreads) two.insert(widen(z[v]), v);
  two = reduce(two, reinterpret_cast<TopTwo*>(top_bytes));
  const float peak = isinf(two.peak) ? NAN : two.peak;  // +inf, or nothing but -inf: a NaN row

  Sums sums;
  for (int64_t v = threadIdx.x; v < vocabulary; v += kThreads) {
    const float d = widen(z[v]) - peak, e = v == two.top ? 0.0f : expf(d);
    merge(sums, {e, e == 0.0f ? 0.0f : e * d, e * e});
  }
  sums = reduce(sums, reinterpret_cast<Sums*>(sums_bytes));

  const float partition = 1 + sums.tail;
  const float z_y = widen(z[y]) - peak;
  const float others = y == two.top ? sums.tail : 1 + (sums.tail - expf(z_y));
  if (threadIdx.x == 0) {
    const float log_partition = log1pf(sums.tail);
    static_cast<float*>(p.logp)[n] = z_y - log_partition;
    static_cast<float*>(p.entropy)[n] = log_partition - sums.moment / partition;
    static_cast<float*>(p.squared_norm)[n] =
        (1 + (peak - peak) + sums.squares) / (partition * partition);
    p.top[2 * n] = two.top, p.top[2 * n + 1] = two.runner;
  }
  for (int64_t v = threadIdx.x; v < vocabulary; v += kThreads) {
    const float e = v == two.top ? 1.0f : expf(widen(z[v]) - peak);
    out[v] = v == y ? others / partition : -e / partition;
  }
}

}  // namespace

int residual_cuda(const Residual& p, uintptr_t stream) {
  if (p.n == 0) return 0;
  const auto queue = reinterpret_cast<cudaStream_t>(stream);
  const auto blocks = static_cast<unsigned>(p.n);
  switch (p.dtype) {
    case Dtype::kFloat32:
      residual_kernel<float><<<blocks, kThreads, 0, queue>>>(p);
      break;
    case Dtype::kBFloat16:
      residual_kernel<__nv_bfloat16><<<blocks, kThreads, 0, queue>>>(p);
      break;
    case Dtype::kFloat16:
      residual_kernel<__half><<<blocks, kThreads, 0, queue>>>(p);
      break;
    case Dtype::kFloat64:
      return cudaErrorInvalidValue;
  }
  return cudaGetLastError();
}

}  // namespace lddyn
