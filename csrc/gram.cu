// Inner products of one linear layer's token gradients on CUDA. With S = a_u a_o^T from the caller,
//
//   E[m] = S g_o[m] (t, d_out)        G[m, l] = <E[m], g_u[l]> over (t, d_out),
//
// a chunk of columns of d_out at a time: every operand is read once, and E stays in cache. The
// second product is split over tokens t; each split keeps its own partial G, and the splits are
// summed in a fixed order (no atomics: equal inputs, equal bits). Tiles that the lengths declare
// to be zero are neither read nor multiplied; inside a tile such entries are masked.
//
// Both products run on one 128 x 128 block of four warps, fed by cp.async through kStages buffers.
// bfloat16: tensor cores, E rounded to bfloat16. float16: TF32 tensor cores, which hold its 11 bits
// (S and E may exceed its range). float32: FMA. Accumulation is always in float32.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "lddyn.h"
#include "warp.cuh"

namespace lddyn {
namespace {

constexpr int kRows = 128, kColumns = 128;  // tile of the result in a block
constexpr int kThreads = 128;               // four warps, 2 x 2, of 64 x 64
constexpr int kStages = 4;
constexpr int kChunkBytes = 16;  // what one cp.async copies
extern __shared__ __align__(16) unsigned char dynamic_shared[];

// The 16 x 8 pieces of a warp's 64 x 64. Lane 4 g + q holds rows g and g + 8, columns 2 q and
// 2 q + 1 of each piece: the accumulator of mma.m16n8, and the layout of every unit below.
using Sums = Fragment[4][8];

__device__ float widen(float x) { return x; }
__device__ float widen(__half x) { return __half2float(x); }
__device__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

// --------------------------------------------------------------------------- tiles

// Tiles of one stage. A is (rows, depth). B is (columns, depth) when paired, (depth, columns) when
// pushed. Rows are padded so that neither ldmatrix nor a fragment's loads have bank conflicts.
template <typename Unit, bool kPaired>
struct Tiles {
  using Element = typename Unit::Element;
  static constexpr int kChunk = kChunkBytes / sizeof(Element);  // elements of a cp.async
  static constexpr int kDepth = 64 / sizeof(Element);
  static constexpr int kPitchA = kDepth + kChunk;
  static constexpr int kHeightB = kPaired ? kColumns : kDepth;
  static constexpr int kWidthB = kPaired ? kDepth : kColumns;
  static constexpr int kPitchB = kWidthB + (kPaired || sizeof(Element) == 2 ? 1 : 2) * kChunk;
  static constexpr int kSize = kRows * kPitchA + kHeightB * kPitchB;
  static constexpr int kBytes = kStages * kSize * sizeof(Element);
  static_assert(kBytes <= 96 << 10, "a block of sm_86 has no more");
};

// 16 bytes of a tile: `count` elements from memory (none if it is negative), then zeros. Where
// `vector`, from is aligned and the copy is asynchronous; else, or to convert, element by element.
template <typename Element, typename T>
__device__ void fetch(Element* to, const T* from, int64_t count, bool vector) {
  constexpr int kChunk = kChunkBytes / sizeof(Element);
  const int inside = static_cast<int>(max(int64_t{0}, min(count, int64_t{kChunk})));
  if constexpr (std::is_same_v<Element, T>) {
    if (vector) {
      copy_async(to, from, inside * static_cast<int>(sizeof(T)));
      return;
    }
  }
#pragma unroll
  for (int i = 0; i < kChunk; ++i) to[i] = Element(i < inside ? widen(from[i]) : 0.0f);
}

// Fills a (height, width) tile, all threads together: from(row, column) points at element (row,
// column) of memory, and count(row, column) elements are there from it onwards.
template <int kHeight, int kWidth, int kPitch, typename Element, typename From, typename Count>
__device__ void fill(Element* tile, From from, Count count, bool vector) {
  constexpr int kChunk = kChunkBytes / sizeof(Element), kPerRow = kWidth / kChunk;
  static_assert(kHeight * kPerRow % kThreads == 0);
#pragma unroll
  for (int i = threadIdx.x; i < kHeight * kPerRow; i += kThreads) {
    const int row = i / kPerRow, column = i % kPerRow * kChunk;
    fetch(tile + row * kPitch + column, from(row, column), count(row, column), vector);
  }
}

// --------------------------------------------------------------------------- units

// bfloat16 tensor cores, 16 deep.
struct BFloat16 {
  using Element = __nv_bfloat16;

