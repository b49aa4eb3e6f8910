// Cross-entropy and log-sum-exp of rows of logits f together, and their two derivatives.
//
// l = log Σ exp f, s = exp(f − l). The target distribution q' is (1−ε) onehot + ε/C for a class index, 0 for an ignored
// one, and (1−ε) q + ε/C for probabilities q; Q = Σ q'. With the cotangents g (of the cross-entropy) and h (of l), and
// a = g Q + h:
//
//     forward            ce = Q l − Σ q' f, from one read of f
//     backward           gf = a s − g q'
//     double backward    dg = Q Σ v s − Σ v q',  dh = Σ v s,  df = a s (v − Σ v s)
//
// ce is the difference of two numbers that grow with the logits, so it is formed relative to the largest logit m:
// ce = Q log Σ exp(f − m) − Σ q' (f − m). As in PyTorch it is NaN where m is infinite.
#include "launch.cuh"
#include "softmax.cuh"
#include "targets.cuh"

namespace rds_fast::cuda {
namespace {

template <typename T, bool PROBABILITIES>
struct CrossEntropy : RowOperation<T> {
  using A = Accumulation<T>;
  using Bound = Largest<T, false>;
  struct Sums {
    A terms;   // Σ exp(f − shift)
    A mass;    // Σ of the weights, which are q', or 1 for class indices
    A linear;  // Σ weight · (f − shift)
  };
  struct State {
    A anchor;  // the largest f
    Sums sums;
  };
  struct Scalars {
    int64_t index;
    A at_target;
  };
  static constexpr bool ANCHORED = true;
  static constexpr bool REDUCES = true;
  static constexpr bool READS_Q = PROBABILITIES;

  Targets<T, PROBABILITIES> targets;
  const T* logits;
  int64_t logits_stride;
  OutputColumn<T> cross_entropy, lse;
  A* saved;

  __device__ __forceinline__ State identity() const { return {-static_cast<A>(INFINITY), {0, 0, 0}}; }

  __device__ __forceinline__ Scalars scalars(int64_t r) const {
    const int64_t index = targets.index(r);
    return {index, index < 0 ? A(0) : static_cast<A>(logits[r * logits_stride + index])};
  }

  __device__ __forceinline__ void move(State& state, A anchor) const {
    if (!(anchor > state.anchor)) return;
    const A old_shift = shift_of(state.anchor);
    const A shift = shift_of(anchor);
    state.sums.terms = moved(state.sums.terms, old_shift, shift);
    state.sums.linear += state.sums.mass * (old_shift - shift);
    state.anchor = anchor;
  }

  template <int COUNT>
  __device__ __forceinline__ void accumulate(State& state, const Scalars&, const Values<A, COUNT>& values) const {
    const A shift = shift_of(state.anchor);
    state.sums.terms += sum_of_terms(values.x, shift);
    if (!PROBABILITIES && targets.off == A(0)) return;
    A mass = 0;
    A linear = 0;
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      const A weight = PROBABILITIES ? targets.q(values.q[i]) : A(1);
      mass += weight;
      linear += weight * (values.x[i] - shift);
    }
    state.sums.linear += linear;
    state.sums.mass += mass;
  }

  __device__ __forceinline__ void add(Sums& sums, const Sums& other) const {
    sums.terms += other.terms;
    sums.mass += other.mass;
    sums.linear += other.linear;
  }

  __device__ __forceinline__ A value(const Scalars& row, const State& state) const {
    const Sums& sums = state.sums;
    const A log_sum = logarithm(sums.terms);
    if (!PROBABILITIES && row.index < 0) return 0;
    if (is_infinite(state.anchor)) return static_cast<A>(NAN);
    if (PROBABILITIES) return sums.mass * log_sum - sums.linear;
    const A one_hot = targets.on * (log_sum - (row.at_target - shift_of(state.anchor)));
    // Σ q' = 1: the uniform part ε/C brings ε log Σ − ε/C Σ (f − m).
    return targets.off == A(0) ? one_hot : one_hot + targets.off * (sums.mass * log_sum - sums.linear);
  }

  __device__ __forceinline__ void finish(int64_t r, const Scalars& row, const State& state) const {
    const A log_sum_exp = LogSumExpState<A>{state.anchor, state.sums.terms}.value();
    cross_entropy.store(r, value(row, state));
    lse.store(r, log_sum_exp);
    if (saved != nullptr) saved[r] = log_sum_exp;
  }
};

// The part that both derivatives have.
template <typename T, bool PROBABILITIES>
struct CrossEntropyDerivative : RowOperation<T> {
  using A = Accumulation<T>;
  static constexpr bool MAPS = true;
  static constexpr bool READS_Q = PROBABILITIES;

