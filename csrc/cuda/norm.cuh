// The arithmetic of a p-norm on the device: powers, scales, quotients, and the choice by p.
#pragma once

#include "memory.cuh"

namespace rds_fast::cuda {

// tᵉ for t >= 0. (The CUDA library's pow treats negative t as well, at several times the cost.)
__device__ __forceinline__ float raise(float t, float e) { return exp2f(e * log2f(t)); }
__device__ __forceinline__ double raise(double t, double e) { return exp2(e * log2(t)); }

__device__ __forceinline__ float fused(float a, float b, float c) { return fmaf(a, b, c); }
__device__ __forceinline__ double fused(double a, double b, double c) { return fma(a, b, c); }

// The power of two that holds x > 0, or its reciprocal: scaling by either is exact. Both are normal numbers.
template <typename Bits, Bits EXPONENT, Bits LEAST, typename A>
__device__ __forceinline__ A power_of_two(A x, bool reciprocal) {
  static_assert(sizeof(Bits) == sizeof(A), "the bits of a number");
  constexpr Bits LARGEST = EXPONENT - 2 * LEAST;  // whose reciprocal is the least
  Bits bits;
  memcpy(&bits, &x, sizeof(x));
  bits &= EXPONENT;
  bits = bits < LEAST ? LEAST : bits > LARGEST ? LARGEST : bits;
  if (reciprocal) bits = LARGEST + LEAST - bits;
  memcpy(&x, &bits, sizeof(x));
  return x;
}
__device__ __forceinline__ float power_of_two(float x, bool reciprocal) {
  return power_of_two<uint32_t, 0x7f800000u, 0x00800000u>(x, reciprocal);
}
__device__ __forceinline__ double power_of_two(double x, bool reciprocal) {
  return power_of_two<uint64_t, 0x7ff0000000000000u, 0x0010000000000000u>(x, reciprocal);
}

template <NormOrder ORDER>
using Order = std::integral_constant<NormOrder, ORDER>;

// p and k, and how the row is reduced. EUCLIDEAN: p = 2, known when compiling; the other orders share a kernel and
// branch on `order`, which is the same for all threads.
template <typename A, bool EUCLIDEAN>
struct Norm {
  A p;
  A k;
  NormOrder other_order;

  Norm(double order_p, double power_k)
      : p(static_cast<A>(order_p)), k(static_cast<A>(power_k)), other_order(norm_order(order_p)) {}

  __device__ __forceinline__ NormOrder order() const { return EUCLIDEAN ? NormOrder::two : other_order; }

  // Whether the norm is flat between the places where it has no derivative.
  __device__ __forceinline__ bool flat() const { return order() == NormOrder::one || order() == NormOrder::infinity; }

  // Calls body with the order, known when compiling.
  template <typename Body>
  __device__ __forceinline__ void for_order(Body body) const {
    if constexpr (EUCLIDEAN) {
      body(Order<NormOrder::two>());
    } else if (other_order == NormOrder::one) {
      body(Order<NormOrder::one>());
    } else if (other_order == NormOrder::infinity) {
      body(Order<NormOrder::infinity>());
    } else {
      body(Order<NormOrder::general>());
    }
  }

  // What the coordinates of a row whose largest magnitude is `largest` are divided by, so that no power of them
  // overflows. For p = 2 a power of two, which is exact; else the largest itself, because a high power of a ratio up to
  // 2 might overflow. 1 where that is 0 or infinite: 0/0 and inf/inf are never formed.
  template <NormOrder ORDER>
  static __device__ __forceinline__ A divisor(A largest) {
    if (largest == A(0) || is_infinite(largest)) return 1;
    return ORDER == NormOrder::two ? power_of_two(largest, false) : largest;
  }

  // For p = 2.
  static __device__ __forceinline__ A reciprocal_of_divisor(A largest) {
    return largest == A(0) || is_infinite(largest) ? A(1) : power_of_two(largest, true);
  }

  // A quotient by the divisor, raised to p.
  template <NormOrder ORDER>
  __device__ __forceinline__ A raised(A quotient) const {
    return ORDER == NormOrder::two ? quotient * quotient : raise(quotient, p);
  }
};

// x / n with one division a row, correctly rounded but for rare cases: |x| = n gives exactly 1, so that the second
// derivative of a row with one coordinate vanishes. scale is a power of two that keeps 1/n normal. 0 for a row of
// zeros.
template <typename A>
struct DividedBy {
  A scale = 0, divisor = 0, reciprocal = 0;

  explicit __device__ __forceinline__ DividedBy(A n) {
    if (n == A(0)) return;
    const Quotient<A> quotient(n);
    scale = quotient.scale;
    divisor = is_infinite(n) ? A(0) : n * scale;
    reciprocal = quotient.reciprocal;
  }

  __device__ __forceinline__ A operator()(A x) const {
    const A scaled = x * scale;
    const A approximate = scaled * reciprocal;
    const A rest = fused(-approximate, divisor, scaled);
    return fused(rest, reciprocal, approximate);
  }
};

}  // namespace rds_fast::cuda
