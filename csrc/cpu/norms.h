// u = ∇n and w = (|x|/n)^(p−2) of vectors, n = ‖x‖ₚ; the rows that their lanes belong to may differ.
#pragma once

#include "elementary.h"
#include "rows.h"

namespace rds_fast::cpu::RDS_FAST_CAPABILITY {

// tie_share: 1 / the number of coordinates with |x| = n, for p = ∞. A true division: where |x| = n the ratio is 1, u v
// cancels w v, and the curvature along the norm is 0 exactly.
template <typename T, NormOrder order>
RDS_FAST_INLINE Vec<T> normals(Vec<T> x, Vec<T> n, Vec<T> tie_share, Acc<T> p) {
  const Vec<T> zero = Vec<T>{};
  if constexpr (order == NormOrder::two) {
    return x / n;
  } else if constexpr (order == NormOrder::one) {
    return x == x ? (x == zero ? zero : with_sign(splat<T>(1), x)) : x;
  } else if constexpr (order == NormOrder::infinity) {
    return magnitudes(x) == n ? with_sign(tie_share, x) : (n == n ? zero : n);
  } else {
    return with_sign(powers(magnitudes(x) / n, p - Acc<T>(1)), x);
  }
}

template <typename T, NormOrder order>
RDS_FAST_INLINE Vec<T> curvatures(Vec<T> x, Vec<T> n, Acc<T> p) {
  if constexpr (order == NormOrder::general) return powers(magnitudes(x) / n, p - Acc<T>(2));
  return splat<T>(1);
}

}  // namespace rds_fast::cpu::RDS_FAST_CAPABILITY