  Targets<T, PROBABILITIES> targets;
  InputColumn<T> g, h;
  const A* lse;
};

// For probabilities Q is a sum over the row, which precedes the map.
template <typename T, bool PROBABILITIES>
struct CrossEntropyBackward : CrossEntropyDerivative<T, PROBABILITIES> {
  using A = Accumulation<T>;
  using State = A;  // Q
  struct Scalars {
    int64_t index;
    A g, h, lse;
  };
  struct Coefficients {
    int64_t index;
    A a, lse, g;
  };
  static constexpr bool HAS_COLUMN = !PROBABILITIES;
  static constexpr bool REDUCES = PROBABILITIES;
  static constexpr bool MAP_READS_Q = PROBABILITIES;

  __device__ __forceinline__ Scalars scalars(int64_t r) const {
    return {this->targets.index(r), this->g[r], this->h[r], this->lse[r]};
  }
  __device__ __forceinline__ State identity() const { return 0; }

  template <int COUNT>
  __device__ __forceinline__ void accumulate(State& mass, const Scalars&, const Values<A, COUNT>& values) const {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) mass += this->targets.q(values.q[i]);
  }

  __device__ __forceinline__ void add(State& mass, State other) const { mass += other; }
  __device__ __forceinline__ void finish(int64_t, const Scalars&, State) const {}

  __device__ __forceinline__ Coefficients coefficients(const Scalars& row, State mass) const {
    const A g = PROBABILITIES || row.index >= 0 ? row.g : A(0);  // an ignored row has q' = 0
    return {row.index, g * (PROBABILITIES ? mass : this->targets.total) + row.h, row.lse, g};
  }

  __device__ __forceinline__ A map(const Coefficients& c, A x, A, A q) const {
    return gradient(c, x, PROBABILITIES ? q : A(0));
  }

  __device__ __forceinline__ int64_t column(const Coefficients& c) const { return c.index; }
  __device__ __forceinline__ A at_column(const Coefficients& c, A x) const { return gradient(c, x, A(1)); }

 private:
  // An element of gf, of a class that has this probability.
  __device__ __forceinline__ A gradient(const Coefficients& c, A x, A probability) const {
    return c.a * softmax_term(x, c.lse) - c.g * this->targets.q(probability);
  }
};

template <typename T, bool PROBABILITIES>
struct CrossEntropyDoubleBackward : CrossEntropyDerivative<T, PROBABILITIES> {
  using A = Accumulation<T>;
  struct State {
    A mean;   // Σ v s
    A cross;  // Σ v q' for probabilities, Σ v for class indices
    A mass;   // Q for probabilities
  };
  struct Scalars {
    int64_t index;
    A g, h, lse, at_target;
  };
  struct Coefficients {
    A a, lse, mean;
  };
  static constexpr bool REDUCES = true;
  static constexpr bool READS_V = true;

  const T* v;
  int64_t v_stride;
  OutputColumn<T> dg, dh;

  __device__ __forceinline__ State identity() const { return {0, 0, 0}; }

  __device__ __forceinline__ Scalars scalars(int64_t r) const {
    const int64_t index = this->targets.index(r);
    const A at_target = index < 0 ? A(0) : static_cast<A>(v[r * v_stride + index]);
    return {index, this->g[r], this->h[r], this->lse[r], at_target};
  }

  template <int COUNT>
  __device__ __forceinline__ void accumulate(State& state, const Scalars& row, const Values<A, COUNT>& values) const {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      state.mean += values.v[i] * softmax_term(values.x[i], row.lse);
      if constexpr (PROBABILITIES) {
        const A weight = this->targets.q(values.q[i]);
        state.cross += values.v[i] * weight;
        state.mass += weight;
      } else {
        state.cross += values.v[i];
      }
    }
  }

  __device__ __forceinline__ void add(State& state, const State& other) const {
    state.mean += other.mean;
    state.cross += other.cross;
    state.mass += other.mass;
  }

  // Q Σ v s − Σ v q'.
  __device__ __forceinline__ A cotangent(const Scalars& row, const State& state) const {
    if (PROBABILITIES) return product(state.mass, state.mean) - state.cross;
    if (row.index < 0) return 0;
    const A one_hot = this->targets.on * (state.mean - row.at_target);
    if (this->targets.off == A(0)) return one_hot;
    return one_hot + this->targets.off * (static_cast<A>(this->targets.classes) * state.mean - state.cross);
  }

  __device__ __forceinline__ void finish(int64_t r, const Scalars& row, const State& state) const {
    dg.store(r, cotangent(row, state));
    dh.store(r, state.mean);
  }

  __device__ __forceinline__ Coefficients coefficients(const Scalars& row, const State& state) const {
    const A g = PROBABILITIES || row.index >= 0 ? row.g : A(0);
    return {g * (PROBABILITIES ? state.mass : this->targets.total) + row.h, row.lse, state.mean};
  }

  __device__ __forceinline__ A map(const Coefficients& c, A x, A v, A) const {
    return c.a * softmax_term(x, c.lse) * (v - c.mean);
  }
};

