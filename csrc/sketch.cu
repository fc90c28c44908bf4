// Two-sided random projections of per-token weight gradients on CUDA: project,
// then pair.
//
//   Q = S_in h    P[c] = S_out g[c]    out[c, r] = sum over t of P[c, r, :, t]
//   (x) Q[r, :, t]
//
// All repeats are rows of one S: row e is (r, i), and sign (e, j) is bit e % 64
// of number e / 64 * width + j of SplitMix64, so that one word serves the 64
// rows of a block. A block makes its words in shared memory, and every lane the
// signs of its own share of the tensor cores' operand, in registers; S is never
// there. Products with signs are exact: bfloat16 tensor cores for bfloat16,
// TF32 for float16 (which holds its 11 bits), additions for float32. P and Q
// are float32, and paired in float32. A cotangent's bits do not depend on the
// others; no atomics.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "lddyn.h"
#include "warp.cuh"

namespace lddyn {
namespace {

constexpr int kRows = 64, kTokens = 128;  // tile of P in a block: a word's rows
constexpr int kThreads = 128;             // four warps of 64 x 32
constexpr int kChunkBytes = 16;           // what one cp.async copies

// The 16 x 8 pieces of a warp's 64 x 32. Lane 4 g + q holds rows g and g + 8,
// columns 2 q and 2 q + 1 of each piece: the accumulator of mma.m16n8, and the
// layout of every unit below.
using Sums = Fragment[4][4];

__device__ float widen(float x) { return x; }
__device__ float widen(__half x) { return __half2float(x); }
__device__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

// Number n (from 0) of SplitMix64 seeded with key.
__device__ uint64_t number(uint64_t key, uint64_t n) {
  uint64_t x = key + (n + 1) * 0x9E3779B97F4A7C15u;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}

__device__ bool negative(uint64_t word, int row) { return word >> row & 1; }

// ---------------------------------------------------------------------------
// units multiply: sum (64 rows, 32 tokens) += signs of `words` times x, of
// which rows are tokens.

// bfloat16 tensor cores, 16 deep.
struct BFloat16 {
  using Element = __nv_bfloat16;
  static constexpr int kDepth = 64,
                       kPitch = kDepth + 8;  // no two rows of ldmatrix share a bank

  // Signs of two neighbouring words in one register: +-1 is 0x3f80 or 0xbf80.
  __device__ static uint32_t signs(uint64_t low, uint64_t high, int row) {
    return 0x3f803f80u | static_cast<uint32_t>(low >> row & 1) << 15 |
           static_cast<uint32_t>(high >> row & 1) << 31;
  }

  __device__ static void multiply(const uint64_t* words, const Element* x, Sums& sum) {
    const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
#pragma unroll
    for (int k = 0; k < kDepth; k += 16) {
      uint64_t word[4];  // of columns 2 q, 2 q + 1, 2 q + 8, 2 q + 9; bit 0 is
                         // that of row g
      for (int r = 0; r < 4; ++r) word[r] = words[k + 2 * q + r % 2 + r / 2 * 8] >> g;
      uint32_t right[4][2];
#pragma unroll
      for (int j = 0; j < 4; j += 2) {
        const Element* from =
            x + (8 * j + lane / 16 * 8 + lane % 8) * kPitch + k + lane / 8 % 2 * 8;
        load_matrices<false>(from, right[j][0], right[j][1], right[j + 1][0], right[j + 1][1]);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        uint32_t left[4];
        for (int r = 0; r < 4; ++r) {
          left[r] = signs(word[r / 2 * 2], word[r / 2 * 2 + 1], 16 * i + r % 2 * 8);
        }
#pragma unroll
        for (int j = 0; j < 4; ++j) mma_bfloat16(sum[i][j], left, right[j]);
      }
    }
  }
};

// TF32 tensor cores, 8 deep.
struct Tf32 {
  using Element = float;
  static constexpr int kDepth = 32, kPitch = kDepth + 4;

