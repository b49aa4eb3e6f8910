// The log-sum-exp and the cross-entropy, with their derivatives, by one set of loops.
//
// For logits f, l = log Σ exp f, s = exp(f − l) and a target distribution q' with Q = Σ q' (q' = 0 for the
// log-sum-exp):
//
//     forward            l,  ce = Q l − Σ q' f
//     backward           gx = a s − g_ce q',  a = g_ce Q + g_lse
//     double backward    S = Σ v s,  T = Σ v q':  dg_ce = Q S − T,  dg_lse = S,  dx = a s (v − S)
//
// Infinities need no case: exp(f − l) gives what PyTorch gives.
//
// l is rounded, so the s of a row sum to 1 + δ, |δ| up to half a unit in l's last place. Where s is the result that
// does not matter. In v − S and in a s − g_ce q' it does: both cancel when one class has nearly all of s. There Σ s is
// summed and divided by.
#pragma once

#include <cfloat>
#include <type_traits>

#include "elementary.h"
#include "rows.h"
#include "targets.h"

namespace rds_fast::cpu::RDS_FAST_CAPABILITY {

// Σ exp(x − max) lane by lane. max stays in the finite range: below it −inf would be subtracted from −inf, above it
// +inf from +inf. A row of −inf then has sum 0, a row that holds +inf has sum inf, and the value is right for both.
template <typename T>
struct OnlineSum {
  static constexpr Acc<T> kLargest = sizeof(Acc<T>) == 4 ? Acc<T>(FLT_MAX) : Acc<T>(DBL_MAX);
  Vec<T> max = splat<T>(-kLargest);
  Vec<T> sum = Vec<T>{};