  __device__ static __nv_bfloat16 round(float x) { return __float2bfloat16_rn(x); }

  template <bool kPaired>
  __device__ static void multiply(const Element* a, const Element* b, Sums& sum) {
    using X = Tiles<BFloat16, kPaired>;
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int k = 0; k < X::kDepth; k += 16) {
      uint32_t left[4][4], right[8][2];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const Element* from = a + (16 * i + lane % 16) * X::kPitchA + k + lane / 16 * 8;
        load_matrices<false>(from, left[i][0], left[i][1], left[i][2], left[i][3]);
      }
#pragma unroll
      for (int j = 0; j < 8; j += 2) {
        const Element* from;
        if constexpr (kPaired) {
          from = b + (8 * j + lane / 16 * 8 + lane % 8) * X::kPitchB + k + lane / 8 % 2 * 8;
        } else {
          from = b + (k + lane % 16) * X::kPitchB + 8 * j + lane / 16 * 8;
        }
        load_matrices<!kPaired>(from, right[j][0], right[j][1], right[j + 1][0], right[j + 1][1]);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 8; ++j) mma_bfloat16(sum[i][j], left[i], right[j]);
      }
    }
  }
};

// TF32 tensor cores, 8 deep. S and E are rounded when read; float16 is exact.
struct Tf32 {
  using Element = float;

  __device__ static float round(float x) { return x; }

  template <bool kPaired>
  __device__ static void multiply(const Element* a, const Element* b, Sums& sum) {
    using X = Tiles<Tf32, kPaired>;
    constexpr int kAlongK = kPaired ? 1 : X::kPitchB, kAlongN = kPaired ? X::kPitchB : 1;
    const int g = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
#pragma unroll
    for (int k = 0; k < X::kDepth; k += 8) {
      float left[4][4], right[8][2];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          left[i][r] = round_tf32(a[(16 * i + g + r % 2 * 8) * X::kPitchA + k + q + r / 2 * 4]);
        }
      }
#pragma unroll
      for (int j = 0; j < 8; ++j) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          right[j][r] = b[(k + q + 4 * r) * kAlongK + (8 * j + g) * kAlongN];
        }
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 8; ++j) mma_tf32(sum[i][j], left[i], right[j]);
      }
    }
  }
};

// No tensor core: float32 as it is.
struct Fma {
  using Element = float;

  __device__ static float round(float x) { return x; }

  template <bool kPaired>
  __device__ static void multiply(const Element* a, const Element* b, Sums& sum) {
    using X = Tiles<Fma, kPaired>;
    constexpr int kAlongK = kPaired ? 1 : X::kPitchB, kAlongN = kPaired ? X::kPitchB : 1;
    const int g = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
    for (int k = 0; k < X::kDepth; ++k) {
      float left[4][2], right[8][2];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        for (int r = 0; r < 2; ++r) left[i][r] = a[(16 * i + g + 8 * r) * X::kPitchA + k];
      }
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        for (int r = 0; r < 2; ++r) right[j][r] = b[k * kAlongK + (8 * j + 2 * q + r) * kAlongN];
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 8; ++j) {
#pragma unroll
          for (int r = 0; r < 4; ++r) sum[i][j][r] += left[i][r / 2] * right[j][r % 2];
        }
      }
    }
  }
};

// --------------------------------------------------------------------------- kernels

// The pipeline: load(a, b) fills the tiles of the next step, and is called `steps` times.
template <typename Unit, bool kPaired, typename Load>
__device__ void product(int steps, Load load, Sums& sum) {
  using X = Tiles<Unit, kPaired>;
  using Element = typename Unit::Element;
  auto* tiles = reinterpret_cast<Element*>(dynamic_shared);
  const int warp = threadIdx.x / 32, row = warp / 2 * 64, column = warp % 2 * 64;
  const auto load_step = [&](int step) {
    Element* stage = tiles + step % kStages * X::kSize;
    if (step < steps) load(stage, stage + kRows * X::kPitchA);
    commit_copies();  // also an empty group, because wait_copies counts groups
  };
#pragma unroll 1
  for (int step = 0; step < kStages - 1; ++step) load_step(step);
  for (int step = 0; step < steps; ++step) {
    wait_copies<kStages - 2>();
    __syncthreads();  // this step's tiles are complete, and no thread reads the last step's
    load_step(step + kStages - 1);
    const Element* a = tiles + step % kStages * X::kSize;
    const Element* b = a + kRows * X::kPitchA;
    Unit::template multiply<kPaired>(a + row * X::kPitchA, b + column * (kPaired ? X::kPitchB : 1),
                                     sum);
  }
}

