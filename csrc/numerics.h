// The arithmetic that CPU and CUDA kernels share: states of online reductions, and the scalar factors of derivatives.
//
// A state is a small value with push (one element), merge (another state) and value. Any split of a row into states,
// merged in any order, gives the same result up to rounding; the empty state is neutral.
//
// Every function is forced inline: the CPU kernels are compiled several times with different instruction sets, and an
// out-of-line copy made with AVX-512 must never be the one that the linker keeps for the baseline.
#pragma once

#include <math.h>

#if defined(__CUDACC__)
#define RDS_FAST_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define RDS_FAST_HOST_DEVICE __attribute__((always_inline)) inline
#endif

namespace rds_fast {

// The C functions, by overload. (Those of <cmath> in namespace std are out-of-line templates in some builds.)
RDS_FAST_HOST_DEVICE float exponential(float x) { return ::expf(x); }
RDS_FAST_HOST_DEVICE double exponential(double x) { return ::exp(x); }
RDS_FAST_HOST_DEVICE float logarithm(float x) { return ::logf(x); }
RDS_FAST_HOST_DEVICE double logarithm(double x) { return ::log(x); }
RDS_FAST_HOST_DEVICE float power(float x, float exponent) { return ::powf(x, exponent); }
RDS_FAST_HOST_DEVICE double power(double x, double exponent) { return ::pow(x, exponent); }
RDS_FAST_HOST_DEVICE float square_root(float x) { return ::sqrtf(x); }
RDS_FAST_HOST_DEVICE double square_root(double x) { return ::sqrt(x); }
RDS_FAST_HOST_DEVICE float magnitude(float x) { return ::fabsf(x); }
RDS_FAST_HOST_DEVICE double magnitude(double x) { return ::fabs(x); }

template <typename T>
RDS_FAST_HOST_DEVICE bool is_infinite(T x) {
  return magnitude(x) == static_cast<T>(INFINITY);
}

template <typename T>
RDS_FAST_HOST_DEVICE bool is_nan(T x) {
  return !(x == x);
}

// log Σ exp xᵢ, online: max is the largest xᵢ so far, sum = Σ exp(xᵢ − shift), where shift is max if that is finite and
// else 0. With shift 0, a row of −inf has sum 0 and the value −inf, and a +inf makes sum and value +inf: (−inf) −
// (−inf) and inf − inf are never formed. A NaN lives on in sum.
template <typename T>
struct LogSumExpState {
  T max = -static_cast<T>(INFINITY);
  T sum = 0;

  static RDS_FAST_HOST_DEVICE T shift_of(T max) { return is_infinite(max) ? T(0) : max; }
  RDS_FAST_HOST_DEVICE T shift() const { return shift_of(max); }

  RDS_FAST_HOST_DEVICE void push(T x) { merge({x, is_infinite(x) ? exponential(x) : x == x ? T(1) : x}); }

  RDS_FAST_HOST_DEVICE void merge(LogSumExpState other) {
    const T larger = other.max > max ? other.max : max;
    const T shift = shift_of(larger);
    sum = scaled(sum, this->shift() - shift) + scaled(other.sum, other.shift() - shift);
    max = larger;
  }

  RDS_FAST_HOST_DEVICE T value() const { return shift() + logarithm(sum); }

 private:
  // An empty sum stays 0 even where the factor overflows. Where a NaN makes the difference NaN, the sum is NaN already.
  static RDS_FAST_HOST_DEVICE T scaled(T sum, T difference) {
    return sum == T(0) || difference == T(0) ? sum : sum * exponential(difference);
  }
};

// How the p-norm of a row is reduced.
enum class NormOrder { one, two, general, infinity };

RDS_FAST_HOST_DEVICE NormOrder norm_order(double p) {
  if (p == 1.0) return NormOrder::one;
  if (p == 2.0) return NormOrder::two;
  return p < static_cast<double>(INFINITY) ? NormOrder::general : NormOrder::infinity;
}

// Numbers that the forward leaves for the derivatives of r = ‖x‖ₚᵏ: the norm, unless the result is the norm to all its
// digits, and for p = ∞ the number of coordinates that attain it as well.
RDS_FAST_HOST_DEVICE int saved_of_norm(double p, double power, bool result_is_wide) {
  return norm_order(p) == NormOrder::infinity ? 2 : power == 1.0 && result_is_wide ? 0 : 1;
}

// ‖x‖ₚ = scale (Σ (|xᵢ| / scale)ᵖ)^(1/p), online: scale is the largest |xᵢ| so far and sum the sum, so that no power
// overflows, and none that matters underflows. While scale is 0 or infinite the divisor is 1, so that 0/0 and inf/inf
// are never formed. A NaN lives on in sum.
template <typename T, NormOrder order>
struct NormState {
  T scale = 0;
  T sum = 0;

  static RDS_FAST_HOST_DEVICE T divisor_of(T scale) { return scale == T(0) || is_infinite(scale) ? T(1) : scale; }
  static RDS_FAST_HOST_DEVICE T raised(T ratio, T p) {
    return order == NormOrder::two ? ratio * ratio : power(ratio, p);
  }

  RDS_FAST_HOST_DEVICE void push(T x, T p) {
    const T size = magnitude(x);
    rescale(size, p);
    sum += raised(size / divisor_of(scale), p);
  }

  RDS_FAST_HOST_DEVICE void merge(NormState other, T p) {
    rescale(other.scale, p);
    other.rescale(scale, p);
    sum += other.sum;
  }

