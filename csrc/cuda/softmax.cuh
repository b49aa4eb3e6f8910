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

__device__ __forceinline__ float larger_of(float a, float b) { return fmaxf(a, b); }  // of a NaN and b: b
__device__ __forceinline__ double larger_of(double a, double b) { return fmax(a, b); }

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

// Takes COUNT numbers into the state: one rescaling for all of them, and only where the maximum grows.
template <typename A, int COUNT>
__device__ __forceinline__ void push(LogSumExpState<A>& state, const A (&x)[COUNT]) {
  A larger = state.max;
#pragma unroll
  for (int i = 0; i < COUNT; ++i) larger = larger_of(larger, x[i]);
  const A shift = state.shift_of(larger);
  if (larger > state.max && state.sum != A(0)) state.sum *= softmax_term(state.shift(), shift);
  A sum = 0;
#pragma unroll
  for (int i = 0; i < COUNT; ++i) sum += softmax_term(x[i], shift);
  state.sum += sum;
  state.max = larger;
}

}  // namespace rds_fast::cuda
