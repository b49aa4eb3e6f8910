// The p-norm n = ‖x‖ₚ of rows, raised to the power k, r = nᵏ, and its two derivatives.
//
// With u the gradient of n, and w = (|x|/n)^(p−2):
//
//     p = 1:   u = sign x                    p = 2:  u = x / n
//     p = ∞:   u = sign x [|x| = n] / ties   else    u = sign x (|x|/n)^(p−1)
//
//     backward           gx = g k nᵏ⁻¹ u
//     double backward    dg = k nᵏ⁻¹ Σ u v
//                        dx = g k nᵏ⁻² [(p−1) w v + (k−p) u Σ u v];  p = 1, ∞: g k (k−1) nᵏ⁻² u Σ u v
//
// A row of zeros has derivative 0, but for Σ x² (p = k = 2), which is smooth: there dx = 2 g v. w is 0 where x is 0,
// but for p = 2. nᵏ⁻² is applied as two factors, and x / n as two as well, so that nothing overflows on the way.
#include "launch.cuh"
#include "norm.cuh"

namespace rds_fast::cuda {
namespace {

template <typename T, bool EUCLIDEAN>
struct GradientNorm : RowOperation<T> {
  using A = Accumulation<T>;
  using Bound = Largest<T, true>;
  struct State {
    A anchor;  // the largest |x|
    A sums;    // Σ (|x| / divisor)ᵖ;  p = 1: Σ |x|;  p = ∞: how many have the largest. A NaN lives on in it
  };
  using Scalars = typename RowOperation<T>::None;
  static constexpr bool ANCHORED = true;
  static constexpr bool ROLLED = !EUCLIDEAN;
  static constexpr bool REDUCES = true;

  Norm<A, EUCLIDEAN> norm;
  OutputColumn<T> result;
  A* saved;  // null where the result is the norm to all its digits

  __device__ __forceinline__ State identity() const { return {0, 0}; }

  __device__ __forceinline__ void move(State& state, A anchor) const {
    if (!(anchor > state.anchor)) return;
    norm.for_order([&](auto order) {
      constexpr NormOrder ORDER = order.value;
      if constexpr (ORDER == NormOrder::infinity) {
        state.sums *= A(0);
      } else if constexpr (ORDER != NormOrder::one) {
        const A divisor = norm.template divisor<ORDER>(state.anchor);
        const A ratio = ORDER == NormOrder::two ? divisor * norm.reciprocal_of_divisor(anchor)
                                                : divisor / norm.template divisor<ORDER>(anchor);
        if (state.sums != A(0)) state.sums *= norm.template raised<ORDER>(ratio);  // 0 stays 0 where that overflows
      }
    });
    state.anchor = anchor;
  }

  template <int COUNT>
  __device__ __forceinline__ void accumulate(State& state, Scalars, const Values<A, COUNT>& values) const {
    norm.for_order([&](auto order) {
      constexpr NormOrder ORDER = order.value;
      const A divisor = norm.template divisor<ORDER>(state.anchor);
      const A factor = norm.reciprocal_of_divisor(state.anchor);
      A sum = 0;
#pragma unroll
      for (int i = 0; i < COUNT; ++i) {
        const A x = magnitude(values.x[i]);
        if constexpr (ORDER == NormOrder::one) {
          sum += x;
        } else if constexpr (ORDER == NormOrder::infinity) {
          sum += x == state.anchor ? A(1) : x == x ? A(0) : x;
        } else {
          sum += norm.template raised<ORDER>(ORDER == NormOrder::two ? x * factor : x / divisor);
        }
      }
      state.sums += sum;
    });
  }

  __device__ __forceinline__ void add(A& sum, A other) const { sum += other; }

