// What the log-sum-exp and the cross-entropy share.
#pragma once

#include "memory.cuh"

namespace rds_fast::cuda {

// exp(x − l). The difference is taken first and only then scaled to base 2: x log₂e − l log₂e would lose the digits
// that large logits have in common. The hardware's exp2 is within 2 ulp, and a result below 2⁻¹²⁶ may become 0.
__device__ __forceinline__ float softmax_term(float x, float lse) {
  const float exponent = (x - lse) * 1.44269504088896341f;
#ifdef __CUDA_ARCH__
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(exponent));
  return result;
#else
  return exp2f(exponent);
#endif
}
__device__ __forceinline__ double softmax_term(double x, double lse) { return exp(x - lse); }

// a b, rounded: never part of a fused operation, which would leave a rest where two equal products cancel.
__device__ __forceinline__ float product(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}
__device__ __forceinline__ double product(double a, double b) {
#ifdef __CUDA_ARCH__
  return __dmul_rn(a, b);
#else
  return a * b;
#endif
}

// The state of a log-sum-exp: Σ exp(x − shift), where shift is the largest x so far if that is finite and else 0, as in
// LogSumExpState.
template <typename A>
__device__ __forceinline__ A shift_of(A anchor) {
  return LogSumExpState<A>::shift_of(anchor);
}

// A sum of exponentials relative to another shift. An empty one stays empty, even where the factor overflows.
template <typename A>
__device__ __forceinline__ A moved(A sum, A old_shift, A shift) {
  return sum == A(0) ? sum : sum * softmax_term(old_shift, shift);
}

template <typename A, int COUNT>
__device__ __forceinline__ A sum_of_terms(const A (&x)[COUNT], A shift) {
  A sum = 0;
#pragma unroll
  for (int i = 0; i < COUNT; ++i) sum += softmax_term(x[i], shift);
  return sum;
}

}  // namespace rds_fast::cuda
