// The target distribution q' of a row, as the loops of softmax.h ask for it: none, a class index, or probabilities.
//
// With label smoothing ε over C classes, q' = (1 − ε) q + ε / C; on = 1 − ε and off = ε / C below.
#pragma once

#include "rows.h"

namespace rds_fast::cpu::RDS_FAST_CAPABILITY {

// Sums over a row of logits, relative to a reference so that large logits do not cancel.
template <typename A>
struct TargetSums {
  A of_logits = 0;  // Σ (f − reference), or Σ q' (f − reference) for probabilities
  A of_target = 0;  // Σ q' for probabilities
  RDS_FAST_INLINE void merge(TargetSums other) {
    of_logits += other.of_logits;
    of_target += other.of_target;
  }
};

// A reference must be finite.
template <typename A>
RDS_FAST_INLINE A finite_or_zero(A value) {
  return is_infinite(value) || is_nan(value) ? A(0) : value;
}

// q' = 0: the log-sum-exp alone.
template <typename T>
struct NoTarget {
  static constexpr bool present = false, needs_total = false;

  struct Sums {
    template <typename At>
    RDS_FAST_INLINE void add(Vec<T>, At) {}
    RDS_FAST_INLINE TargetSums<Acc<T>> total() const { return {}; }
  };
  struct Row {
    RDS_FAST_INLINE Sums sums(const T*) const { return {}; }
    RDS_FAST_INLINE Acc<T> total() const { return 0; }
    template <typename At>
    RDS_FAST_INLINE Vec<T> minus_target(Vec<T> value, Acc<T>, At) const {
      return value;
    }
  };
  RDS_FAST_INLINE Row row(int64_t) const { return {}; }
};

// A class index: q' = off everywhere, and on in addition at the class. 0 throughout in an ignored row.
template <typename T>
struct IndexTarget {
  using A = Acc<T>;
  static constexpr bool present = true, needs_total = false;

  struct Sums {
    A reference;
    bool needed;
    Vec<T> sum = Vec<T>{};
    RDS_FAST_INLINE void add(Vec<T> f, Whole) {
      if (needed) sum += f - reference;
    }
    RDS_FAST_INLINE void add(Vec<T> f, Part at) {
      if (!needed) return;
      alignas(sizeof(Vec<T>)) A lanes[kLanes<T>];
      std::memcpy(lanes, &f, sizeof(f));
      for (int64_t i = 0; i < at.count; ++i) sum[i] += lanes[i] - reference;
    }
    RDS_FAST_INLINE TargetSums<A> total() const { return {needed ? sum_of_lanes<T>(sum) : A(0), 0}; }
  };

  struct Row {
    int64_t index;
    SmoothedTarget<A> weights;

    RDS_FAST_INLINE A reference(const T* x) const { return finite_or_zero(widen(x[index])); }
    RDS_FAST_INLINE Sums sums(const T* x) const { return {reference(x), weights.off != A(0)}; }
    RDS_FAST_INLINE A total() const { return weights.total; }
    RDS_FAST_INLINE A cross_entropy(const T* x, A max, A log_sum, TargetSums<A> sums) const {
      if (weights.total == A(0)) return A(0);
      if (is_infinite(log_sum)) return A(NAN);                     // as PyTorch: a row of -inf, or one that holds +inf
      A expected = weights.on * (widen(x[index]) - reference(x));  // Σ q' (f − reference)
      if (weights.on == A(0)) expected = A(0);
      if (weights.off != A(0)) expected += weights.off * sums.of_logits;
      return ((max - reference(x)) + log_sum) - expected;
    }
    // The lanes of a vector at the class.
    template <typename At>
    RDS_FAST_INLINE BitsVec<A> is_class(At at) const {
      using Bits = BitsVec<A>;
      const int64_t lane = index - at.i;
      Bits lanes;
      for (int64_t i = 0; i < kLanes<T>; ++i) lanes[i] = i;
      return lanes == (Bits{} + static_cast<decltype(lanes[0] + 0)>(lane >= 0 && lane < kLanes<T> ? lane : -1));
    }
    template <typename At>
    RDS_FAST_INLINE Vec<T> target(At at) const {
      return is_class(at) ? splat<T>(weights.on + weights.off) : splat<T>(weights.off);
    }
    template <typename At>
    RDS_FAST_INLINE Vec<T> minus_target(Vec<T> value, A g_ce, At at) const {
      return weights.total == A(0) ? value : value - target(at) * g_ce;
    }
    template <typename At>
    RDS_FAST_INLINE Vec<T> times_target(Vec<T> value, At at) const {
      return value * target(at);
    }
  };

