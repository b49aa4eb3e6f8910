// The arithmetic of a p-norm on the device: powers, scales, quotients, and the choice by p.
#pragma once

#include "memory.cuh"

namespace rds_fast::cuda {

// tᵉ for t >= 0. (The CUDA library's pow treats negative t as well, at several times the cost.)
__device__ __forceinline__ float raise(float t, float e) { return exp2f(e * log2f(t)); }
__device__ __forceinline__ double raise(double t, double e) { return exp2(e * log2(t)); }

__device__ __forceinline__ float fused(float a, float b, float c) { return fmaf(a, b, c); }
__device__ __forceinline__ double fused(double a, double b, double c) { return fma(a, b, c); }

// The power of two that holds x > 0: scaling by it is exact, and so is its reciprocal. An infinite x is its own.
__device__ __forceinline__ float power_of_two(float x) {
  return is_infinite(x) ? x : ldexpf(1.0f, min(max(ilogbf(x), -126), 126));
}
__device__ __forceinline__ double power_of_two(double x) {
  return is_infinite(x) ? x : ldexp(1.0, min(max(ilogb(x), -1022), 1022));
}

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

  // Calls body with an empty state of the order, whose type it reads.
  template <typename Body>
  __device__ __forceinline__ void for_order(Body body) const {
    if constexpr (EUCLIDEAN) {
      body(NormState<A, NormOrder::two>());
    } else if (other_order == NormOrder::one) {
      body(NormState<A, NormOrder::one>());
    } else if (other_order == NormOrder::infinity) {
      body(NormState<A, NormOrder::infinity>());
    } else {
      body(NormState<A, NormOrder::general>());
    }
  }
};

// scale and sum of a NormState, whatever the order.
template <typename A>
struct ScaledSum {
  A scale;
  A sum;
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