  __device__ static void multiply(const uint64_t* words, const Element* x, Sums& sum) {
    const int g = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
#pragma unroll
    for (int k = 0; k < kDepth; k += 8) {
      uint64_t word[2];
      for (int r = 0; r < 2; ++r) word[r] = words[k + q + 4 * r] >> g;
      float right[4][2];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        for (int r = 0; r < 2; ++r) right[j][r] = x[(8 * j + g) * kPitch + k + q + 4 * r];
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float left[4];
        for (int r = 0; r < 4; ++r) {
          left[r] = negative(word[r / 2], 16 * i + r % 2 * 8) ? -1.0f : 1.0f;
        }
#pragma unroll
        for (int j = 0; j < 4; ++j) mma_tf32(sum[i][j], left, right[j]);
      }
    }
  }
};

// No tensor core, and no product: float32 is added or subtracted.
struct Add {
  using Element = float;
  static constexpr int kDepth = 32, kPitch = kDepth + 4;

  __device__ static void multiply(const uint64_t* words, const Element* x, Sums& sum) {
    const int g = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
    for (int k = 0; k < kDepth; ++k) {
      const uint64_t word = words[k] >> g;
      float right[4][2];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        for (int r = 0; r < 2; ++r) right[j][r] = x[(8 * j + 2 * q + r) * kPitch + k];
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          const bool minus = negative(word, 16 * i + r / 2 * 8);
#pragma unroll
          for (int j = 0; j < 4; ++j) sum[i][j][r] += minus ? -right[j][r % 2] : right[j][r % 2];
        }
      }
    }
  }
};

// ---------------------------------------------------------------------------
// kernels

// out[item] (rows, t) = S x[item]^T, x (items, t, width). blockIdx.x: tiles,
// those of the same x side by side; blockIdx.z: item. Where `vector`, rows of x
// begin on 16 bytes.
template <typename Unit, typename T>
__global__ void __launch_bounds__(kThreads)
    project_kernel(const T* x, float* out, uint64_t key, int64_t rows, int64_t t, int64_t width,
                   bool vector) {
  using Element = typename Unit::Element;
  constexpr int kChunk = kChunkBytes / sizeof(Element), kPerRow = Unit::kDepth / kChunk;
  __shared__ __align__(16) Element tile[kTokens * Unit::kPitch];
  __shared__ uint64_t words[Unit::kDepth];
  const int64_t blocks = (rows + kRows - 1) / kRows, block = blockIdx.x % blocks;
  const int64_t token = blockIdx.x / blocks * kTokens, item = blockIdx.z;
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
  x += (item * t + token) * width;

  Sums sum = {};
  for (int64_t k = 0; k < width; k += Unit::kDepth) {
    __syncthreads();  // nobody reads the last tile
    for (int i = threadIdx.x; i < kTokens * kPerRow; i += kThreads) {
      const int row = i / kPerRow, column = i % kPerRow * kChunk;
      const T* from = x + row * width + k + column;
      Element* to = tile + row * Unit::kPitch + column;
      const int64_t left = token + row < t ? width - k - column : 0;
      const int inside = static_cast<int>(max(int64_t{0}, min(left, int64_t{kChunk})));
      if (std::is_same_v<Element, T> && vector) {
        copy_async(to, inside ? from : x, inside * static_cast<int>(sizeof(T)));
      } else {
        for (int e = 0; e < kChunk; ++e) to[e] = Element(e < inside ? widen(from[e]) : 0.0f);
      }
    }
    commit_copies();
    if (threadIdx.x < Unit::kDepth) {
      words[threadIdx.x] = number(key, block * width + k + threadIdx.x);
    }
    wait_copies<0>();
    __syncthreads();
    Unit::multiply(words, tile + warp * 32 * Unit::kPitch, sum);
  }

  out += item * rows * t;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const int64_t row = block * kRows + 16 * i + g + r / 2 * 8;
        const int64_t column = token + warp * 32 + 8 * j + 2 * q + r % 2;
        if (row < rows && column < t) out[row * t + column] = sum[i][j][r];
      }
    }
  }
}

constexpr int kPairTile = 32, kPairThreads = 256;

