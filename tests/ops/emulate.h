// CUDA kernels without a GPU: a block at a time, a fiber per thread, switched at barriers and at
// what a warp does together. Tensor cores, ldmatrix and cp.async follow the PTX manual, copies as
// late as it allows; shared memory starts as NaN. Wrong indices, layouts and waits show in the
// result.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <vector>

#define __device__
#define __global__
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __shared__ static
using cudaStream_t = void*;
constexpr int cudaErrorInvalidValue = 1, cudaFuncAttributeMaxDynamicSharedMemorySize = 0;
inline int cudaGetLastError() { return 0; }
template <typename Kernel>
int cudaFuncSetAttribute(Kernel, int, int) {
  return 0;
}
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline dim3 threadIdx, blockIdx, blockDim;

using std::max;
using std::min;

struct __nv_bfloat16 {
  uint16_t bits;
  __nv_bfloat16() = default;
  explicit __nv_bfloat16(float x) {
    uint32_t wide;
    std::memcpy(&wide, &x, 4);
    bits = std::isnan(x) ? 0x7fff : (wide + 0x7fff + (wide >> 16 & 1)) >> 16;
  }
  explicit operator float() const {
    const uint32_t wide = uint32_t{bits} << 16;
    float x;
    std::memcpy(&x, &wide, 4);
    return x;
  }
};
using __half = _Float16;
inline float __bfloat162float(__nv_bfloat16 x) { return static_cast<float>(x); }
inline float __half2float(__half x) { return x; }
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return __nv_bfloat16(x); }

namespace emulated {

constexpr int kWarp = 32, kStack = 64 << 10;

struct Barrier {
  int waiting = 0, generation = 0;
};
struct Lane {  // what a lane hands to its warp
  const void* address;
  uint32_t a[4], b[2];
};
struct Copy {
  void* to;
  const void* from;
  int bytes;
};
struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  bool done;
  std::vector<std::vector<Copy>> groups;
};
inline std::vector<Fiber> fibers;
inline ucontext_t scheduler;
inline std::function<void()> kernel;
inline Barrier block;
struct Warp {
  Barrier barrier;
  Lane lanes[2][kWarp];
};
inline std::vector<Warp> warps;

inline void wait(Barrier& barrier, int all) {
  const int generation = barrier.generation;
  if (++barrier.waiting == all) {
    barrier.waiting = 0;
    ++barrier.generation;
  }
  while (barrier.generation == generation) {
    swapcontext(&fibers[threadIdx.x].context, &scheduler);
  }
}

// Every lane's share, once all have handed theirs in; valid until the next exchange but one.
inline const Lane* exchange(const Lane& mine) {
  Warp& warp = warps[threadIdx.x / kWarp];
  Lane* lanes = warp.lanes[warp.barrier.generation % 2];
  lanes[threadIdx.x % kWarp] = mine;
  wait(warp.barrier, kWarp);
  return lanes;
}

inline void enter() {
  kernel();
  fibers[threadIdx.x].done = true;
}

inline void run_block() {
  for (unsigned i = 0; i < blockDim.x; ++i) {
    Fiber& fiber = fibers[i];
    fiber.done = false;
    fiber.groups.assign(1, {});
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = &scheduler;
    makecontext(&fiber.context, enter, 0);
  }
  bool busy = true;
  for (int sweep = 0; busy; ++sweep) {  // to and fro, so that no order is relied on
    busy = false;
    for (unsigned i = 0; i < blockDim.x; ++i) {
      threadIdx.x = sweep % 2 ? blockDim.x - 1 - i : i;
      if (fibers[threadIdx.x].done) continue;
      busy = true;
      swapcontext(&scheduler, &fibers[threadIdx.x].context);
    }
  }
}

// kernel<<<grid, threads, shared, stream>>>, with `shared` bytes at `memory`.
template <typename Body>
void launch(void* memory, dim3 grid, unsigned threads, size_t shared, cudaStream_t, Body body) {
  kernel = body;
  blockDim = {threads, 1, 1};
  fibers.resize(std::max<size_t>(fibers.size(), threads));
  warps.assign((threads + kWarp - 1) / kWarp, {});
  for (blockIdx.z = 0; blockIdx.z < grid.z; ++blockIdx.z) {
    for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y) {
      for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) {
        std::memset(memory, 0xff, shared);
        run_block();
      }
    }
  }
}

