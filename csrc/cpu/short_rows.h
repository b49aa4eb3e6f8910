// The loops of softmax.h for short rows: as many rows at once as a vector has lanes, column by column, so that nothing
// is reduced across lanes and no row has a remainder.
#pragma once

#include "softmax.h"
#include "tile.h"

namespace rds_fast::cpu::RDS_FAST_CAPABILITY {

// q' of the lanes' rows.
template <typename T, typename Target>
struct LaneTargets {  // none
  RDS_FAST_INLINE LaneTargets(const Target&, int64_t, int64_t) {}
  RDS_FAST_INLINE Vec<T> total() const { return Vec<T>{}; }
  RDS_FAST_INLINE Vec<T> column(int64_t) const { return Vec<T>{}; }
};
template <typename T>
struct LaneTargets<T, IndexTarget<T>> {
  using A = Acc<T>;
  BitsVec<A> index;
  Vec<T> on, off, totals;

  RDS_FAST_INLINE LaneTargets(const IndexTarget<T>& target, int64_t first, int64_t count) {
    typename Traits<T>::Bits indices[kLanes<T>];  // not vectors: writing one lane of a vector stores and reloads it
    A totals_of_lanes[kLanes<T>];
    for (int64_t lane = 0; lane < kLanes<T>; ++lane) {
      const auto row = target.row(first + (lane < count ? lane : 0));
      indices[lane] = row.index;
      totals_of_lanes[lane] = row.weights.total;
    }
    std::memcpy(&index, indices, sizeof(index));
    totals = load(totals_of_lanes);  // 1, or 0 in an ignored row
    on = totals * target.weights.on;
    off = totals * target.weights.off;
  }
  RDS_FAST_INLINE BitsVec<A> is_class(int64_t c) const {
    return index == BitsVec<A>{} + static_cast<typename Traits<T>::Bits>(c);
  }
  RDS_FAST_INLINE Vec<T> total() const { return totals; }
  RDS_FAST_INLINE Vec<T> column(int64_t c) const { return is_class(c) ? on + off : off; }

  // Q l − Σ q' f relative to the target's logit; see IndexTarget.
  RDS_FAST_INLINE Vec<T> cross_entropy(const Tile<T>& f, int64_t columns, Vec<T> max, Vec<T> log_sum) const {
    const Vec<T> zero = Vec<T>{}, infinity = splat<T>(A(INFINITY));
    Vec<T> of_class = zero, sum = zero;
    for (int64_t c = 0; c < columns; ++c) of_class = is_class(c) ? f.columns[c] : of_class;
    const Vec<T> reference = magnitudes(of_class) < infinity ? of_class : zero;
    for (int64_t c = 0; c < columns; ++c) sum += f.columns[c] - reference;
    const Vec<T> from_class = on == zero ? zero : on * (of_class - reference);
    const Vec<T> expected = off == zero ? from_class : from_class + off * sum;
    const Vec<T> ce = magnitudes(log_sum) < infinity ? ((max - reference) + log_sum) - expected : splat<T>(A(NAN));
    return totals == zero ? zero : ce;
  }
};

template <typename T, typename Target>
void short_forward(const Shape& shape, Rows x, const Target& target, Results ce, Results lse, Saved saved) {
  using A = Acc<T>;
  for_tiles<T>(shape, [&](int64_t first, int64_t count) {
    Tile<T> f;
    f.gather(shape, x, first, count);
    OnlineSum<T> online;
    for (int64_t c = 0; c < shape.columns; ++c) online.max = larger(f.columns[c], online.max);
    online.max = smaller(splat<T>(OnlineSum<T>::kLargest), online.max);
    for (int64_t c = 0; c < shape.columns; ++c) online.sum += exponentials(f.columns[c] - online.max);
    const Vec<T> log_sum = logarithms_of_sums(online.sum);
    set_results<T>(lse, first, count, online.max + log_sum);
    if (saved.data != nullptr) store_part(static_cast<A*>(saved.data) + first, online.max + log_sum, count);
    if constexpr (Target::present) {
      const LaneTargets<T, Target> q(target, first, count);
      set_results<T>(ce, first, count, q.cross_entropy(f, shape.columns, online.max, log_sum));
    }
  });
}

// normaliser of softmax.h, lane by lane.
template <typename T>
RDS_FAST_INLINE Vec<T> normalisers(Vec<T> sums_of_softmax) {
  const Vec<T> one = splat<T>(1);
  return sums_of_softmax > Acc<T>(0.5) ? (sums_of_softmax < Acc<T>(2) ? one / sums_of_softmax : one) : one;
}

// The softmax of a tile, what each row of it sums to, and the factor of s in the backward.
template <typename T, typename Target>
struct TileSoftmax {
  using A = Acc<T>;
  Vec<T> softmax[kShort];
  Vec<T> normaliser, g_ce, a;

