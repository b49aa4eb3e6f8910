// The loops of gradient_norm.cpp for short rows, a tile at a time; the formulas stand there.
#pragma once

#include "norms.h"
#include "tile.h"

namespace rds_fast::cpu::RDS_FAST_CAPABILITY {

template <typename T, typename F>
RDS_FAST_INLINE Vec<T> each_lane(Vec<T> v, F f) {
  Acc<T> lanes[kLanes<T>];
  store(lanes, v);
  for (int64_t lane = 0; lane < kLanes<T>; ++lane) lanes[lane] = f(lanes[lane]);
  return load(lanes);
}
template <typename T>
RDS_FAST_INLINE Vec<T> square_roots(Vec<T> v) {
  return each_lane<T>(v, [](Acc<T> lane) { return square_root(lane); });
}

// power_of_norm, first_factor and second_factor_root of numerics.h, lane by lane: the powers 1 and 2 without a call.
template <typename T>
RDS_FAST_INLINE Vec<T> powers_of_norms(Vec<T> n, Acc<T> k) {
  if (k == Acc<T>(1)) return n;
  if (k == Acc<T>(2)) return n * n;
  return each_lane<T>(n, [k](Acc<T> lane) { return power_of_norm(lane, k); });
}
template <typename T>
RDS_FAST_INLINE Vec<T> first_factors(Vec<T> n, Acc<T> k) {
  const Vec<T> zero = Vec<T>{};
  if (k == Acc<T>(1)) return n == zero ? zero : splat<T>(1);
  if (k == Acc<T>(2)) return n + n;
  return each_lane<T>(n, [k](Acc<T> lane) { return first_factor(lane, k); });
}
template <typename T>
RDS_FAST_INLINE Vec<T> second_factor_roots(Vec<T> n, Acc<T> k) {
  const Vec<T> zero = Vec<T>{}, one = splat<T>(1);
  if (k == Acc<T>(1)) return n == zero ? zero : one / square_roots<T>(n);
  if (k == Acc<T>(2)) return n == zero ? zero : one;
  return each_lane<T>(n, [k](Acc<T> lane) { return second_factor_root(lane, k); });
}

// The norms of the rows of a tile and, for p = ∞, how many coordinates have the largest magnitude.
template <typename T, NormOrder order>
struct TileNorms {
  using A = Acc<T>;
  Vec<T> n = Vec<T>{}, ties = Vec<T>{};

  RDS_FAST_INLINE TileNorms(const Tile<T>& x, int64_t columns, A p) {
    if constexpr (order == NormOrder::one) {
      for (int64_t c = 0; c < columns; ++c) n += magnitudes(x.columns[c]);
    } else if constexpr (order == NormOrder::infinity) {
      take_largest(x, columns);
    } else {
      take_scaled(x, columns, p);
    }
  }

 private:
  RDS_FAST_INLINE void take_largest(const Tile<T>& x, int64_t columns) {
    const Vec<T> one = splat<T>(1), zero = Vec<T>{};
    Vec<T> nan = zero;
    for (int64_t c = 0; c < columns; ++c) {
      const Vec<T> size = magnitudes(x.columns[c]);
      ties = size > n ? one : ties + (size == n ? one : zero);
      n = larger(size, n);
      nan += size == size ? zero : size;
    }
    ties = nan == nan ? ties : one;
    n = nan == nan ? n : nan;
  }

  RDS_FAST_INLINE void take_scaled(const Tile<T>& x, int64_t columns, A p) {
    const Vec<T> zero = Vec<T>{}, one = splat<T>(1);
    Vec<T> scale = zero, sum = zero, sum_of_sizes = zero;
    for (int64_t c = 0; c < columns; ++c) {
      const Vec<T> size = magnitudes(x.columns[c]);
      scale = larger(size, scale);
      sum_of_sizes += size;
    }
    const auto ordinary = scale > zero ? scale < splat<T>(A(INFINITY)) : scale > zero;
    scale = ordinary ? scale : one;
    for (int64_t c = 0; c < columns; ++c) {
      const Vec<T> ratio = magnitudes(x.columns[c]) / scale;
      if constexpr (order == NormOrder::two) {
        sum += ratio * ratio;
      } else {
        sum += powers(ratio, p);
      }
    }
    sum = ordinary ? sum : sum_of_sizes;  // 0, infinity or NaN
    if constexpr (order == NormOrder::two) {
      n = scale * square_roots<T>(sum);
    } else {
      n = scale * each_lane<T>(sum, [p](A lane) { return power(lane, A(1) / p); });
    }
  }
};

template <typename T, NormOrder order>
void short_norm_forward(const Shape& shape, Rows x, Acc<T> p, Acc<T> k, Results result, Saved saved) {
  using A = Acc<T>;
  A* const kept = static_cast<A*>(saved.data);
  // Out of line, or it would take the registers of the loop below.
  const auto transposed = [&](int64_t first, int64_t count) __attribute__((noinline)) {
    Tile<T> values;
    values.gather(shape, x, first, count);
    const TileNorms<T, order> norms(values, shape.columns, p);
    if (order == NormOrder::infinity) {
      for (int64_t lane = 0; lane < count; ++lane) {
        kept[2 * (first + lane)] = norms.n[lane];
        kept[2 * (first + lane) + 1] = norms.ties[lane];
      }
    } else if (kept != nullptr) {
      store_part(kept + first, norms.n, count);
    }
    set_results<T>(result, first, count, powers_of_norms<T>(norms.n, k));
  };
  if (order != NormOrder::two || x.stride < shape.columns) return for_tiles<T>(shape, transposed);
  const FlatRows<T> rows(shape.columns);
  for_tiles<T>(shape, [&](int64_t first, int64_t count) __attribute__((always_inline)) {
    using Safe = SafeSumOfSquares<A>;
    // Not at the end of the memory: row_sums reads on beyond the tile.
    if (first + 2 * kLanes<T> > shape.rows) return transposed(first, count);
    const Vec<T> sums = rows.row_sums(row_of<T>(x, first), x.stride, [](Vec<T> values) { return values * values; });
    if (!holds_everywhere((sums >= splat<T>(Safe::least)) & (sums <= splat<T>(Safe::largest))))
      return transposed(first, count);
    const Vec<T> n = square_roots<T>(sums);
    if (kept != nullptr) store(kept + first, n);
    set_results<T>(result, first, count, powers_of_norms<T>(n, k));
  });
}

// What norm_forward saved of the rows of a tile; lanes beyond count are 0, as a zero row's.
template <typename T, NormOrder order>
struct SavedNorms {
  using A = Acc<T>;
  Vec<T> n, tie_share;

