// exp, log and the normal distribution's tail of vectors, accurate to about one unit in the last place, with IEEE's
// values at infinities and NaN.
#pragma once

#include "vec.h"

namespace rds_fast::cpu::RDS_FAST_CAPABILITY {

// exp x = 2ⁿ exp r, n = round(x / ln 2), |r| ≤ ln 2 / 2. ln 2 is split in two so that r is exact to the last place.
// Adding 1.5·2^(mantissa bits) rounds to an integer, which then stands in the low bits.
template <typename A>
struct ExpConstants;
template <>
struct ExpConstants<float> {
  static constexpr float rounder = 0x1.8p23f, low = -104.0f, high = 89.0f;
  static constexpr float ln2_high = 0x1.62e4p-1f, ln2_low = 0x1.7f7d1cp-20f;
  static constexpr int mantissa_bits = 23, bias = 127;
};
template <>
struct ExpConstants<double> {
  static constexpr double rounder = 0x1.8p52, low = -746.0, high = 710.0;
  static constexpr double ln2_high = 0x1.62e42fefa0000p-1, ln2_low = 0x1.cf79abc9e3b3ap-40;
  static constexpr int mantissa_bits = 52, bias = 1023;
};

// (exp r − 1 − r) / r², by a Chebyshev fit for float32 and Taylor's series for float64.
RDS_FAST_INLINE FloatVec exp_tail(FloatVec r) {
  FloatVec q = r * 0x1.6d1606p-10f + 0x1.12106cp-7f;
  q = q * r + 0x1.555516p-5f;
  q = q * r + 0x1.5554d8p-3f;
  return q * r + 0.5f;
}
RDS_FAST_INLINE DoubleVec exp_tail(DoubleVec r) {
  DoubleVec q = r * (1.0 / 6227020800.0) + 1.0 / 479001600.0;
  q = q * r + 1.0 / 39916800.0;
  q = q * r + 1.0 / 3628800.0;
  q = q * r + 1.0 / 362880.0;
  q = q * r + 1.0 / 40320.0;
  q = q * r + 1.0 / 5040.0;
  q = q * r + 1.0 / 720.0;
  q = q * r + 1.0 / 120.0;
  q = q * r + 1.0 / 24.0;
  q = q * r + 1.0 / 6.0;
  return q * r + 0.5;
}

// value · 2ⁿ, n an integer in the low bits of rounded. In two steps where one exponent field cannot hold n.
#if defined(__AVX512F__)
RDS_FAST_INLINE FloatVec scale_by_power(FloatVec value, FloatVec, FloatVec n) {
  return (FloatVec)_mm512_maskz_scalef_ps(0xffff, (__m512)value, (__m512)n);
}
RDS_FAST_INLINE DoubleVec scale_by_power(DoubleVec value, DoubleVec, DoubleVec n) {
  return (DoubleVec)_mm512_maskz_scalef_pd(0xff, (__m512d)value, (__m512d)n);
}
#else
template <typename V>
RDS_FAST_INLINE V scale_by_power(V value, V rounded, V) {
  using A = decltype(value[0] + 0);
  using C = ExpConstants<A>;
  using Bits = BitsVec<A>;
  const V rounder = C::rounder - V{};
  const Bits n = bits_as<Bits>(rounded) - bits_as<Bits>(rounder);
  const Bits half = n >> 1;
  const V first = bits_as<V>((half + C::bias) << C::mantissa_bits);
  const V second = bits_as<V>((n - half + C::bias) << C::mantissa_bits);
  return value * first * second;
}
#endif

template <typename V>
RDS_FAST_INLINE V exponentials(V x) {
  using C = ExpConstants<decltype(x[0] + 0)>;
  x = larger(C::low - V{}, x);  // in this order a NaN stays
  x = smaller(C::high - V{}, x);
  const V rounded = x * decltype(x[0] + 0)(0x1.71547652b82fep0) + C::rounder;
  const V n = rounded - C::rounder;
  const V r = (x - n * C::ln2_high) - n * C::ln2_low;
  const V value = (exp_tail(r) * r) * r + r + 1;
  return scale_by_power(value, rounded, n);
}

// log x, x ≥ 0 normal: x = 2ᵉ m, m in [√½, √2), log m = 2 artanh((m − 1)/(m + 1)) by its series.
template <typename V>
RDS_FAST_INLINE V logarithms(V x) {
  using A = decltype(x[0] + 0);
  using C = ExpConstants<A>;
  using Bits = BitsVec<A>;
  const V root_half = A(0.70710678118654752) - V{};
  const Bits base = bits_as<Bits>(root_half);
  const Bits exponent = (bits_as<Bits>(x) - base) >> C::mantissa_bits;
  const V m = bits_as<V>(bits_as<Bits>(x) - (exponent << C::mantissa_bits));
  const V e = __builtin_convertvector(exponent, V);
  const V s = (m - 1) / (m + 1);
  const V z = s * s;
  V series = z * 0;
  for (int k = sizeof(A) == 4 ? 5 : 11; k > 0; --k) series = (series + A(2) / A(2 * k + 1)) * z;
  return e * C::ln2_high + (e * C::ln2_low + (s * series + 2 * s));
}

// log of a sum of exponentials relative to its largest: 0, at least 1, infinite, or NaN.
template <typename V>
RDS_FAST_INLINE V logarithms_of_sums(V sum) {
  using A = decltype(sum[0] + 0);
  const V infinity = A(INFINITY) - V{};
  const V log = sum < infinity ? logarithms(sum) : sum;  // infinity and NaN stay
  return sum == V{} ? -infinity : log;
}

// ratioᵖ for ratios in [0, 1] and any exponent; 0 where the ratio is 0. The error of the logarithm, times the exponent,
// is small beside 1 wherever the power is not negligible.
template <typename V>
RDS_FAST_INLINE V powers(V ratio, decltype(V{}[0] + 0) exponent) {
  using A = decltype(ratio[0] + 0);
  const A tiny = sizeof(A) == 4 ? A(0x1p-126) : A(0x1p-1022);
  const A lift = sizeof(A) == 4 ? A(0x1p24) : A(0x1p53);
  const A log_lift = sizeof(A) == 4 ? A(24 * 0.69314718055994531) : A(53 * 0.69314718055994531);
  const V zero = V{};
  const auto subnormal = ratio < tiny;
  const V log = logarithms(subnormal ? ratio * lift : ratio) - (subnormal ? log_lift - zero : zero);
  const V result = exponentials(log * exponent);
  return ratio == ratio ? (ratio > zero ? result : zero) : ratio;
}

// The upper tail of the normal distribution, Q(z) = 1 − Φ(z) for z ≥ 0, is exp(−z²/2) t P(2t − 1), t = 1/(1 + z/4): P
// is smooth on all of [−1, 1], and these are its coefficients, highest first, by Chebyshev interpolation. Relative to
// Q(z) the error of the fit is 7e-8 and 5e-16.
template <typename A>
struct NormalTail;
template <>
struct NormalTail<float> {
  static constexpr float coefficients[] = {0x1.5507f800p-15f, 0x1.0f3ef400p-15f, -0x1.9d12ee00p-12f, -0x1.c7a1cc00p-11f,
                                           0x1.ece9ba00p-10f, 0x1.eec22800p-7f,  0x1.7e006400p-5f,   0x1.8c6dca00p-4f,
                                           0x1.373e3800p-3f,  0x1.82b4bc00p-3f};
};
template <>
struct NormalTail<double> {
  static constexpr double coefficients[] = {
      -0x1.e78fe44c6fb4dp-32, 0x1.611a6a07c4bcep-32, 0x1.1c164b45b4ac9p-28, -0x1.50de63364da6fp-28,
      -0x1.5729568b84844p-26, 0x1.5c93e9416215dp-25, 0x1.1ddd8315570c8p-24, -0x1.13b56c3a0bd11p-22,
      -0x1.503137c116ebcp-23, 0x1.8d7c04c435b27p-20, 0x1.800279cc5207bp-23, -0x1.26d2b271a34c2p-17,
      -0x1.001333bee4c0ep-21, 0x1.e4a443ad3d1d8p-15, 0x1.17a4a7652da6fp-15, -0x1.ab826048dffbap-12,
      -0x1.c81719cc299efp-11, 0x1.ee27610731dedp-10, 0x1.eec4cc3e4797ap-7,  0x1.7dff2bff676bbp-5,
      0x1.8c6dbf2cfc2d3p-4,   0x1.373e3a893c293p-3,  0x1.82b4bb8c94dcep-3};
};

// Q(z) of z ≥ 0, given exp(−z²/2).
template <typename V>
RDS_FAST_INLINE V normal_tails(V z, V exponential) {
  using A = decltype(z[0] + 0);
  const V t = 1 / (1 + z * A(0.25));
  const V u = 2 * t - 1;
  V polynomial = V{};
#pragma GCC unroll 32
  for (const A coefficient : NormalTail<A>::coefficients) polynomial = polynomial * u + coefficient;
  return exponential * t * polynomial;
}

}  // namespace rds_fast::cpu::RDS_FAST_CAPABILITY