  __device__ __forceinline__ void finish(int64_t r, Scalars, const State& state) const {
    norm.for_order([&](auto order) {
      constexpr NormOrder ORDER = order.value;
      A n = state.sums;
      if constexpr (ORDER == NormOrder::infinity) {
        n = is_nan(state.sums) ? state.sums : state.anchor;
        saved[2 * r] = n;
        saved[2 * r + 1] = state.sums;
      } else if constexpr (ORDER != NormOrder::one) {
        const A root = ORDER == NormOrder::two ? square_root(state.sums) : power(state.sums, A(1) / norm.p);
        n = norm.template divisor<ORDER>(state.anchor) * root;
      }
      result.store(r, power_of_norm(n, norm.k));
      if (ORDER != NormOrder::infinity && saved != nullptr) saved[r] = n;
    });
  }
};

// What the derivatives know of a row. For p = 1 and ∞ the elements of u are ± unit where |x| >= least, and else 0:
// least is the smallest number there is, or n. unit, of the row, is left out of the sums and multiplied in later, so
// that it takes no register while the elements are gone through.
template <typename A>
struct NormScalars {
  A g, n, least, unit;
  DividedBy<A> quotient;
};

// The part that both derivatives have.
template <typename T, bool EUCLIDEAN>
struct NormDerivative : RowOperation<T> {
  using A = Accumulation<T>;
  using Scalars = NormScalars<A>;
  static constexpr bool ROLLED = !EUCLIDEAN;
  static constexpr bool MAPS = true;

  Norm<A, EUCLIDEAN> norm;
  InputColumn<T> g;
  const A* saved;

  __device__ __forceinline__ Scalars scalars(int64_t r) const {
    const bool has_ties = norm.order() == NormOrder::infinity;
    const A n = has_ties ? saved[2 * r] : saved[r];
    const A least = has_ties ? n : A(sizeof(A) == 4 ? 0x1p-149 : 0x1p-1074);
    const A unit = has_ties ? A(1) / saved[2 * r + 1] : A(1);
    return {g[r], n, least, unit, DividedBy<A>(n)};
  }

  // An element of u / unit.
  __device__ __forceinline__ A gradient(const Scalars& row, A x) const {
    if constexpr (EUCLIDEAN) return row.quotient(x);
    const A size = magnitude(x);
    A u = size >= row.least ? A(1) : A(0);
    if (!norm.flat()) u = raise(row.quotient(size), norm.p - A(1));
    return copysign(u, x);
  }
};

template <typename T, bool EUCLIDEAN>
struct GradientNormBackward : NormDerivative<T, EUCLIDEAN> {
  using A = Accumulation<T>;
  using State = typename RowOperation<T>::None;
  using Scalars = NormScalars<A>;
  struct Coefficients {
    Scalars row;
    A factor;  // g k nᵏ⁻¹
  };

  __device__ __forceinline__ Coefficients coefficients(const Scalars& row, State) const {
    return {row, row.g * first_factor(row.n, this->norm.k) * row.unit};
  }
  __device__ __forceinline__ A map(const Coefficients& c, A x, A, A) const {
    return c.factor * this->gradient(c.row, x);
  }
};

template <typename T, bool EUCLIDEAN>
struct GradientNormDoubleBackward : NormDerivative<T, EUCLIDEAN> {
  using A = Accumulation<T>;
  using State = A;  // Σ u v
  using Scalars = NormScalars<A>;
  struct Coefficients {
    Scalars row;
    A of_v, of_gradient;  // (p−1) k, and (k−p) k Σ u v or (k−1) k Σ u v
    A outer, inner;       // outer · inner = g nᵏ⁻²
  };
  static constexpr bool REDUCES = true;
  static constexpr bool READS_V = true;

  OutputColumn<T> dg;

  __device__ __forceinline__ State identity() const { return 0; }

  template <int COUNT>
  __device__ __forceinline__ void accumulate(State& sum, const Scalars& row, const Values<A, COUNT>& values) const {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) sum += this->gradient(row, values.x[i]) * values.v[i];
  }

  __device__ __forceinline__ void add(State& sum, State other) const { sum += other; }

  __device__ __forceinline__ void finish(int64_t r, const Scalars& row, State sum) const {
    dg.store(r, first_factor(row.n, this->norm.k) * (row.unit * sum));
  }

