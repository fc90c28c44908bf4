// PTX instructions as functions: asynchronous copies and tensor cores (sm_80 and later). What they
// do to the lanes of a warp is emulated in tests/emulate.h, where kernels run without a GPU.
#pragma once

#include <cstdint>

namespace lddyn {

using Fragment = float[4];  // a lane's share of a 16 x 8 result: see mma

__device__ inline uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// Copies `bytes` (0 to 16) from global to shared memory and zeroes the rest of 16; both aligned.
__device__ inline void copy_async(void* to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(bytes)
               : "memory");
}

// Ends a group of copies; wait_copies<n> waits for all but the last n groups of this thread.
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
__device__ inline void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four 8 x 8 matrices of 16-bit elements. Lane 8 i + r gives the address of row r of matrix i. Lane
// 4 g + q receives elements (g, 2 q) and (g, 2 q + 1) of each; transposed: (2 q, g), (2 q + 1, g).
template <bool kTransposed>
__device__ inline void load_matrices(const void* row, uint32_t& a, uint32_t& b, uint32_t& c,
                                     uint32_t& d) {
  if constexpr (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(a), "=r"(b), "=r"(c), "=r"(d)
                 : "r"(shared_address(row))
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(a), "=r"(b), "=r"(c), "=r"(d)
                 : "r"(shared_address(row))
                 : "memory");
  }
}

// sum (16, 8) += a (16, 16) b (16, 8) in bfloat16. Lane 4 g + q holds, lower index in lower bits,
// of a: (g, 2 q ..), (g + 8, 2 q ..), (g, 2 q + 8 ..), (g + 8, 2 q + 8 ..); of b: (2 q .., g),
// (2 q + 8 .., g); of sum: (g, 2 q), (g, 2 q + 1), (g + 8, 2 q), (g + 8, 2 q + 1).
__device__ inline void mma_bfloat16(Fragment& sum, const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, "
      "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// sum (16, 8) += a (16, 8) b (8, 8) in TF32, the lower 13 bits ignored. Lane 4 g + q holds of a:
// (g, q), (g + 8, q), (g, q + 4), (g + 8, q + 4); of b: (q, g), (q + 4, g); of sum: as above.
__device__ inline void mma_tf32(Fragment& sum, const float (&a)[4], const float (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, "
      "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])),
        "r"(__float_as_uint(a[3])), "r"(__float_as_uint(b[0])), "r"(__float_as_uint(b[1])));
}

// To the nearest TF32.
__device__ inline float round_tf32(float x) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return __uint_as_float(bits);
}

// The largest x of a warp.
__device__ inline int largest_of_warp(int x) { return __reduce_max_sync(0xffffffffu, x); }

}  // namespace lddyn