  const cpu::Target& given;
  int64_t classes;
  SmoothedTarget<A> weights{given.label_smoothing, classes, false};

  RDS_FAST_INLINE Row row(int64_t row) const {
    const int64_t index = given.indices[row * given.index_stride];
    const bool ignored = index == given.ignore_index;
    if (ignored) return {0, SmoothedTarget<A>(given.label_smoothing, classes, true)};
    return {index, weights};
  }
};

// Probabilities of storage type P, which need not sum to 1.
template <typename T, typename P>
struct ProbabilityTarget {
  using A = Acc<T>;
  static constexpr bool present = true, needs_total = true;

  struct Row {
    const P* probabilities;
    A on, off;

    template <typename At>
    RDS_FAST_INLINE Vec<T> target(At at) const {
      return at(probabilities, A(0)) * on + off;
    }
    struct Sums {
      const Row& row;
      A reference;
      Vec<T> of_logits = Vec<T>{}, of_target = Vec<T>{};
      RDS_FAST_INLINE void add(Vec<T> f, Whole at) {
        const Vec<T> q = row.target(at);
        of_logits += q * (f - reference);
        of_target += q;
      }
      RDS_FAST_INLINE void add(Vec<T> f, Part at) {
        const Vec<T> q = row.target(at);
        for (int64_t i = 0; i < at.count; ++i) {
          of_logits[i] += q[i] * (f[i] - reference);
          of_target[i] += q[i];
        }
      }
      RDS_FAST_INLINE TargetSums<A> total() const { return {sum_of_lanes<T>(of_logits), sum_of_lanes<T>(of_target)}; }
    };
    RDS_FAST_INLINE A reference(const T* x) const { return finite_or_zero(widen(x[0])); }
    RDS_FAST_INLINE Sums sums(const T* x) const { return {*this, reference(x)}; }
    RDS_FAST_INLINE A total() const { return 0; }  // known only when summed
    RDS_FAST_INLINE A total_of(int64_t begin, int64_t end) const {
      Vec<T> sums[4] = {};
      for_vectors<T>(begin, end, [&](auto at, int k) { sums[k] += at(probabilities, A(0)); });
      return on * sum_of_lanes<T>(sum_of_four<T>(sums)) + off * A(end - begin);
    }
    RDS_FAST_INLINE A cross_entropy(const T* x, A max, A log_sum, TargetSums<A> sums) const {
      if (is_infinite(log_sum)) return A(NAN);
      return sums.of_target * ((max - reference(x)) + log_sum) - sums.of_logits;
    }
    template <typename At>
    RDS_FAST_INLINE Vec<T> minus_target(Vec<T> value, A g_ce, At at) const {
      return value - target(at) * g_ce;
    }
    template <typename At>
    RDS_FAST_INLINE Vec<T> times_target(Vec<T> value, At at) const {
      return value * target(at);  // beyond the end value is 0
    }
  };

  const cpu::Target& given;
  int64_t classes;

  RDS_FAST_INLINE Row row(int64_t row) const {
    return {row_of<P>(given.probabilities, row), A(1.0 - given.label_smoothing),
            A(given.label_smoothing / static_cast<double>(classes))};
  }
};

}  // namespace rds_fast::cpu::RDS_FAST_CAPABILITY