  RDS_FAST_INLINE void raise_to(Vec<T> candidate) {
    const Vec<T> raised = smaller(splat<T>(kLargest), larger(candidate, max));
    sum *= exponentials(max - raised);
    max = raised;
  }
  RDS_FAST_INLINE LogSumExpState<Acc<T>> state() const {
    const Acc<T> largest = largest_lane<T>(max);
    return {largest, sum_of_lanes<T>(sum * exponentials(max - largest))};
  }
};

// The state of x[begin, end), and visit(values, at) on each vector of it. The maximum is raised once for eight vectors.
template <typename T, typename Visit>
RDS_FAST_INLINE LogSumExpState<Acc<T>> log_sum_exp(const T* x, int64_t begin, int64_t end, Visit visit) {
  constexpr int64_t L = kLanes<T>;
  constexpr int kGroup = 8;
  OnlineSum<T> online;
  int64_t i = begin;
  // The compiler takes the maxima, and with them the first touch of each line, in an order of its own, and at some
  // alignments of the row the hardware then prefetches nothing (a third of the rate on a Zen 5): hence by hand.
  constexpr int64_t kAhead = 2048;
  constexpr int kLine = 64 / sizeof(T);
  for (; i + kGroup * L <= end; i += kGroup * L) {
#pragma GCC unroll 8
    for (int k = 0; k < kGroup * L; k += kLine) __builtin_prefetch(x + i + k + kAhead / sizeof(T));
    Vec<T> values[kGroup];
#pragma GCC unroll 8
    for (int k = 0; k < kGroup; ++k) values[k] = load(x + i + k * L);
    online.raise_to(larger(larger(larger(values[0], values[1]), larger(values[2], values[3])),
                           larger(larger(values[4], values[5]), larger(values[6], values[7]))));
#pragma GCC unroll 8
    for (int k = 0; k < kGroup; ++k) {
      online.sum += exponentials(values[k] - online.max);
      visit(values[k], Whole{i + k * L});
    }
  }
  for (; i + L <= end; i += L) {
    const Vec<T> values = load(x + i);
    online.raise_to(values);
    online.sum += exponentials(values - online.max);
    visit(values, Whole{i});
  }
  if (i < end) {
    const Part at{i, end - i};
    const Vec<T> values = at(x, -Acc<T>(INFINITY));
    online.raise_to(values);
    online.sum += exponentials(values - online.max);
    visit(at(x, Acc<T>(0)), at);
  }
  return online.state();
}

template <typename A>
struct ForwardPartial {
  LogSumExpState<A> lse;
  TargetSums<A> sums;
};

template <typename T, typename Target>
void softmax_forward(const Shape& shape, Rows x, const Target& target, Results ce, Results lse, Saved saved) {
  using A = Acc<T>;
  const auto finish = [&](int64_t row, const ForwardPartial<A>& total) {
    const A value = total.lse.value();
    set_result<T>(lse, row, value);
    if (saved.data != nullptr) static_cast<A*>(saved.data)[row] = value;
    if constexpr (Target::present) {
      const A log_sum = logarithm(total.lse.sum);
      set_result<T>(ce, row, target.row(row).cross_entropy(row_of<T>(x, row), total.lse.max, log_sum, total.sums));
    }
  };
  reduce_rows<ForwardPartial<A>>(
      shape,
      [&](int64_t row, int64_t begin, int64_t end) {
        const T* values = row_of<T>(x, row);
        const auto q = target.row(row);
        auto sums = q.sums(values);
        ForwardPartial<A> partial;
        partial.lse = log_sum_exp(values, begin, end, [&](Vec<T> f, auto at) { sums.add(f, at); });
        partial.sums = sums.total();
        return partial;
      },
      [](ForwardPartial<A>& total, const ForwardPartial<A>& partial) {
        total.lse.merge(partial.lse);
        total.sums.merge(partial.sums);
      },
      finish, [](int64_t, int64_t, int64_t, const ForwardPartial<A>&) {});
}

// The cotangents of a row: g_ce is absent for the log-sum-exp.
template <typename T, typename Target>
struct Cotangents {
  Values g_ce;
  Values g_lse;
  RDS_FAST_INLINE Acc<T> of_ce(int64_t row) const { return Target::present ? value_of<T>(g_ce, row) : Acc<T>(0); }
  RDS_FAST_INLINE Acc<T> of_softmax(int64_t row, Acc<T> target_total) const {
    const Acc<T> g = value_of<T>(g_lse, row);
    return Target::present && target_total != Acc<T>(0) ? of_ce(row) * target_total + g : g;
  }
};

// 1 / Σ s; 1 where l is infinite or NaN, which must go through as it is.
template <typename A>
RDS_FAST_INLINE A normaliser(A sum_of_softmax) {
  return sum_of_softmax > A(0.5) && sum_of_softmax < A(2) ? A(1) / sum_of_softmax : A(1);
}

// s of a row of one chunk, so that its exponentials are taken once; of longer rows they are taken again.
template <typename A, bool kept>
struct KeptSoftmax {};
template <typename A>
struct KeptSoftmax<A, true> {
  alignas(64) A values[kChunk];
};

template <typename T, bool kept, typename At>
RDS_FAST_INLINE void keep(KeptSoftmax<Acc<T>, kept>& softmax, Vec<T> values, At at) {
  if constexpr (kept) store(softmax.values + at.i, values);
}
template <typename T, bool kept, typename At>
RDS_FAST_INLINE Vec<T> softmax_at(const KeptSoftmax<Acc<T>, kept>& softmax, const T* x, Acc<T> lse, At at) {
  if constexpr (kept) return at(softmax.values, Acc<T>(0));
  return exponentials(at(x, Acc<T>(0)) - lse);
}

template <typename A, bool kept>
struct BackwardPartial {
  A of_ones = 0;       // Σ s
  A target_total = 0;  // Q, where it must be summed
  KeptSoftmax<A, kept> softmax;
};

template <typename T, typename Target, bool kept>
void softmax_backward(const Shape& shape, Cotangents<T, Target> g, Rows x, const Target& target, const void* lse,
                      void* gx) {
  using A = Acc<T>;
  using Partial = BackwardPartial<A, kept>;
  const bool streamed = is_streamed<T>(shape);
  const auto write = [&](int64_t row, int64_t begin, int64_t end, const Partial& total) {
    const T* values = row_of<T>(x, row);
    const auto q = target.row(row);
    const A a = g.of_softmax(row, Target::needs_total ? total.target_total : q.total()) * normaliser(total.of_ones);
    const A g_ce = g.of_ce(row), l = static_cast<const A*>(lse)[row];
    write_values(static_cast<T*>(gx) + row * shape.columns, begin, end, streamed,
                 [&](auto at) { return q.minus_target(softmax_at<T>(total.softmax, values, l, at) * a, g_ce, at); });
  };
  if constexpr (!Target::present) {
    for_chunks(shape, [&](int64_t row, int64_t begin, int64_t end) { write(row, begin, end, {A(1), A(0), {}}); });
  } else {
    reduce_rows<Partial>(
        shape,
        [&](int64_t row, int64_t begin, int64_t end) {
          const T* values = row_of<T>(x, row);
          const auto q = target.row(row);
          const A l = static_cast<const A*>(lse)[row];
          Vec<T> of_ones[4] = {};
          Partial partial;
          for_vectors<T>(begin, end, [&](auto at, int k) {
            const Vec<T> softmax = exponentials(at(values, -A(INFINITY)) - l);
            of_ones[k] += softmax;
            keep<T>(partial.softmax, softmax, at);
          });
          partial.of_ones = sum_of_lanes<T>(sum_of_four<T>(of_ones));
          if constexpr (Target::needs_total) partial.target_total = q.total_of(begin, end);
          return partial;
        },
        [](Partial& total, const Partial& partial) {
          total.of_ones += partial.of_ones;
          total.target_total += partial.target_total;
        },
        [](int64_t, const Partial&) {}, write);
  }
}

template <typename A, bool kept>
struct DoublePartial {
  A of_softmax = 0;    // S, once divided by Σ s
  A of_ones = 0;       // Σ s
  A of_target = 0;     // T
  A target_total = 0;  // Q, where it must be summed
  KeptSoftmax<A, kept> softmax;
};

template <typename T, typename Target, bool kept>
void softmax_double_backward(const Shape& shape, Rows v, Cotangents<T, Target> g, Rows x, const Target& target,
                             const void* lse, Results dg_ce, Results dg_lse, void* dx) {
  using A = Acc<T>;
  using Partial = DoublePartial<A, kept>;
  const bool streamed = is_streamed<T>(shape);
  reduce_rows<Partial>(
      shape,
      [&](int64_t row, int64_t begin, int64_t end) {
        const T *values = row_of<T>(x, row), *cotangent = row_of<T>(v, row);
        const auto q = target.row(row);
        const A l = static_cast<const A*>(lse)[row];
        Vec<T> of_softmax[4] = {}, of_ones[4] = {}, of_target[4] = {};
        Partial partial;
        for_vectors<T>(begin, end, [&](auto at, int k) {
          // The lanes beyond the end have s = 0 by an infinite logit, and v = 0.
          const Vec<T> u = at(cotangent, A(0));
          const Vec<T> softmax = exponentials(at(values, -A(INFINITY)) - l);
          of_softmax[k] += u * softmax;
          of_ones[k] += softmax;
          keep<T>(partial.softmax, softmax, at);
          if constexpr (Target::present) of_target[k] += q.times_target(u, at);
        });
        partial.of_softmax = sum_of_lanes<T>(sum_of_four<T>(of_softmax));
        partial.of_ones = sum_of_lanes<T>(sum_of_four<T>(of_ones));
        partial.of_target = sum_of_lanes<T>(sum_of_four<T>(of_target));
        if constexpr (Target::needs_total) partial.target_total = q.total_of(begin, end);
        return partial;
      },
      [](Partial& total, const Partial& partial) {
        total.of_softmax += partial.of_softmax;
        total.of_ones += partial.of_ones;
        total.of_target += partial.of_target;
        total.target_total += partial.target_total;
      },
      [&](int64_t row, Partial& total) {
        total.of_softmax *= normaliser(total.of_ones);
        if (!Target::needs_total) total.target_total = target.row(row).total();
        set_result<T>(dg_lse, row, total.of_softmax);
        if constexpr (Target::present) {
          const A scaled = total.target_total == A(0) ? A(0) : total.target_total * total.of_softmax;
          set_result<T>(dg_ce, row, scaled - total.of_target);
        }
      },
      [&](int64_t row, int64_t begin, int64_t end, const Partial& total) {
        const T *values = row_of<T>(x, row), *cotangent = row_of<T>(v, row);
        const A l = static_cast<const A*>(lse)[row], a = g.of_softmax(row, total.target_total);
        write_values(static_cast<T*>(dx) + row * shape.columns, begin, end, streamed, [&](auto at) {
          const Vec<T> softmax = softmax_at<T>(total.softmax, values, l, at);
          return softmax * a * (at(cotangent, A(0)) - total.of_softmax);
        });
      });
}

// call(std::true_type or false_type): whether the softmax of a row is kept.
template <typename Call>
void with_kept_softmax(const Shape& shape, const Call& call) {
  shape.columns <= kChunk ? call(std::true_type()) : call(std::false_type());
}

}  // namespace rds_fast::cpu::RDS_FAST_CAPABILITY