std::tuple<Tensor, Tensor, Tensor> cross_entropy(Tensor logits, Tensor target, double label_smoothing,
                                                 int64_t ignore_index, bool full_precision) {
  const Device device(logits);
  const ScalarType wide = accumulation_type(logits);
  const bool saves = !full_precision && logits.scalar_type() != wide;
  Tensor ce = new_column(logits, saves ? logits.scalar_type() : wide);
  Tensor lse = new_column(logits, saves ? logits.scalar_type() : wide);
  Tensor saved = torch::stable::new_empty(logits, std::vector<int64_t>{logits.size(0), saves ? 1 : 0}, wide);
  for_element_and_target_type(logits, target, [&](auto element, auto probabilities, const Tensor* q) {
    using T = decltype(element);
    CrossEntropy<T, probabilities.value> op;
    op.targets = make_targets<T, probabilities.value>(target, logits.size(1), label_smoothing, ignore_index);
    op.logits = static_cast<const T*>(logits.const_data_ptr());
    op.logits_stride = row_stride(logits);
    op.cross_entropy = output_column<T>(ce, logits);
    op.lse = output_column<T>(lse, logits);
    op.saved = saves ? static_cast<Accumulation<T>*>(saved.mutable_data_ptr()) : nullptr;
    run_rows(device, op, make_rows<T>(logits, nullptr, q, nullptr), logits);
  });
  return {ce, lse, saved};
}

Tensor cross_entropy_backward(Tensor g, Tensor h, Tensor logits, Tensor target, Tensor lse, double label_smoothing,
                              int64_t ignore_index) {
  const Device device(logits);
  Tensor gx = new_rows(logits);
  for_element_and_target_type(logits, target, [&](auto element, auto probabilities, const Tensor* q) {
    using T = decltype(element);
    CrossEntropyBackward<T, probabilities.value> op;
    op.targets = make_targets<T, probabilities.value>(target, logits.size(1), label_smoothing, ignore_index);
    op.g = input_column<T>(g, logits);
    op.h = input_column<T>(h, logits);
    op.lse = static_cast<const Accumulation<T>*>(lse.const_data_ptr());
    run_rows(device, op, make_rows<T>(logits, nullptr, q, &gx), logits);
  });
  return gx;
}

std::tuple<Tensor, Tensor, Tensor> cross_entropy_double_backward(Tensor v, Tensor g, Tensor h, Tensor logits,
                                                                 Tensor target, Tensor lse, double label_smoothing,
                                                                 int64_t ignore_index) {
  const Device device(logits);
  Tensor dg = new_column(logits, g.scalar_type());
  Tensor dh = new_column(logits, h.scalar_type());
  Tensor df = new_rows(logits);
  for_element_and_target_type(logits, target, [&](auto element, auto probabilities, const Tensor* q) {
    using T = decltype(element);
    CrossEntropyDoubleBackward<T, probabilities.value> op;
    op.targets = make_targets<T, probabilities.value>(target, logits.size(1), label_smoothing, ignore_index);
    op.g = input_column<T>(g, logits);
    op.h = input_column<T>(h, logits);
    op.lse = static_cast<const Accumulation<T>*>(lse.const_data_ptr());
    op.v = static_cast<const T*>(v.const_data_ptr());
    op.v_stride = row_stride(v);
    op.dg = output_column<T>(dg, logits);
    op.dh = output_column<T>(dh, logits);
    run_rows(device, op, make_rows<T>(logits, &v, q, &df), logits);
  });
  return {dg, dh, df};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rds_fast_native, CUDA, m) {
  m.impl("cross_entropy", TORCH_BOX(&cross_entropy));
  m.impl("cross_entropy_backward", TORCH_BOX(&cross_entropy_backward));
  m.impl("cross_entropy_double_backward", TORCH_BOX(&cross_entropy_double_backward));
}

}  // namespace rds_fast::cuda