// Calls store(row, column, x, y) for each pair of neighbouring columns of the block's tile.
template <typename Store>
__device__ void drain(const Sums& sum, Store store) {
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
  const int row = warp / 2 * 64 + g, column = warp % 2 * 64 + 2 * q;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        store(row + 16 * i + 8 * half, column + 8 * j, sum[i][j][2 * half],
              sum[i][j][2 * half + 1]);
      }
    }
  }
}

__device__ int64_t reach_of(const int64_t* lengths, int64_t i, int64_t most) {
  return lengths ? max(int64_t{0}, min(lengths[i], most)) : most;
}

// E[item] = S g_o[item], columns first .. first + width. blockIdx.x: tile; blockIdx.z: item.
template <typename Unit, typename T>
__global__ void __launch_bounds__(kThreads, 2)
    push_kernel(Gram p, int64_t first, int64_t width, bool vector) {
  using X = Tiles<Unit, false>;
  using Element = typename Unit::Element;
  const int64_t tiles = (width + kColumns - 1) / kColumns, item = blockIdx.z;
  const int64_t row = blockIdx.x / tiles * kRows, column = blockIdx.x % tiles * kColumns;
  if (p.reach_u && row >= *p.reach_u) return;  // every source is zero here
  const int64_t depth = reach_of(p.lengths_o, item, p.s);

  const auto* s = static_cast<const Element*>(p.similarity);
  const T* g_o = static_cast<const T*>(p.grads_o) + item * p.s * p.d_out + first;
  int64_t k = 0;
  Sums sum = {};
  const auto load = [&](Element* a, Element* b) {
    fill<kRows, X::kDepth, X::kPitchA>(
        a, [&](int r, int c) { return s + (row + r) * p.pitch_s + k + c; },
        [&](int r, int c) { return row + r < p.t ? depth - k - c : 0; }, true);
    fill<X::kHeightB, X::kWidthB, X::kPitchB>(
        b, [&](int r, int c) { return g_o + (k + r) * p.d_out + column + c; },
        [&](int r, int c) { return k + r < depth ? width - column - c : 0; }, vector);
    k += X::kDepth;
  };
  product<Unit, false>(static_cast<int>((depth + X::kDepth - 1) / X::kDepth), load, sum);

  Element* pushed = static_cast<Element*>(p.pushed) + item * p.t * p.pitch;
  drain(sum, [&](int r, int c, float x, float y) {
    if (row + r >= p.t || column + c >= p.pitch) return;
    // Both stored at once: pitch and column are even. The columns beyond width are zero.
    struct alignas(2 * sizeof(Element)) Two {
      Element x, y;
    };
    *reinterpret_cast<Two*>(pushed + (row + r) * p.pitch + column + c) = {Unit::round(x),
                                                                          Unit::round(y)};
  });
}