  RDS_FAST_INLINE SavedNorms(const void* saved, int64_t first, int64_t count) {
    const A* const kept = static_cast<const A*>(saved);
    tie_share = splat<T>(1);
    if constexpr (order == NormOrder::infinity) {
      n = values_of_lanes<A>({kept, 2, true}, first, count);
      tie_share /= values_of_lanes<A>({kept + 1, 2, true}, first, count);
    } else {
      n = load_part(kept + first, count, A(0));
    }
  }
};

// x, gx: contiguous.
template <typename T, NormOrder order>
void short_norm_backward(const Shape& shape, Values g, const T* x, const void* saved, Acc<T> p, Acc<T> k, T* gx) {
  const FlatRows<T> rows(shape.columns);
  for_tiles<T>(shape, [&](int64_t first, int64_t count) {
    const SavedNorms<T, order> norms(saved, first, count);
    const Vec<T> zero = Vec<T>{}, factors = first_factors<T>(norms.n, k) * values_of_lanes<T>(g, first, count);
    rows.write(x + first * shape.columns, gx + first * shape.columns, count, [&](Vec<T> values, int64_t i) {
      const Vec<T> n = rows.spread(norms.n, i);
      const Vec<T> share = order == NormOrder::infinity ? rows.spread(norms.tie_share, i) : norms.tie_share;
      const Vec<T> result = normals<T, order>(values, n, share, p) * rows.spread(factors, i);
      return n == zero ? zero : result;
    });
  });
}

template <typename T, NormOrder order>
void short_norm_double_backward(const Shape& shape, Rows v, Values g, Rows x, const void* saved, Acc<T> p, Acc<T> k,
                                Results dg, void* dx) {
  using A = Acc<T>;
  const bool smooth = order == NormOrder::two && k == A(2);
  const CurvatureFactors<A, order> factors{p, k};
  for_tiles<T>(shape, [&](int64_t first, int64_t count) {
    const SavedNorms<T, order> norms(saved, first, count);
    const Vec<T> zero = Vec<T>{}, root = second_factor_roots<T>(norms.n, k);
    const Vec<T> cotangents = values_of_lanes<T>(g, first, count);
    Tile<T> values, cotangent;
    values.gather(shape, x, first, count);
    cotangent.gather(shape, v, first, count);
    Vec<T> normal[kShort], total = zero;
    for (int64_t c = 0; c < shape.columns; ++c) {
      normal[c] = normals<T, order>(values.columns[c], norms.n, norms.tie_share, p);
      total += normal[c] * cotangent.columns[c];
    }
    total = norms.n == zero ? zero : total;
    set_results<T>(dg, first, count, first_factors<T>(norms.n, k) * total);
    for (int64_t c = 0; c < shape.columns; ++c) {
      Vec<T> bracket = normal[c] * (factors.of_normal * total);
      if constexpr (order == NormOrder::two || order == NormOrder::general) {
        const Vec<T> w = curvatures<T, order>(values.columns[c], norms.n, p);
        bracket = cotangent.columns[c] * factors.of_v * w + bracket;
      }
      const Vec<T> result = bracket * root * (cotangents * root);
      values.columns[c] = smooth ? cotangent.columns[c] * (cotangents + cotangents) : norms.n == zero ? zero : result;
    }
    values.scatter(shape, dx, first, count);
  });
}

}  // namespace rds_fast::cpu::RDS_FAST_CAPABILITY