  RDS_FAST_INLINE TileSoftmax(const Tile<T>& f, const LaneTargets<T, Target>& q, const Cotangents<T, Target>& g,
                              const void* lse, int64_t first, int64_t count, int64_t columns) {
    const Vec<T> l = load_part(static_cast<const A*>(lse) + first, count, A(0));
    const Vec<T> zero = Vec<T>{};
    Vec<T> sum = zero;
    for (int64_t c = 0; c < columns; ++c) {
      softmax[c] = exponentials(f.columns[c] - l);
      sum += softmax[c];
    }
    normaliser = normalisers<T>(sum);
    a = values_of_lanes<T>(g.g_lse, first, count);
    if constexpr (Target::present) {
      g_ce = values_of_lanes<T>(g.g_ce, first, count);
      a = q.total() == zero ? a : g_ce * q.total() + a;
    }
  }
};

// gx = g s.
template <typename T>
void flat_backward(const Shape& shape, Values g, const T* x, const void* lse, T* gx) {
  using A = Acc<T>;
  const FlatRows<T> rows(shape.columns);
  for_tiles<T>(shape, [&](int64_t first, int64_t count) {
    const Vec<T> l = load_part(static_cast<const A*>(lse) + first, count, A(0));
    const Vec<T> factor = values_of_lanes<T>(g, first, count);
    rows.write(x + first * shape.columns, gx + first * shape.columns, count, [&](Vec<T> values, int64_t i) {
      return exponentials(values - rows.spread(l, i)) * rows.spread(factor, i);
    });
  });
}

template <typename T, typename Target>
void short_backward(const Shape& shape, Cotangents<T, Target> g, Rows x, const Target& target, const void* lse,
                    void* gx) {
  if constexpr (!Target::present) {
    if (x.stride == shape.columns) {
      return flat_backward<T>(shape, g.g_lse, static_cast<const T*>(x.data), lse, static_cast<T*>(gx));
    }
  }
  for_tiles<T>(shape, [&](int64_t first, int64_t count) {
    Tile<T> f;
    f.gather(shape, x, first, count);
    const LaneTargets<T, Target> q(target, first, count);
    const TileSoftmax<T, Target> s(f, q, g, lse, first, count, shape.columns);
    const Vec<T> a = Target::present ? s.a * s.normaliser : s.a;
    for (int64_t c = 0; c < shape.columns; ++c) {
      Vec<T> value = s.softmax[c] * a;
      if constexpr (Target::present) value = q.total() == Vec<T>{} ? value : value - s.g_ce * q.column(c);
      f.columns[c] = value;
    }
    f.scatter(shape, gx, first, count);
  });
}

// dg = Σ v s,  dx = g s (v − Σ v s).
template <typename T>
void flat_double_backward(const Shape& shape, const T* v, Values g, const T* x, const void* lse, Results dg, T* dx) {
  using A = Acc<T>;
  constexpr int64_t L = kLanes<T>;
  const FlatRows<T> rows(shape.columns);
  for_tiles<T>(shape, [&](int64_t first, int64_t count) {
    const int64_t offset = first * shape.columns;
    const Vec<T> l = load_part(static_cast<const A*>(lse) + first, count, A(0));
    A softmax[(kShort + 1) * L], weighted[(kShort + 1) * L];
    if (count < L) {  // the sums of the rows that are not there
      std::memset(softmax, 0, sizeof(softmax));
      std::memset(weighted, 0, sizeof(weighted));
    }
    rows.visit(count, [&](auto at, int64_t i) {
      const Vec<T> s = exponentials(at(x + offset, A(0)) - rows.spread(l, i));
      store(softmax + at.i, s);
      store(weighted + at.i, s * at(v + offset, A(0)));
    });
    const auto itself = [](Vec<T> values) { return values; };
    const Vec<T> normaliser = normalisers<T>(rows.row_sums(softmax, shape.columns, itself));
    const Vec<T> mean = rows.row_sums(weighted, shape.columns, itself) * normaliser;
    set_results<T>(dg, first, count, mean);
    const Vec<T> factor = values_of_lanes<T>(g, first, count);
    rows.write(v + offset, dx + offset, count, [&](Vec<T> cotangent, int64_t i) {
      return load(softmax + i * L) * rows.spread(factor, i) * (cotangent - rows.spread(mean, i));
    });
  });
}

template <typename T, typename Target>
void short_double_backward(const Shape& shape, Rows v, Cotangents<T, Target> g, Rows x, const Target& target,
                           const void* lse, Results dg_ce, Results dg_lse, void* dx) {
  if constexpr (!Target::present) {
    if (x.stride == shape.columns && v.stride == shape.columns) {
      return flat_double_backward<T>(shape, static_cast<const T*>(v.data), g.g_lse, static_cast<const T*>(x.data), lse,
                                     dg_lse, static_cast<T*>(dx));
    }
  }
  for_tiles<T>(shape, [&](int64_t first, int64_t count) {
    Tile<T> f, cotangent;
    f.gather(shape, x, first, count);
    cotangent.gather(shape, v, first, count);
    const LaneTargets<T, Target> q(target, first, count);
    const TileSoftmax<T, Target> s(f, q, g, lse, first, count, shape.columns);
    Vec<T> of_softmax = Vec<T>{}, of_target = Vec<T>{};
    for (int64_t c = 0; c < shape.columns; ++c) {
      of_softmax += cotangent.columns[c] * s.softmax[c];
      if constexpr (Target::present) of_target += cotangent.columns[c] * q.column(c);
    }
    of_softmax *= s.normaliser;
    set_results<T>(dg_lse, first, count, of_softmax);
    if constexpr (Target::present) {
      const Vec<T> scaled = q.total() == Vec<T>{} ? Vec<T>{} : q.total() * of_softmax;
      set_results<T>(dg_ce, first, count, scaled - of_target);
    }
    for (int64_t c = 0; c < shape.columns; ++c) {
      f.columns[c] = s.softmax[c] * s.a * (cotangent.columns[c] - of_softmax);
    }
    f.scatter(shape, dx, first, count);
  });
}

}  // namespace rds_fast::cpu::RDS_FAST_CAPABILITY
