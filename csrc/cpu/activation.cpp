// Smooth activations f, element by element: the backward g f'(x) and the double backward (v f'(x), v g f''(x)).
//
// The forward is PyTorch's. Each activation below gives f' and f'' at once, for they share their exponential; where
// only f' is used the compiler drops the rest. Notation: s = σ(w) = 1/(1 + exp(−w)) and s̄ = 1 − s, neither by
// subtraction.
#include "elementary.h"
#include "rows.h"

namespace rds_fast::cpu::RDS_FAST_CAPABILITY {

template <typename V>
struct Slopes {
  V first;
  V second;
};

template <typename V>
struct Sigmoid {
  V s;
  V complement;
};

template <typename V>
RDS_FAST_INLINE Sigmoid<V> sigmoids(V w) {
  const V small = exponentials(-magnitudes(w));  // in (0, 1]: nothing overflows
  const V inverse = 1 / (1 + small);
  const V other = small * inverse;
  return {w < V{} ? other : inverse, w < V{} ? inverse : other};
}

// Where an exponential has long underflowed, powers of x must not overflow: 0 · inf would be NaN.
template <typename V>
RDS_FAST_INLINE V clamped(V x) {
  using A = decltype(x[0] + 0);
  const V limit = A(40) - V{};
  return smaller(limit, larger(-limit, x));  // in this order a NaN stays
}

namespace activations {

// f = x Φ(x), φ = Φ': f' = Φ + x φ, f'' = φ (2 − x²).
struct gelu {
  template <typename V, typename A>
  RDS_FAST_INLINE Slopes<V> operator()(V x, A, A) const {
    const V bounded = clamped(x);
    const V exponential = exponentials(bounded * bounded * A(-0.5));
    const V tail = normal_tails(magnitudes(bounded), exponential);
    const V density = exponential * A(0.39894228040143268);
    return {(x < V{} ? tail : 1 - tail) + x * density, density * (2 - bounded * bounded)};
  }
};

// f = x σ(w), with w, w' and w'' functions of x: f' = s + x s s̄ w', f'' = s s̄ (2w' + x (w'' + (s̄ − s) w'²)).
template <typename V>
RDS_FAST_INLINE Slopes<V> gated(V x, V w, V w1, V w2) {
  const auto [s, complement] = sigmoids(w);
  const V slope = s * complement;
  return {s + x * slope * w1, slope * (2 * w1 + clamped(x) * (w2 + (complement - s) * w1 * w1))};
}

// (1 + tanh u)/2 = σ(2u), so w = 2u = 2 √(2/π) (x + 0.044715 x³).
struct gelu_tanh {
  template <typename V, typename A>
  RDS_FAST_INLINE Slopes<V> operator()(V x, A, A) const {
    constexpr A k = 1.5957691216057308, cubic = 0.044715;
    const V bounded = clamped(x);
    const V square = bounded * bounded;
    return gated(x, k * (bounded + cubic * square * bounded), k * (1 + 3 * cubic * square), 6 * k * cubic * bounded);
  }
};

// w = x.
struct silu {
  template <typename V, typename A>
  RDS_FAST_INLINE Slopes<V> operator()(V x, A, A) const {
    return gated(x, x, 1 - V{}, V{});
  }
};

// f = x t, t = tanh(log(1 + exp x)), t' = (1 − t²) s: f' = t + x t', f'' = t' (2 + x (s̄ − 2 t s)). With q = exp(−|x|),
// t = (1 + 2q)/(1 + 2q + 2q²) and 1 − t = 2q²/(…) for x ≥ 0, t = (q² + 2q)/(q² + 2q + 2) and 1 − t = 2/(…) below.
struct mish {
  template <typename V, typename A>
  RDS_FAST_INLINE Slopes<V> operator()(V x, A, A) const {
    const V q = exponentials(-magnitudes(x));
    const V square = q * q;
    const auto negative = x < V{};
    const V part = negative ? square + 2 * q : 1 + 2 * q;
    const V rest = negative ? 2 - V{} : 2 * square;
    const V inverse = 1 / (part + rest);
    const V t = part * inverse;
    const V larger_side = 1 / (1 + q);
    const V s = negative ? q * larger_side : larger_side;
    const V complement = negative ? larger_side : q * larger_side;
    const V slope = rest * inverse * (1 + t) * s;
    return {t + x * slope, slope * (2 + clamped(x) * (complement - 2 * t * s))};
  }
};

// f = log(1 + exp(a x))/a, and x where a x > b: f' = s, f'' = a s s̄, and 0 where they meet, as PyTorch.
struct softplus {
  template <typename V, typename A>
  RDS_FAST_INLINE Slopes<V> operator()(V x, A a, A b) const {
    const V w = x * a;
    const auto [s, complement] = sigmoids(w);
    return {w > b ? 1 - V{} : s, w < b ? a * s * complement : V{}};
  }
};

// f = x (x + 3)/6 between 0 and x.
struct hardswish {
  template <typename V, typename A>
  RDS_FAST_INLINE Slopes<V> operator()(V x, A, A) const {
    const V one = 1 - V{}, third = A(1) / A(3) - V{};
    const V middle = x * third + A(0.5);
    return {x <= -3 ? V{} : (x >= 3 ? one : middle), x > -3 ? (x < 3 ? third : V{}) : V{}};
  }
};

// f = a (exp(b x) − 1) for x ≤ 0, p x above.
template <typename V, typename A>
RDS_FAST_INLINE Slopes<V> exponential_linear(V x, A p, A a, A b) {
  const V slope = a * b * exponentials(smaller(V{}, x) * b);  // in this order a NaN stays
  return {x > V{} ? p - V{} : slope, x < V{} ? b * slope : V{}};
}
struct elu {
  template <typename V, typename A>
  RDS_FAST_INLINE Slopes<V> operator()(V x, A a, A b) const {
    return exponential_linear(x, A(1), a, b);
  }
};
struct selu {
  template <typename V, typename A>
  RDS_FAST_INLINE Slopes<V> operator()(V x, A, A) const {
    return exponential_linear(x, A(1.0507009873554804934), A(1.7580993408473768600), A(1));
  }
};

// These two are given their result y in the place of x: f' = y (1 − y), f'' = f' (1 − 2y).
struct sigmoid {
  template <typename V, typename A>
  RDS_FAST_INLINE Slopes<V> operator()(V y, A, A) const {
    const V slope = y * (1 - y);
    return {slope, slope * (1 - 2 * y)};
  }
};
// f' = 1 − y², f'' = −2 y f'.
struct tanh {
  template <typename V, typename A>
  RDS_FAST_INLINE Slopes<V> operator()(V y, A, A) const {
    const V slope = 1 - y * y;
    return {slope, -2 * y * slope};
  }
};

}  // namespace activations

template <typename Call>
void with_activation(ActivationKind kind, const Call& call) {
  switch (kind) {
#define RDS_FAST_CASE(name)  \
  case ActivationKind::name: \
    return call(activations::name());
    RDS_FAST_ACTIVATIONS(RDS_FAST_CASE)
#undef RDS_FAST_CASE
  }
}

// A chunk begins at a multiple of the vectors, so its stores are aligned if the whole is; the end of it is stored as
// usual.
template <typename T>
RDS_FAST_INLINE void put(Whole at, T* to, Vec<T> value, bool streamed) {
  if (streamed) return stream(to + at.i, value);
  store(to + at.i, value);
}
template <typename T>
RDS_FAST_INLINE void put(Part at, T* to, Vec<T> value, bool) {
  store_part(to + at.i, value, at.count);
}

void activation_backward(Elements elements, const void* g, const void* x, const void* x_cotangent,
                         Activation activation, void* gx) {
  with_dtype(elements.dtype, [&](auto example) {
    using T = decltype(example);
    const Shape shape{elements.dtype, 1, elements.count};
    const bool streamed = is_streamed<T>(shape);
    const T* const cotangents = static_cast<const T*>(x_cotangent);
    with_activation(activation.kind, [&](auto slopes) {
      const Acc<T> a = activation.a, b = activation.b;
      for_chunks(shape, [&](int64_t, int64_t begin, int64_t end) {
        const auto product = [&](auto at) {
          return at(static_cast<const T*>(g), 0) * slopes(at(static_cast<const T*>(x), 0), a, b).first;
        };
        T* const to = static_cast<T*>(gx);
        if (cotangents == nullptr) return write_values(to, begin, end, streamed, product);
        write_values(to, begin, end, streamed, [&](auto at) { return product(at) + at(cotangents, 0); });
      });
    });
  });
}

void activation_double_backward(Elements elements, const void* v, const void* g, const void* x, Activation activation,
                                void* dg, void* dx) {
  with_dtype(elements.dtype, [&](auto example) {
    using T = decltype(example);
    const Shape shape{elements.dtype, 1, elements.count};
    const auto is_aligned = [](void* to) { return reinterpret_cast<uintptr_t>(to) % RDS_FAST_VECTOR_BYTES == 0; };
    const bool streamed = is_streamed<T>(shape) && is_aligned(dg) && is_aligned(dx);
    with_activation(activation.kind, [&](auto slopes) {
      const Acc<T> a = activation.a, b = activation.b;
      for_chunks(shape, [&](int64_t, int64_t begin, int64_t end) {
        for_vectors<T>(begin, end, [&](auto at, int) {
          const Vec<T> cotangent = at(static_cast<const T*>(v), 0);
          const auto [first, second] = slopes(at(static_cast<const T*>(x), 0), a, b);
          put(at, static_cast<T*>(dg), cotangent * first, streamed);
          put(at, static_cast<T*>(dx), cotangent * at(static_cast<const T*>(g), 0) * second, streamed);
        });
      });
    });
  });
}

}  // namespace rds_fast::cpu::RDS_FAST_CAPABILITY
