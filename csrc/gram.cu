// Token Gram of one linear layer on CUDA: push, then pair. Three products of one tiled kernel,
//
//   S = a_u a_o^T (t, s)    E[m] = S g_o[m] (t, d_out)    G[m, l] = <E[m], g_u[l]> over (t, d_out),
//
// the last one split over its long inner dimension; the splits are summed in a fixed order (no
// atomics: equal inputs, equal bits). Products: bfloat16 tensor cores for bfloat16, TF32 tensor
// cores for float16 (which holds its 11 bits, and S may exceed its range), FMA for float32;
// accumulation is always in float32.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <mma.h>

#include <type_traits>

#include "lddyn.h"

namespace lddyn {
namespace {

namespace wmma = nvcuda::wmma;

__device__ float widen(float x) { return x; }
__device__ float widen(__half x) { return __half2float(x); }
__device__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

struct Fma {};  // the float32 way: no tensor core

// Inner-product unit: its tile in shared memory, and the depth of one instruction.
template <typename Unit>
struct Traits {
  static constexpr int kRows = 64, kColumns = 64, kDepth = 32;  // tile of C, and of k, in a block
  static constexpr int kThreads = 128;                          // four warps of 32 x 32
  static constexpr int kPad = 8;                                // fewer bank conflicts
  static constexpr int kStep = std::is_same_v<Unit, __nv_bfloat16> ? 16 : 8;
  using Element = std::conditional_t<std::is_same_v<Unit, __nv_bfloat16>, __nv_bfloat16, float>;
  static_assert(kDepth % kStep == 0);
  static_assert(kThreads == (kRows / 32) * (kColumns / 32) * 32);
};

// A matrix of a batch: element (row, column) of item b is data[b * batch + row * rows + ...].
template <typename T>
struct View {
  T* data;
  int64_t batch, rows, columns;

  __device__ T& at(int64_t b, int64_t row, int64_t column) const {
    return data[b * batch + row * rows + column * columns];
  }
};

// Copy a (height, width) tile at (row, column) into shared memory, zero outside of the matrix.
template <int kHeight, int kWidth, int kThreads, typename Element, typename T>
__device__ void load(const View<T>& x, int64_t b, int64_t row, int64_t column, int64_t row_end,
                     int64_t column_end, Element* tile, int stride) {
  for (int i = threadIdx.x; i < kHeight * kWidth; i += kThreads) {
    // Neighbouring threads follow the contiguous axis.
    const bool along_row = x.columns == 1;
    const int r = along_row ? i / kWidth : i % kHeight, c = along_row ? i % kWidth : i / kHeight;
    const bool inside = row + r < row_end && column + c < column_end;
    tile[r * stride + c] = Element(inside ? widen(x.at(b, row + r, column + c)) : 0.0f);
  }
}

// C[b] = A[b] B[b] for one 64 x 64 tile. blockIdx.x: tile; blockIdx.z: batch item, or split of k.
template <typename Unit, typename TA, typename TB, typename TC>
__global__ void __launch_bounds__(Traits<Unit>::kThreads)
    product_kernel(View<const TA> a, View<const TB> b, View<TC> c, int64_t rows, int64_t columns,
                   int64_t depth, int64_t depth_per_split) {
  using U = Traits<Unit>;
  using Element = typename U::Element;
  constexpr int kStrideA = U::kDepth + U::kPad, kStrideB = U::kColumns + U::kPad;
  constexpr int kStrideC = U::kColumns + U::kPad;
  __shared__ __align__(32) Element tile_a[U::kRows * kStrideA];
  __shared__ __align__(32) Element tile_b[U::kDepth * kStrideB];
  __shared__ __align__(32) float tile_c[U::kRows * kStrideC];

  const int64_t tiles = (columns + U::kColumns - 1) / U::kColumns;
  const int64_t row = blockIdx.x / tiles * U::kRows, column = blockIdx.x % tiles * U::kColumns;
  const bool split = depth_per_split > 0;
  const int64_t item = split ? 0 : blockIdx.z;
  const int64_t first = split ? blockIdx.z * depth_per_split : 0;
  const int64_t last = split ? min(first + depth_per_split, depth) : depth;

  const int warp = threadIdx.x / 32;
  const int warp_row = warp / 2 * 32, warp_column = warp % 2 * 32;
  if constexpr (std::is_same_v<Unit, Fma>) {
    // Thread (i, j) of 8 x 16 owns rows i + 8 r and columns j + 16 s of the tile.
    const int i = threadIdx.x / 16, j = threadIdx.x % 16;
    float sum[8][4] = {};
    for (int64_t k = first; k < last; k += U::kDepth) {
      load<U::kRows, U::kDepth, U::kThreads>(a, item, row, k, rows, last, tile_a, kStrideA);
      load<U::kDepth, U::kColumns, U::kThreads>(b, item, k, column, last, columns, tile_b,
                                                kStrideB);
      __syncthreads();
      for (int d = 0; d < U::kDepth; ++d) {
#pragma unroll
        for (int r = 0; r < 8; ++r) {
#pragma unroll
          for (int s = 0; s < 4; ++s) {
            sum[r][s] += tile_a[(i + 8 * r) * kStrideA + d] * tile_b[d * kStrideB + j + 16 * s];
          }
        }
      }
      __syncthreads();
    }
#pragma unroll
    for (int r = 0; r < 8; ++r) {
#pragma unroll
      for (int s = 0; s < 4; ++s) tile_c[(i + 8 * r) * kStrideC + j + 16 * s] = sum[r][s];
    }
  } else {
    wmma::fragment<wmma::accumulator, 16, 16, U::kStep, float> sum[2][2];
    for (auto& line : sum) {
      for (auto& fragment : line) wmma::fill_fragment(fragment, 0.0f);
    }
    for (int64_t k = first; k < last; k += U::kDepth) {
      load<U::kRows, U::kDepth, U::kThreads>(a, item, row, k, rows, last, tile_a, kStrideA);
      load<U::kDepth, U::kColumns, U::kThreads>(b, item, k, column, last, columns, tile_b,
                                                kStrideB);
      __syncthreads();
#pragma unroll
      for (int d = 0; d < U::kDepth; d += U::kStep) {
        wmma::fragment<wmma::matrix_a, 16, 16, U::kStep, Unit, wmma::row_major> left[2];
        wmma::fragment<wmma::matrix_b, 16, 16, U::kStep, Unit, wmma::row_major> right[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          wmma::load_matrix_sync(left[i], tile_a + (warp_row + 16 * i) * kStrideA + d, kStrideA);
          wmma::load_matrix_sync(right[i], tile_b + d * kStrideB + warp_column + 16 * i, kStrideB);
          if constexpr (std::is_same_v<Unit, wmma::precision::tf32>) {
            for (auto& x : left[i].x) x = wmma::__float_to_tf32(x);
            for (auto& x : right[i].x) x = wmma::__float_to_tf32(x);
          }
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
#pragma unroll
          for (int j = 0; j < 2; ++j) wmma::mma_sync(sum[i][j], left[i], right[j], sum[i][j]);
        }
      }
      __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        wmma::store_matrix_sync(tile_c + (warp_row + 16 * i) * kStrideC + warp_column + 16 * j,
                                sum[i][j], kStrideC, wmma::mem_row_major);
      }
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < U::kRows * U::kColumns; i += U::kThreads) {
    const int r = i / U::kColumns, s = i % U::kColumns;
    if (row + r < rows && column + s < columns) {
      c.at(blockIdx.z, row + r, column + s) = TC(tile_c[r * kStrideC + s]);
    }
  }
}

// out = sum of the partial results over splits, in order.
__global__ void sum_kernel(const float* partial, float* out, int64_t size, int64_t splits) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i >= size) return;
  float sum = 0;
  for (int64_t k = 0; k < splits; ++k) sum += partial[k * size + i];
  out[i] = sum;
}