// partial[split] (+)= <E, g_u> over columns first .. first + width and the tokens t of the split,
// t = split, split + splits, ...: few sources reach late tokens, so the splits interleave.
// blockIdx.x: tile; blockIdx.z: split.
template <typename Unit, typename T>
__global__ void __launch_bounds__(kThreads, 2)
    pair_kernel(Gram p, int64_t first, int64_t width, bool vector) {
  using X = Tiles<Unit, true>;
  using Element = typename Unit::Element;
  const int64_t tiles = (p.n + kColumns - 1) / kColumns, split = blockIdx.z;
  const int64_t row = blockIdx.x / tiles * kRows, column = blockIdx.x % tiles * kColumns;

  // reach[c]: number of tokens of source column + c that may be other than zero.
  __shared__ int reach[kColumns], furthest[kThreads / 32];
  static_assert(kColumns == kThreads);
  const int64_t source = column + threadIdx.x;
  reach[threadIdx.x] = source < p.n ? static_cast<int>(reach_of(p.lengths_u, source, p.t)) : 0;
  furthest[threadIdx.x / 32] = largest_of_warp(reach[threadIdx.x]);
  __syncthreads();
  int64_t end = 0;
  for (int x : furthest) end = max(end, int64_t{x});
  const int64_t tokens = end > split ? (end - split - 1) / p.splits + 1 : 0;
  const int64_t steps = tokens * ((width + X::kDepth - 1) / X::kDepth);

  const auto* pushed = static_cast<const Element*>(p.pushed);
  const T* g_u = static_cast<const T*>(p.grads_u) + first;
  int64_t t = split, k = 0;
  Sums sum = {};
  const auto load = [&](Element* a, Element* b) {
    fill<kRows, X::kDepth, X::kPitchA>(
        a, [&](int r, int c) { return pushed + ((row + r) * p.t + t) * p.pitch + k + c; },
        [&](int r, int) { return row + r < p.m ? X::kChunk : 0; }, true);
    fill<X::kHeightB, X::kWidthB, X::kPitchB>(
        b, [&](int r, int c) { return g_u + ((column + r) * p.t + t) * p.d_out + k + c; },
        [&](int r, int c) { return t < reach[r] ? width - k - c : 0; }, vector);
    k += X::kDepth;
    if (k >= width) {
      k = 0;
      t += p.splits;
    }
  };
  product<Unit, true>(static_cast<int>(steps), load, sum);

  float* partial = p.partial + split * p.m * p.n;
  drain(sum, [&](int r, int c, float x, float y) {
    if (row + r >= p.m) return;
    float* to = partial + (row + r) * p.n + column + c;
    if (column + c < p.n) to[0] = x + (first ? to[0] : 0.0f);
    if (column + c + 1 < p.n) to[1] = y + (first ? to[1] : 0.0f);
  });
}

// out = sum of the partial results over splits, in order.
__global__ void sum_kernel(const float* partial, float* out, int64_t size, int64_t splits) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i >= size) return;
  float sum = 0;
  for (int64_t k = 0; k < splits; ++k) sum += partial[k * size + i];
  out[i] = sum;
}

// --------------------------------------------------------------------------- launches

// Whether rows that begin at multiples of d_out elements from x begin on 16 bytes.
template <typename T>
bool aligned(const void* x, int64_t d_out) {
  return reinterpret_cast<uintptr_t>(x) % kChunkBytes == 0 && d_out * sizeof(T) % kChunkBytes == 0;
}

int64_t tiles(int64_t rows, int64_t columns) {
  return ((rows + kRows - 1) / kRows) * ((columns + kColumns - 1) / kColumns);
}

template <typename Unit, typename T>
int run(const Gram& p, cudaStream_t queue) {
  constexpr int kPush = Tiles<Unit, false>::kBytes, kPair = Tiles<Unit, true>::kBytes;
  constexpr auto kLimit = cudaFuncAttributeMaxDynamicSharedMemorySize;
  int status = cudaFuncSetAttribute(push_kernel<Unit, T>, kLimit, kPush);
  if (status) return status;
  status = cudaFuncSetAttribute(pair_kernel<Unit, T>, kLimit, kPair);
  if (status) return status;
  const bool vector_o = aligned<T>(p.grads_o, p.d_out), vector_u = aligned<T>(p.grads_u, p.d_out);
  const auto grid = [](int64_t x, int64_t z) {
    return dim3(static_cast<unsigned>(x), 1, static_cast<unsigned>(z));
  };
  for (int64_t first = 0; first < p.d_out; first += p.pitch) {
    const int64_t width = first + p.pitch < p.d_out ? p.pitch : p.d_out - first;
    push_kernel<Unit, T>
        <<<grid(tiles(p.t, width), p.m), kThreads, kPush, queue>>>(p, first, width, vector_o);
    pair_kernel<Unit, T>
        <<<grid(tiles(p.m, p.n), p.splits), kThreads, kPair, queue>>>(p, first, width, vector_u);
    status = cudaGetLastError();
    if (status) return status;
  }
  constexpr int kSumThreads = 256;
  const int64_t size = p.m * p.n;
  sum_kernel<<<grid((size + kSumThreads - 1) / kSumThreads, 1), kSumThreads, 0, queue>>>(
      p.partial, p.out, size, p.splits);
  return cudaGetLastError();
}

}  // namespace

int gram_cuda(const Gram& p, uintptr_t stream) {
  const auto queue = reinterpret_cast<cudaStream_t>(stream);
  switch (p.dtype) {
    case Dtype::kFloat32:
      return run<Fma, float>(p, queue);
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