  __device__ __forceinline__ Coefficients coefficients(const Scalars& row, State sum) const {
    const A k = this->norm.k;
    const bool flat = this->norm.flat();
    if (EUCLIDEAN && k == A(2)) return {row, A(2), A(0), row.g, A(1)};  // dx = 2 g v, at a row of zeros too
    const A root = second_factor_root(row.n, k);
    return {row, flat ? A(0) : k * (this->norm.p - A(1)),
            (flat ? k * (k - A(1)) : k * (k - this->norm.p)) * (row.unit * row.unit * sum), row.g * root, root};
  }

  __device__ __forceinline__ A map(const Coefficients& c, A x, A v, A) const {
    A u, curved;  // curved: w v
    if (EUCLIDEAN || this->norm.flat()) {
      u = this->gradient(c.row, x);
      curved = EUCLIDEAN ? v : A(0);
    } else {  // one power for w and for u = sign x · w |x| / n
      const A quotient = c.row.quotient(magnitude(x));
      const A w = quotient == A(0) ? A(0) : raise(quotient, this->norm.p - A(2));
      u = copysign(w * quotient, x);
      curved = w == A(0) ? A(0) : w * v;
    }
    const A bracket = c.of_gradient * u + c.of_v * curved;
    return (c.outer * bracket) * c.inner;
  }
};

// Calls body with x's element type and whether p = 2.
template <typename Body>
void for_element_type_and_order(const Tensor& x, double p, Body body) {
  for_element_type(x, [&](auto element) {
    if (p == 2.0) {
      body(element, std::true_type{});
    } else {
      body(element, std::false_type{});
    }
  });
}

std::tuple<Tensor, Tensor> gradient_norm(Tensor x, double p, double power, bool full_precision) {
  const Device device(x);
  const ScalarType wide = accumulation_type(x);
  Tensor result = new_column(x, full_precision ? wide : x.scalar_type());
  const int64_t saved_columns = saved_of_norm(p, power, result.scalar_type() == wide);
  Tensor saved = torch::stable::new_empty(x, std::vector<int64_t>{x.size(0), saved_columns}, wide);
  for_element_type_and_order(x, p, [&](auto element, auto euclidean) {
    using T = decltype(element);
    using A = Accumulation<T>;
    A* const kept = saved_columns == 0 ? nullptr : static_cast<A*>(saved.mutable_data_ptr());
    const GradientNorm<T, euclidean.value> op{{}, {p, power}, output_column<T>(result, x), kept};
    run_rows(device, op, make_rows<T>(x, nullptr, nullptr, nullptr), x);
  });
  return {result, saved};
}

Tensor gradient_norm_backward(Tensor g, Tensor x, Tensor saved, double p, double power) {
  const Device device(x);
  Tensor gx = new_rows(x);
  for_element_type_and_order(x, p, [&](auto element, auto euclidean) {
    using T = decltype(element);
    using A = Accumulation<T>;
    const GradientNormBackward<T, euclidean.value> op{
        {{}, {p, power}, input_column<T>(g, x), static_cast<const A*>(saved.const_data_ptr())}};
    run_rows(device, op, make_rows<T>(x, nullptr, nullptr, &gx), x);
  });
  return gx;
}

std::tuple<Tensor, Tensor> gradient_norm_double_backward(Tensor v, Tensor g, Tensor x, Tensor saved, double p,
                                                         double power) {
  const Device device(x);
  Tensor dg = new_column(x, g.scalar_type());
  Tensor dx = new_rows(x);
  for_element_type_and_order(x, p, [&](auto element, auto euclidean) {
    using T = decltype(element);
    using A = Accumulation<T>;
    const GradientNormDoubleBackward<T, euclidean.value> op{
        {{}, {p, power}, input_column<T>(g, x), static_cast<const A*>(saved.const_data_ptr())},
        output_column<T>(dg, x)};
    run_rows(device, op, make_rows<T>(x, &v, nullptr, &dx), x);
  });
  return {dg, dx};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rds_fast_native, CUDA, m) {
  m.impl("gradient_norm", TORCH_BOX(&gradient_norm));
  m.impl("gradient_norm_backward", TORCH_BOX(&gradient_norm_backward));
  m.impl("gradient_norm_double_backward", TORCH_BOX(&gradient_norm_double_backward));
}

}  // namespace rds_fast::cuda
