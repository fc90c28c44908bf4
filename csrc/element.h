// Element types of CPU kernels: loads widen to float (double stays), stores round to nearest even.
// Branch-free, so that loops over them vectorise.
#pragma once

#include <cstdint>
#include <cstring>

#include "lddyn.h"

// Compiles a function for several instruction sets; the loader chooses one.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define LDDYN_SIMD __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define LDDYN_SIMD
#endif
#define LDDYN_INLINE inline __attribute__((always_inline))

namespace lddyn {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

LDDYN_INLINE float from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
LDDYN_INLINE uint32_t to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

LDDYN_INLINE double widen(double x) { return x; }
LDDYN_INLINE float widen(float x) { return x; }
LDDYN_INLINE float widen(BFloat16 x) { return from_bits(uint32_t{x.bits} << 16); }
LDDYN_INLINE float widen(Float16 x) {
  // Exponent rebased by a product, which is right for subnormals too; 65536 and up are inf or NaN.
  const float magnitude = from_bits((x.bits & 0x7fffu) << 13) * 0x1p112f;
  const uint32_t special = magnitude >= 65536.0f ? 0x7f800000u : 0u;
  return from_bits(to_bits(magnitude) | special | (x.bits & 0x8000u) << 16);
}

LDDYN_INLINE void store(double* p, double x) { *p = x; }
LDDYN_INLINE void store(float* p, float x) { *p = x; }
LDDYN_INLINE void store(BFloat16* p, float x) {
  const uint32_t bits = to_bits(x);
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  p->bits = static_cast<uint16_t>(x == x ? rounded : 0x7fc0u);
}
LDDYN_INLINE void store(Float16* p, float x) {
  const uint32_t bits = to_bits(x), magnitude = bits & 0x7fffffffu;
  // Adding 1/2 leaves a subnormal's digits, rounded, in the low bits of the sum.
  const uint32_t subnormal = to_bits(from_bits(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x477ff000u ? 0x7c00u : half;  // 65520 and up round to infinity
  half = x == x ? half : 0x7e00u;
  p->bits = static_cast<uint16_t>(half | (bits >> 16 & 0x8000u));
}

// Calls body(T{}) with the element type of a dtype.
template <typename Body>
LDDYN_INLINE void with_element(Dtype dtype, const Body& body) {
  switch (dtype) {
    case Dtype::kFloat32:
      return body(float{});
    case Dtype::kBFloat16:
      return body(BFloat16{});
    case Dtype::kFloat16:
      return body(Float16{});
    case Dtype::kFloat64:
      return body(double{});
  }
}

}  // namespace lddyn