inline float as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline uint32_t as_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

}  // namespace emulated

inline void __syncthreads() { emulated::wait(emulated::block, blockDim.x); }

// The functions of csrc/warp.cuh.
namespace lddyn {

using Fragment = float[4];

inline void copy_async(void* to, const void* from, int bytes) {
  if (reinterpret_cast<uintptr_t>(to) % 16 || (bytes && reinterpret_cast<uintptr_t>(from) % 16)) {
    std::abort();  // a misaligned address
  }
  std::memset(to, 0xff, 16);
  emulated::fibers[threadIdx.x].groups.back().push_back({to, from, bytes});
}
inline void commit_copies() { emulated::fibers[threadIdx.x].groups.emplace_back(); }
template <int kPending>
void wait_copies() {
  auto& groups = emulated::fibers[threadIdx.x].groups;  // the last one is open
  while (groups.size() > kPending + 1) {
    for (const auto& copy : groups.front()) {
      std::memset(copy.to, 0, 16);
      std::memcpy(copy.to, copy.from, copy.bytes);
    }
    groups.erase(groups.begin());
  }
}

template <bool kTransposed>
void load_matrices(const void* row, uint32_t& a, uint32_t& b, uint32_t& c, uint32_t& d) {
  const auto* lanes = emulated::exchange({row, {}, {}});
  const int g = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
  uint32_t* results[] = {&a, &b, &c, &d};
  for (int i = 0; i < 4; ++i) {
    uint16_t pair[2];
    for (int e = 0; e < 2; ++e) {
      const int r = kTransposed ? 2 * q + e : g, column = kTransposed ? g : 2 * q + e;
      pair[e] = static_cast<const uint16_t*>(lanes[8 * i + r].address)[column];
    }
    std::memcpy(results[i], pair, 4);
  }
}

// Element (row, column) of a and b, from the lanes that hold it; two 16-bit elements a register.
inline float bfloat16_a(const emulated::Lane* lanes, int row, int k) {
  const uint32_t pair = lanes[row % 8 * 4 + k % 8 / 2].a[row / 8 + k / 8 * 2];
  return emulated::as_float(k % 2 ? pair & 0xffff0000u : pair << 16);
}
inline float bfloat16_b(const emulated::Lane* lanes, int k, int column) {
  const uint32_t pair = lanes[column * 4 + k % 8 / 2].b[k / 8];
  return emulated::as_float(k % 2 ? pair & 0xffff0000u : pair << 16);
}
inline void mma_bfloat16(Fragment& sum, const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  const auto* lanes = emulated::exchange({nullptr, {a[0], a[1], a[2], a[3]}, {b[0], b[1]}});
  const int g = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
  for (int r = 0; r < 4; ++r) {
    for (int k = 0; k < 16; ++k) {
      sum[r] += bfloat16_a(lanes, g + r / 2 * 8, k) * bfloat16_b(lanes, k, 2 * q + r % 2);
    }
  }
}
inline void mma_tf32(Fragment& sum, const float (&a)[4], const float (&b)[2]) {
  using emulated::as_bits;
  const auto* lanes =
      emulated::exchange({nullptr,
                          {as_bits(a[0]), as_bits(a[1]), as_bits(a[2]), as_bits(a[3])},
                          {as_bits(b[0]), as_bits(b[1])}});
  const int g = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
  const auto truncated = [](uint32_t bits) { return emulated::as_float(bits & ~0x1fffu); };
  for (int r = 0; r < 4; ++r) {
    for (int k = 0; k < 8; ++k) {
      const float left = truncated(lanes[g * 4 + k % 4].a[r / 2 + k / 4 * 2]);
      sum[r] += left * truncated(lanes[(2 * q + r % 2) * 4 + k % 4].b[k / 4]);
    }
  }
}
inline float round_tf32(float x) {
  return std::isnan(x) ? x : emulated::as_float((emulated::as_bits(x) + 0x1000u) & ~0x1fffu);
}
inline int largest_of_warp(int x) {
  const auto* lanes = emulated::exchange({nullptr, {static_cast<uint32_t>(x)}, {}});
  int best = x;
  for (int i = 0; i < 32; ++i) best = std::max(best, static_cast<int>(lanes[i].a[0]));
  return best;
}

}  // namespace lddyn
