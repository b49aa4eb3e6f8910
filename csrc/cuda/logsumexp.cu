// Log-sum-exp of rows, and its two derivatives.
//
//     forward            l = log Σ exp xᵢ, from one read of x (LogSumExpState)
//     backward           gx = g s,  s = exp(x − l)
//     double backward    dg = Σ v s,  dx = g s (v − Σ v s), from one read of x and v where a row fits on chip
//
// Infinities need no case of their own: in a row of −inf, x − l is (−inf) − (−inf) and s NaN, as in PyTorch; beside an
// l of +inf every finite x has s = 0.
#include "launch.cuh"
#include "softmax.cuh"

namespace rds_fast::cuda {
namespace {

template <typename T>
struct LogSumExp : RowOperation<T> {
  using A = Accumulation<T>;
  using Bound = Largest<T, false>;
  struct State {
    A anchor;  // the largest x
    A sums;    // Σ exp(x − shift)
  };
  using Scalars = typename RowOperation<T>::None;
  static constexpr bool ANCHORED = true;
  static constexpr bool REDUCES = true;

  OutputColumn<T> result;
  A* saved;  // null where the result has the accumulation type itself

  __device__ __forceinline__ State identity() const { return {-static_cast<A>(INFINITY), 0}; }

  __device__ __forceinline__ void move(State& state, A anchor) const {
    if (!(anchor > state.anchor)) return;
    state.sums = moved(state.sums, shift_of(state.anchor), shift_of(anchor));
    state.anchor = anchor;
  }

  template <int COUNT>
  __device__ __forceinline__ void accumulate(State& state, Scalars, const Values<A, COUNT>& values) const {
    state.sums += sum_of_terms(values.x, shift_of(state.anchor));
  }

  __device__ __forceinline__ void add(A& sum, A other) const { sum += other; }

  __device__ __forceinline__ void finish(int64_t r, Scalars, const State& state) const {
    const A lse = LogSumExpState<A>{state.anchor, state.sums}.value();
    result.store(r, lse);
    if (saved != nullptr) saved[r] = lse;
  }
};

// What both derivatives know of a row: its cotangent g and its log-sum-exp.
template <typename A>
struct CotangentAndLse {
  A g;
  A lse;
};

template <typename T>
struct LogSumExpBackward : RowOperation<T> {
  using A = Accumulation<T>;
  using State = typename RowOperation<T>::None;
  using Scalars = CotangentAndLse<A>;
  using Coefficients = Scalars;
  static constexpr bool MAPS = true;

  InputColumn<T> g;
  const A* lse;

  __device__ __forceinline__ Scalars scalars(int64_t r) const { return {g[r], lse[r]}; }
  __device__ __forceinline__ Coefficients coefficients(const Scalars& row, State) const { return row; }
  __device__ __forceinline__ A map(const Coefficients& row, A x, A, A) const {
    return row.g * softmax_term(x, row.lse);
  }
};

template <typename T>
struct LogSumExpDoubleBackward : RowOperation<T> {
  using A = Accumulation<T>;
  using State = A;  // Σ v s
  using Scalars = CotangentAndLse<A>;
  struct Coefficients {
    A g, lse, mean;  // mean = Σ v s, the mean of v under s
  };
  static constexpr bool REDUCES = true;
  static constexpr bool MAPS = true;
  static constexpr bool READS_V = true;

  InputColumn<T> g;
  const A* lse;
  OutputColumn<T> dg;

  __device__ __forceinline__ Scalars scalars(int64_t r) const { return {g[r], lse[r]}; }
  __device__ __forceinline__ State identity() const { return 0; }

  template <int COUNT>
  __device__ __forceinline__ void accumulate(State& sum, const Scalars& row, const Values<A, COUNT>& values) const {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) sum += values.v[i] * softmax_term(values.x[i], row.lse);
  }

  __device__ __forceinline__ void add(State& sum, State other) const { sum += other; }
  __device__ __forceinline__ void finish(int64_t r, const Scalars&, State sum) const { dg.store(r, sum); }
  __device__ __forceinline__ Coefficients coefficients(const Scalars& row, State sum) const {
    return {row.g, row.lse, sum};
  }
  __device__ __forceinline__ A map(const Coefficients& row, A x, A v, A) const {
    return row.g * softmax_term(x, row.lse) * (v - row.mean);
  }
};

std::tuple<Tensor, Tensor> logsumexp(Tensor x, bool full_precision) {
  const Device device(x);
  const ScalarType wide = accumulation_type(x);
  const bool saves = !full_precision && x.scalar_type() != wide;
  Tensor result = new_column(x, saves ? x.scalar_type() : wide);
  Tensor saved = torch::stable::new_empty(x, std::vector<int64_t>{x.size(0), saves ? 1 : 0}, wide);
  for_element_type(x, [&](auto element) {
    using T = decltype(element);
    LogSumExp<T> op;
    op.result = output_column<T>(result, x);
    op.saved = saves ? static_cast<Accumulation<T>*>(saved.mutable_data_ptr()) : nullptr;
    run_rows(device, op, make_rows<T>(x, nullptr, nullptr, nullptr), x);
  });
  return {result, saved};
}

Tensor logsumexp_backward(Tensor g, Tensor x, Tensor lse) {
  const Device device(x);
  Tensor gx = new_rows(x);
  for_element_type(x, [&](auto element) {
    using T = decltype(element);
    LogSumExpBackward<T> op;
    op.g = input_column<T>(g, x);
    op.lse = static_cast<const Accumulation<T>*>(lse.const_data_ptr());
    run_rows(device, op, make_rows<T>(x, nullptr, nullptr, &gx), x);
  });
  return gx;
}

std::tuple<Tensor, Tensor> logsumexp_double_backward(Tensor v, Tensor g, Tensor x, Tensor lse) {
  const Device device(x);
  Tensor dg = new_column(x, g.scalar_type());
  Tensor dx = new_rows(x);
  for_element_type(x, [&](auto element) {
    using T = decltype(element);
    LogSumExpDoubleBackward<T> op;
    op.g = input_column<T>(g, x);
    op.lse = static_cast<const Accumulation<T>*>(lse.const_data_ptr());
    op.dg = output_column<T>(dg, x);
    run_rows(device, op, make_rows<T>(x, &v, nullptr, &dx), x);
  });
  return {dg, dx};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rds_fast_native, CUDA, m) {
  m.impl("logsumexp", TORCH_BOX(&logsumexp));
  m.impl("logsumexp_backward", TORCH_BOX(&logsumexp_backward));
  m.impl("logsumexp_double_backward", TORCH_BOX(&logsumexp_double_backward));
}

}  // namespace rds_fast::cuda
