// r = nᵏ, n = ‖x‖ₚ of rows, with its derivatives. With u = ∇n and w = (|x|/n)^(p−2):
//
//     backward           gx = g k nᵏ⁻¹ u
//     double backward    dg = k nᵏ⁻¹ u·v,  dx = g k nᵏ⁻² [(p−1) w v + (k−p) u (u·v)]
//
// p = 2: u = x/n.  p = 1: u = sign x.  p = ∞: u = sign x / ties where |x| = n.  Else u = sign x (|x|/n)^(p−1).
// At n = 0 both are 0, but for p = k = 2, where r = Σ x² is smooth: dx = 2 g v.
#include "short_norms.h"

namespace rds_fast::cpu::RDS_FAST_CAPABILITY {

template <typename T, NormOrder order>
using State = NormState<Acc<T>, order>;

template <typename T>
RDS_FAST_INLINE Acc<T> largest_magnitude(const T* x, int64_t begin, int64_t end) {
  Vec<T> largest[4] = {};
  for_vectors<T>(begin, end, [&](auto at, int k) { largest[k] = larger(magnitudes(at(x, Acc<T>(0))), largest[k]); });
  return largest_lane<T>(larger(larger(largest[0], largest[1]), larger(largest[2], largest[3])));
}

// Σ f(values) over a part of a row, f(0) = 0.
template <typename T, typename F>
RDS_FAST_INLINE Acc<T> sum_over(const T* x, int64_t begin, int64_t end, F f) {
  Vec<T> sums[4] = {};
  for_vectors<T>(begin, end, [&](auto at, int k) { sums[k] += f(at(x, Acc<T>(0))); });
  return sum_of_lanes<T>(sum_of_four<T>(sums));
}

// Squares are summed as they are, which nearly always is right, and where it is not the part is read again.
template <typename T>
RDS_FAST_INLINE State<T, NormOrder::two> sum_of_squares(const T* x, int64_t begin, int64_t end) {
  using A = Acc<T>;
  const A sum = sum_over(x, begin, end, [](Vec<T> values) { return values * values; });
  if (sum >= SafeSumOfSquares<A>::least && sum <= SafeSumOfSquares<A>::largest) return {A(1), sum};
  const A max = largest_magnitude(x, begin, end);
  if (max == A(0) || is_infinite(max)) return {max, sum};  // sum: 0, infinity or NaN
  return {max, sum_over(x, begin, end, [&](Vec<T> values) { return (values / max) * (values / max); })};
}

template <typename T>
RDS_FAST_INLINE State<T, NormOrder::general> sum_of_powers(const T* x, int64_t begin, int64_t end, Acc<T> p) {
  using A = Acc<T>;
  const A max = largest_magnitude(x, begin, end);
  if (max == A(0) || is_infinite(max)) {  // 0, infinity or NaN
    return {max, sum_over(x, begin, end, [](Vec<T> values) { return magnitudes(values); })};
  }
  return {max, sum_over(x, begin, end, [&](Vec<T> values) { return powers(magnitudes(values) / max, p); })};
}

// The largest magnitude and how many coordinates have it, lane by lane. Zeros beyond the end would be counted as ties
// of a zero row, so the end is left to the scalar state.
template <typename T>
RDS_FAST_INLINE State<T, NormOrder::infinity> largest_with_ties(const T* x, int64_t begin, int64_t end) {
  using A = Acc<T>;
  constexpr int64_t L = kLanes<T>;
  const int64_t whole = begin + (end - begin) / L * L;
  Vec<T> max[4] = {}, ties[4] = {}, nan = Vec<T>{};
  const Vec<T> one = splat<T>(1), zero = Vec<T>{};
  for_vectors<T>(begin, whole, [&](auto at, int k) {
    const Vec<T> size = magnitudes(at(x, A(0)));
    ties[k] = size > max[k] ? one : ties[k] + (size == max[k] ? one : zero);
    max[k] = larger(size, max[k]);
    nan += size == size ? zero : size;
  });
  State<T, NormOrder::infinity> state;
  for (int k = 0; k < 4; ++k) {
    for (int64_t i = 0; i < L; ++i) state.merge({max[k][i], ties[k][i]}, A(0));
  }
  for (int64_t i = whole; i < end; ++i) state.push(widen(x[i]), A(0));
  const A poison = sum_of_lanes<T>(nan);
  if (is_nan(poison)) state.merge({poison, A(1)}, A(0));
  return state;
}

template <typename T, NormOrder order>
RDS_FAST_INLINE State<T, order> norm_state(const T* x, int64_t begin, int64_t end, Acc<T> p) {
  if constexpr (order == NormOrder::one) {
    return {Acc<T>(0), sum_over(x, begin, end, [](Vec<T> values) { return magnitudes(values); })};
  } else if constexpr (order == NormOrder::two) {
    return sum_of_squares(x, begin, end);
  } else if constexpr (order == NormOrder::infinity) {
    return largest_with_ties(x, begin, end);
  } else {
    return sum_of_powers(x, begin, end, p);
  }
}

// What the derivatives need of a row: its norm, its factors, and u and w of a vector of it.
template <typename T, NormOrder order>
struct NormRow {
  using A = Acc<T>;
  A n, p, first, root;
  A tie_share = 1;