  RDS_FAST_HOST_DEVICE T value(T p) const {
    return divisor_of(scale) * (order == NormOrder::two ? square_root(sum) : power(sum, T(1) / p));
  }

 private:
  RDS_FAST_HOST_DEVICE void rescale(T larger, T p) {
    if (!(larger > scale)) return;
    if (sum != T(0)) sum *= raised(divisor_of(scale) / divisor_of(larger), p);  // 0 stays 0 where the factor overflows
    scale = larger;
  }
};

// ‖x‖₁ needs no scale: its partial sums overflow only where the norm itself does.
template <typename T>
struct NormState<T, NormOrder::one> {
  T scale = 0;  // unused; here so that every order has the same members
  T sum = 0;

  RDS_FAST_HOST_DEVICE void push(T x, T) { sum += magnitude(x); }
  RDS_FAST_HOST_DEVICE void merge(NormState other, T) { sum += other.sum; }
  RDS_FAST_HOST_DEVICE T value(T) const { return sum; }
};

// ‖x‖∞: scale is the largest |xᵢ| and sum the number of coordinates that have it, among which the gradient is shared.
template <typename T>
struct NormState<T, NormOrder::infinity> {
  T scale = 0;
  T sum = 0;

  RDS_FAST_HOST_DEVICE void push(T x, T p) { merge({magnitude(x), T(1)}, p); }
  RDS_FAST_HOST_DEVICE void merge(NormState other, T) {
    if (other.scale == scale) {
      sum += other.sum;
    } else if (other.scale > scale || is_nan(other.scale)) {  // a NaN stays: nothing is larger than it
      *this = other;
    }
  }
  RDS_FAST_HOST_DEVICE T value(T) const { return scale; }
};

// Σ x², summed without a scale over 2¹⁴ values or fewer, is right between these bounds: no square and no sum of 2²⁸
// such sums overflowed, and what underflowed, at most 2⁻¹⁵⁰ (2⁻¹⁰⁷⁵) a value, is below half an ulp of it. NaN and
// infinity are outside.
template <typename T>
struct SafeSumOfSquares {
  static constexpr T least = sizeof(T) == 4 ? 0x1p-100 : 0x1p-960;
  static constexpr T largest = sizeof(T) == 4 ? 0x1p100 : 0x1p960;
};

// x / n with one division a row: (x · scale) · reciprocal. scale is a power of two that keeps 1/n a normal number where
// n is nearly as small or as large as numbers are.
template <typename T>
struct Quotient {
  T scale;
  T reciprocal;

  explicit RDS_FAST_HOST_DEVICE Quotient(T n) {
    const T small = sizeof(T) == 4 ? T(0x1p-64) : T(0x1p-512);
    scale = n < small ? T(1) / small : n > T(1) / small ? small : T(1);
    reciprocal = T(1) / (n * scale);
  }
  RDS_FAST_HOST_DEVICE T operator()(T x) const { return (x * scale) * reciprocal; }
};

// The three factors of r = nᵏ, n ≥ 0, k > 0. A derivative at n = 0 is 0: there r has none, or its subgradient 0 is
// meant. r itself:
template <typename T>
RDS_FAST_HOST_DEVICE T power_of_norm(T n, T k) {
  return k == T(1) ? n : k == T(2) ? n * n : power(n, k);
}

// dr/dn = k nᵏ⁻¹:
template <typename T>
RDS_FAST_HOST_DEVICE T first_factor(T n, T k) {
  if (n == T(0)) return T(0);
  return k == T(1) ? T(1) : k == T(2) ? T(2) * n : k * power(n, k - T(1));
}

// h with h h = nᵏ⁻², which is to be multiplied twice: nᵏ⁻² alone overflows where the derivative need not.
template <typename T>
RDS_FAST_HOST_DEVICE T second_factor_root(T n, T k) {
  if (n == T(0)) return T(0);
  return k == T(2) ? T(1) : k == T(1) ? T(1) / square_root(n) : power(n, (k - T(2)) / T(2));
}

// With the p-norm's gradient u and w = (|x|/n)^(p−2), the second derivative of r applied to v is
//     k nᵏ⁻² [(p−1) w v + (k−p) u (u·v)];  p = 1 and p = ∞ have no curvature of their own: k (k−1) nᵏ⁻² u (u·v).
// These are the two coefficients in the brackets, k included.
template <typename T, NormOrder order>
struct CurvatureFactors {
  T of_v;       // k (p − 1), or 0
  T of_normal;  // k (k − p), or k (k − 1)

  RDS_FAST_HOST_DEVICE CurvatureFactors(T p, T k) {
    const bool flat = order == NormOrder::one || order == NormOrder::infinity;
    of_v = flat ? T(0) : k * (p - T(1));
    of_normal = flat ? k * (k - T(1)) : k * (k - p);
  }
};

// The smoothed target distribution q' of a class index: off everywhere, and on in addition at the target.
template <typename T>
struct SmoothedTarget {
  T on;     // 1 − ε
  T off;    // ε / C
  T total;  // Q = Σ q'

  RDS_FAST_HOST_DEVICE SmoothedTarget(double label_smoothing, long long classes, bool ignored) {
    on = ignored ? T(0) : T(1.0 - label_smoothing);
    off = ignored ? T(0) : T(label_smoothing / static_cast<double>(classes));
    total = ignored ? T(0) : T(1);
  }
};

}  // namespace rds_fast