// out[c, r] (size_out, size_in) = scale * P[c, r] Q[r]^T over tokens.
// blockIdx.x: tile of (a, b), with r slowest; blockIdx.z: c.
__global__ void __launch_bounds__(kPairThreads) pair_kernel(Sketch p) {
  constexpr int kStep = kPairThreads / kPairTile, kMine = kPairTile / kStep;
  __shared__ float left[kPairTile][kPairTile + 1], right[kPairTile][kPairTile + 1];
  const int64_t tiles_b = (p.size_in + kPairTile - 1) / kPairTile;
  const int64_t tiles = (p.size_out + kPairTile - 1) / kPairTile * tiles_b;
  const int64_t repeat = blockIdx.x / tiles, tile = blockIdx.x % tiles;
  const int64_t a = tile / tiles_b * kPairTile, b = tile % tiles_b * kPairTile;
  const int64_t batch = blockIdx.z * p.repeats + repeat;
  const float* pushed = p.pushed + (batch * p.size_out + a) * p.t;
  const float* projected = p.projected + (repeat * p.size_in + b) * p.t;
  const int x = threadIdx.x % kPairTile, y = threadIdx.x / kPairTile;

  float total[kMine] = {};
  for (int64_t token = 0; token < p.t; token += kPairTile) {
    __syncthreads();
    for (int row = y; row < kPairTile; row += kStep) {
      const bool inside = token + x < p.t;
      left[row][x] = inside && a + row < p.size_out ? pushed[row * p.t + token + x] : 0.0f;
      right[row][x] = inside && b + row < p.size_in ? projected[row * p.t + token + x] : 0.0f;
    }
    __syncthreads();
    float sum[kMine] = {};  // of its own: a long sum of floats loses digits
    for (int d = 0; d < kPairTile; ++d) {
#pragma unroll
      for (int i = 0; i < kMine; ++i) sum[i] += left[y + i * kStep][d] * right[x][d];
    }
#pragma unroll
    for (int i = 0; i < kMine; ++i) total[i] += sum[i];
  }
#pragma unroll
  for (int i = 0; i < kMine; ++i) {
    const int64_t row = a + y + i * kStep, column = b + x;
    if (row < p.size_out && column < p.size_in) {
      p.out[(batch * p.size_out + row) * p.size_in + column] = p.scale * total[i];
    }
  }
}

// ---------------------------------------------------------------------------
// launches

template <typename Unit, typename T>
int project(const void* x, float* out, int64_t key, int64_t rows, int64_t t, int64_t width,
            int64_t items, cudaStream_t queue) {
  const bool vector = reinterpret_cast<uintptr_t>(x) % kChunkBytes == 0 &&
                      width * static_cast<int64_t>(sizeof(T)) % kChunkBytes == 0;
  const auto tiles = (rows + kRows - 1) / kRows * ((t + kTokens - 1) / kTokens);
  const dim3 grid(static_cast<unsigned>(tiles), 1, static_cast<unsigned>(items));
  const auto* from = static_cast<const T*>(x);
  project_kernel<Unit, T><<<grid, kThreads, 0, queue>>>(from, out, key, rows, t, width, vector);
  return cudaGetLastError();
}

template <typename Unit, typename T>
int run(const Sketch& p, cudaStream_t queue) {
  int status = project<Unit, T>(p.activations, p.projected, p.key_in, p.repeats * p.size_in, p.t,
                                p.d_in, 1, queue);
  if (status) return status;
  status = project<Unit, T>(p.grads, p.pushed, p.key_out, p.repeats * p.size_out, p.t, p.d_out, p.c,
                            queue);
  if (status) return status;
  const auto tiles = [](int64_t size) { return (size + kPairTile - 1) / kPairTile; };
  const auto blocks = p.repeats * tiles(p.size_out) * tiles(p.size_in);
  const dim3 grid(static_cast<unsigned>(blocks), 1, static_cast<unsigned>(p.c));
  pair_kernel<<<grid, kPairThreads, 0, queue>>>(p);
  return cudaGetLastError();
}

}  // namespace

int sketch_cuda(const Sketch& p, uintptr_t stream) {
  const auto queue = reinterpret_cast<cudaStream_t>(stream);
  switch (p.dtype) {
    case Dtype::kFloat32:
      return run<Add, float>(p, queue);
    case Dtype::kBFloat16:
      return run<BFloat16, __nv_bfloat16>(p, queue);
    case Dtype::kFloat16:
      return run<Tf32, __half>(p, queue);
    case Dtype::kFloat64:
      break;
  }
  return cudaErrorInvalidValue;
}

}  // namespace lddyn