  RDS_FAST_INLINE NormRow(const void* saved, int64_t row, A p, A k)
      : n(static_cast<const A*>(saved)[order == NormOrder::infinity ? 2 * row : row]),
        p(p),
        first(first_factor(n, k)),
        root(second_factor_root(n, k)) {
    if (order == NormOrder::infinity) tie_share = A(1) / static_cast<const A*>(saved)[2 * row + 1];
  }
  RDS_FAST_INLINE Vec<T> normal(Vec<T> x) const { return normals<T, order>(x, splat<T>(n), splat<T>(tie_share), p); }
  RDS_FAST_INLINE Vec<T> curvature(Vec<T> x) const { return curvatures<T, order>(x, splat<T>(n), p); }
};

template <typename T, NormOrder order>
void norm_forward(const Shape& shape, Rows x, double p, double k, Results result, Saved saved) {
  using A = Acc<T>;
  reduce_rows<State<T, order>>(
      shape,
      [&](int64_t row, int64_t begin, int64_t end) { return norm_state<T, order>(row_of<T>(x, row), begin, end, p); },
      [&](State<T, order>& total, const State<T, order>& partial) { total.merge(partial, A(p)); },
      [&](int64_t row, const State<T, order>& total) {
        const A n = total.value(A(p));
        A* const kept = static_cast<A*>(saved.data);
        if (order == NormOrder::infinity) {
          kept[2 * row] = n;
          kept[2 * row + 1] = total.sum;
        } else if (kept != nullptr) {
          kept[row] = n;
        }
        set_result<T>(result, row, power_of_norm(n, A(k)));
      },
      [](int64_t, int64_t, int64_t, const State<T, order>&) {});
}

template <typename T, NormOrder order>
void norm_backward(const Shape& shape, Values g, Rows x, const void* saved, double p, double k, void* gx) {
  using A = Acc<T>;
  const bool streamed = is_streamed<T>(shape);
  for_chunks(shape, [&](int64_t row, int64_t begin, int64_t end) {
    const NormRow<T, order> norm(saved, row, A(p), A(k));
    const T* values = row_of<T>(x, row);
    T* const out = static_cast<T*>(gx) + row * shape.columns;
    const A factor = norm.first * value_of<T>(g, row);
    if (norm.n == A(0)) {
      write_values(out, begin, end, streamed, [](auto) { return Vec<T>{}; });
    } else {
      write_values(out, begin, end, streamed, [&](auto at) { return norm.normal(at(values, A(0))) * factor; });
    }
  });
}

template <typename T, NormOrder order>
void norm_double_backward(const Shape& shape, Rows v, Values g, Rows x, const void* saved, double p, double k,
                          Results dg, void* dx) {
  using A = Acc<T>;
  const bool streamed = is_streamed<T>(shape);
  const bool smooth = p == 2.0 && k == 2.0;
  const CurvatureFactors<A, order> factors{A(p), A(k)};
  reduce_rows<A>(
      shape,
      [&](int64_t row, int64_t begin, int64_t end) {
        const NormRow<T, order> norm(saved, row, A(p), A(k));
        if (norm.n == A(0)) return A(0);
        const T *values = row_of<T>(x, row), *cotangent = row_of<T>(v, row);
        Vec<T> sums[4] = {};
        for_vectors<T>(begin, end,
                       [&](auto at, int i) { sums[i] += norm.normal(at(values, A(0))) * at(cotangent, A(0)); });
        return sum_of_lanes<T>(sum_of_four<T>(sums));
      },
      [](A& total, A partial) { total += partial; },
      [&](int64_t row, A total) { set_result<T>(dg, row, NormRow<T, order>(saved, row, A(p), A(k)).first * total); },
      [&](int64_t row, int64_t begin, int64_t end, A total) {
        const NormRow<T, order> norm(saved, row, A(p), A(k));
        const T *values = row_of<T>(x, row), *cotangent = row_of<T>(v, row);
        T* const out = static_cast<T*>(dx) + row * shape.columns;
        const A cotangent_factor = value_of<T>(g, row) * norm.root, along = factors.of_normal * total;
        const auto second = [&](auto at) {
          const Vec<T> x = at(values, A(0));
          const Vec<T> bracket = at(cotangent, A(0)) * factors.of_v * norm.curvature(x) + norm.normal(x) * along;
          return (bracket * norm.root) * cotangent_factor;
        };
        const auto flat = [&](auto at) {  // no curvature of its own: v does not enter, and may be infinite
          return (norm.normal(at(values, A(0))) * along * norm.root) * cotangent_factor;
        };
        if (smooth) {
          const A twice = A(2) * value_of<T>(g, row);
          write_values(out, begin, end, streamed, [&](auto at) { return at(cotangent, A(0)) * twice; });
        } else if (norm.n == A(0)) {
          write_values(out, begin, end, streamed, [](auto) { return Vec<T>{}; });
        } else if constexpr (order == NormOrder::one || order == NormOrder::infinity) {
          write_values(out, begin, end, streamed, flat);
        } else {
          write_values(out, begin, end, streamed, second);
        }
      });
}

template <NormOrder order>
struct Order {
  static constexpr NormOrder value = order;
};

// call(T(), Order<order>()) with the storage type and how the norm is reduced.
template <typename Call>
void with_order(const Shape& shape, double p, const Call& call) {
  with_dtype(shape.dtype, [&](auto example) {
    switch (norm_order(p)) {
      case NormOrder::one:
        return call(example, Order<NormOrder::one>());
      case NormOrder::two:
        return call(example, Order<NormOrder::two>());
      case NormOrder::general:
        return call(example, Order<NormOrder::general>());
      case NormOrder::infinity:
        return call(example, Order<NormOrder::infinity>());
    }
  });
}

void gradient_norm(Shape shape, Rows x, double p, double power, Results result, Saved saved) {
  with_order(shape, p, [&](auto example, auto order) {
    using T = decltype(example);
    constexpr NormOrder kOrder = decltype(order)::value;
    if (shape.columns <= kShort) return short_norm_forward<T, kOrder>(shape, x, p, power, result, saved);
    norm_forward<T, kOrder>(shape, x, p, power, result, saved);
  });
}

void gradient_norm_backward(Shape shape, Values g, Rows x, const void* saved, double p, double power, void* gx) {
  with_order(shape, p, [&](auto example, auto order) {
    using T = decltype(example);
    constexpr NormOrder kOrder = decltype(order)::value;
    if (shape.columns <= kShort && x.stride == shape.columns) {
      return short_norm_backward<T, kOrder>(shape, g, static_cast<const T*>(x.data), saved, p, power,
                                            static_cast<T*>(gx));
    }
    norm_backward<T, kOrder>(shape, g, x, saved, p, power, gx);
  });
}

void gradient_norm_double_backward(Shape shape, Rows v, Values g, Rows x, const void* saved, double p, double power,
                                   Results dg, void* dx) {
  with_order(shape, p, [&](auto example, auto order) {
    using T = decltype(example);
    constexpr NormOrder kOrder = decltype(order)::value;
    if (shape.columns <= kShort) {
      return short_norm_double_backward<T, kOrder>(shape, v, g, x, saved, p, power, dg, dx);
    }
    norm_double_backward<T, kOrder>(shape, v, g, x, saved, p, power, dg, dx);
  });
}

}  // namespace rds_fast::cpu::RDS_FAST_CAPABILITY