template <typename Unit, typename TA, typename TB, typename TC>
int product(View<const TA> a, View<const TB> b, View<TC> c, int64_t rows, int64_t columns,
            int64_t depth, int64_t depth_per_split, int64_t items, cudaStream_t queue) {
  using U = Traits<Unit>;
  const int64_t tiles =
      ((rows + U::kRows - 1) / U::kRows) * ((columns + U::kColumns - 1) / U::kColumns);
  const dim3 grid(static_cast<unsigned>(tiles), 1, static_cast<unsigned>(items));
  product_kernel<Unit, TA, TB, TC>
      <<<grid, U::kThreads, 0, queue>>>(a, b, c, rows, columns, depth, depth_per_split);
  return cudaGetLastError();
}

// T: operands; W: workspaces; Unit: what multiplies.
template <typename T, typename W, typename Unit>
int run(const Gram& p, cudaStream_t queue) {
  const auto* a_o = static_cast<const T*>(p.activations_o);
  const auto* g_o = static_cast<const T*>(p.grads_o);
  const auto* a_u = static_cast<const T*>(p.activations_u);
  const auto* g_u = static_cast<const T*>(p.grads_u);
  auto* similarity = static_cast<W*>(p.similarity);
  auto* pushed = static_cast<W*>(p.pushed);
  const int64_t sheet = p.t * p.d_out;  // elements of one pushed cotangent
  const int64_t depth_per_split = (sheet + p.splits - 1) / p.splits;

  int status = product<Unit, T, T, W>({a_u, 0, p.d_in, 1}, {a_o, 0, 1, p.d_in},
                                      {similarity, 0, p.s, 1}, p.t, p.s, p.d_in, 0, 1, queue);
  if (status) return status;
  status = product<Unit, W, T, W>({similarity, 0, p.s, 1}, {g_o, p.s * p.d_out, p.d_out, 1},
                                  {pushed, sheet, p.d_out, 1}, p.t, p.d_out, p.s, 0, p.m, queue);
  if (status) return status;
  status = product<Unit, W, T, float>({pushed, 0, sheet, 1}, {g_u, 0, 1, sheet},
                                      {p.partial, p.m * p.n, p.n, 1}, p.m, p.n, sheet,
                                      depth_per_split, p.splits, queue);
  if (status) return status;
  constexpr int kThreads = 256;
  const auto blocks = static_cast<unsigned>((p.m * p.n + kThreads - 1) / kThreads);
  sum_kernel<<<blocks, kThreads, 0, queue>>>(p.partial, p.out, p.m * p.n, p.splits);
  return cudaGetLastError();
}

}  // namespace

int gram_cuda(const Gram& p, uintptr_t stream) {
  const auto queue = reinterpret_cast<cudaStream_t>(stream);
  switch (p.dtype) {
    case Dtype::kFloat32:
      return run<float, float, Fma>(p, queue);
    case Dtype::kBFloat16:
      return run<__nv_bfloat16, __nv_bfloat16, __nv_bfloat16>(p, queue);
    case Dtype::kFloat16:
      return run<__half, float, wmma::precision::tf32>(p, queue);
    case Dtype::kFloat64:
      break;
  }
  return cudaErrorInvalidValue;
}

}  // namespace lddyn
