// Layer, group and instance norm: rows normalised by their own mean and variance, with a weight and a bias by channel.
// With x̂ = (x − mean) r, r = (var + eps)^−½, u_w = weight u and P(t) = t − mean(t) − x̂ mean(t x̂) over the row:
//
//     backward           gx = r P(u_w);  gweight = Σ u x̂, gbias = Σ u over the channel
//     double backward    du = weight r P(v) + vweight x̂ + vbias,  dweight = Σ u r P(v) over the channel,
//                        dx = −r² (c_uv x̂ + c_v P(u_w) + c_u P(v)) + r P(vweight u),
//                        c_u = mean(u_w x̂), c_v = mean(v x̂), c_uv = mean(u_w v) − mean(u_w) mean(v) − c_u c_v
#include "group_norm.h"

namespace rds_fast::cpu::RDS_FAST_CAPABILITY {

// The mean of a part of a row and the sum of squared deviations from it.
template <typename A>
struct Moments {
  A count = 0, mean = 0, squares = 0;

  RDS_FAST_INLINE void operator+=(const Moments& other) {
    const A total = count + other.count, share = other.count / total, difference = other.mean - mean;
    mean += difference * share;
    squares += other.squares + difference * difference * count * share;
    count = total;
  }
};

// One pass of deviations from the mean of the first vector, which is nearly always near enough: what they add up to
// corrects both results. Where the correction would cost digits of the squares, a second one from the mean.
template <typename T>
RDS_FAST_INLINE Moments<Acc<T>> moments(const T* x, int64_t begin, int64_t end) {
  using A = Acc<T>;
  const A count = A(end - begin);
  const int64_t first = end - begin < kLanes<T> ? end - begin : kLanes<T>;
  A center = sum_of_lanes<T>(load_part(x + begin, first, A(0))) / A(first);
  for (bool second = false;; second = true) {
    // Rounded to T, so that the lanes beyond the end, which pass through T, do not deviate.
    T rounded;
    store_part(&rounded, splat<T>(center), 1);
    center = widen(rounded);
    Vec<T> sums[4] = {}, squares[4] = {};
    for_vectors<T>(begin, end, [&](auto at, int k) {
      const Vec<T> deviation = at(x, center) - center;
      sums[k] += deviation;
      squares[k] += deviation * deviation;
    });
    const A correction = sum_of_lanes<T>(sum_of_four<T>(sums)) / count, lost = correction * correction * count;
    const A left = sum_of_lanes<T>(sum_of_four<T>(squares)) - lost;
    if (second || lost <= 8 * left) return {count, center + correction, left > A(0) || is_nan(left) ? left : A(0)};
    center += correction;
  }
}

// Long runs of a large result are streamed; in short ones the ends would break up the lines.
template <typename T>
RDS_FAST_INLINE bool is_streamed(const GroupShape& shape, const RowLayout& layout) {
  return layout.length >= 512 && is_streamed<T>(Shape{shape.dtype, layout.rows(), layout.columns()});
}

template <typename T, bool kPerElement>
void norm_forward(const GroupShape& shape, const RowLayout& layout, const void* x, ChannelPair affine, double eps,
                  void* y, RowMoments result) {
  using A = Acc<T>;
  const bool streamed = is_streamed<T>(shape, layout);
  const Coefficient<T, kPerElement> weight{static_cast<const A*>(affine.weight), A(1)};
  const Coefficient<T, kPerElement> bias{static_cast<const A*>(affine.bias), A(0)};
  A *const means = static_cast<A*>(result.mean), *const rstds = static_cast<A*>(result.rstd);
  for_rows<Moments<A>>(
      layout, false,
      [&](int64_t row, int64_t chunk) {
        int64_t first = layout.columns(), last = 0;
        layout.for_runs(chunk, [&](int64_t, int64_t begin, int64_t end) {
          first = begin < first ? begin : first;
          last = end;
        });
        return moments(static_cast<const T*>(x) + row * layout.columns(), first, last);
      },
      [&](int64_t row, const Moments<A>& total) {
        means[row] = total.mean;
        rstds[row] = A(1) / square_root(A(total.squares / total.count + eps));
      },
      [&](int64_t row, int64_t chunk, const Moments<A>&, int64_t) {
        const T* const values = static_cast<const T*>(x) + row * layout.columns();
        T* const out = static_cast<T*>(y) + row * layout.columns();
        const A mean = means[row], r = rstds[row];
        layout.for_runs(chunk, [&](int64_t run, int64_t begin, int64_t end) {
          const auto w = weight.of_run(layout, row, run), b = bias.of_run(layout, row, run);
          write_values(out, begin, end, streamed,
                       [&](auto at) { return (at(values, A(0)) - mean) * r * w(at) + b(at); });
        });
      });
}

template <typename A, int count>
struct Sums {
  A values[count] = {};
  RDS_FAST_INLINE void operator+=(const Sums& other) {
    for (int i = 0; i < count; ++i) values[i] += other.values[i];
  }
};

// Adds f(at, sums) over the runs of a chunk. weight multiplies the sums of a run where it is constant there, and
// keep(part, sums) sees them before it does.
template <typename T, int count, int weighted, typename Weight, typename F, typename Keep>
RDS_FAST_INLINE Sums<Acc<T>, count> sum_runs(const RowLayout& layout, int64_t row, int64_t chunk, const Weight& weight,
                                             F f, Keep keep) {
  Vec<T> totals[count] = {};
  layout.for_runs(chunk, [&](int64_t run, int64_t begin, int64_t end) {
    const auto w = weight.of_run(layout, row, run);
    Vec<T> sums[2][count] = {};
    for_vectors<T>(begin, end, [&](auto at, int k) { f(at, w, run, sums[k & 1]); });
    for (int i = 0; i < count; ++i) sums[0][i] += sums[1][i];
    keep(layout.part(run, begin), sums[0]);
    for (int i = 0; i < count; ++i) totals[i] += i < weighted ? sums[0][i] * w.constant : sums[0][i];
  });
  Sums<Acc<T>, count> result;
  for (int i = 0; i < count; ++i) result.values[i] = sum_of_lanes<T>(totals[i]);
  return result;
}

// A row's values of x̂, and its rstd.
template <typename T>
struct Normalised {
  using A = Acc<T>;
  const T* x;
  A mean, r;
  RDS_FAST_INLINE Normalised(const RowLayout& layout, const void* x, RowMoments moments, int64_t row)
      : x(static_cast<const T*>(x) + row * layout.columns()),
        mean(static_cast<const A*>(moments.mean)[row]),
        r(static_cast<const A*>(moments.rstd)[row]) {}
  template <typename At>
  RDS_FAST_INLINE Vec<T> operator()(At at) const {
    return (at(x, A(0)) - mean) * r;
  }
};

template <typename T, bool kPerElement>
void norm_backward(const GroupShape& shape, const RowLayout& layout, const void* u, const void* x, const void* weight,
                   RowMoments moments, const void* x_cotangent, void* gx, ChannelPair gradient) {
  using A = Acc<T>;
  const bool streamed = is_streamed<T>(shape, layout), affine = gradient.weight != nullptr;
  const Coefficient<T, kPerElement> weights{static_cast<const A*>(weight), A(1)};
  const ChannelSums<A> of_weight(layout, affine), of_bias(layout, affine);
  for_rows<Sums<A, 2>>(
      layout, affine && kPerElement,
      [&](int64_t row, int64_t chunk) {
        const T* const cotangent = static_cast<const T*>(u) + row * layout.columns();
        const Normalised<T> normalised(layout, x, moments, row);
        return sum_runs<T, 2, kPerElement ? 0 : 2>(
            layout, row, chunk, weights,
            [&](auto at, const auto& w, int64_t, Vec<T>* sums) {
              const Vec<T> values = kPerElement ? at(cotangent, A(0)) * w(at) : at(cotangent, A(0));
              sums[0] += values;
              sums[1] += values * normalised(at);
            },
            [&](int64_t part, const Vec<T>* sums) {
              if (kPerElement || !affine) return;
              of_bias.of_parts(layout, row)[part] = sum_of_lanes<T>(sums[0]);
              of_weight.of_parts(layout, row)[part] = sum_of_lanes<T>(sums[1]);
            });
      },
      [&](int64_t, Sums<A, 2>& total) {
        for (A& value : total.values) value /= A(layout.columns());
      },
      [&](int64_t row, int64_t chunk, const Sums<A, 2>& mean, int64_t block) {
        const int64_t offset = row * layout.columns();
        const T *const cotangent = static_cast<const T*>(u) + offset, *const added = static_cast<const T*>(x_cotangent);
        const Normalised<T> normalised(layout, x, moments, row);
        // By value: the compiler must take it that the stores below may change what lies in memory.
        const A mean_u = mean.values[0], mean_ux = mean.values[1];
        A* const gweight = of_weight.of_elements(layout, row, block);
        A* const gbias = of_bias.of_elements(layout, row, block);
        layout.for_runs(chunk, [&](int64_t run, int64_t begin, int64_t end) {
          const auto w = weights.of_run(layout, row, run);
          write_values(static_cast<T*>(gx) + offset, begin, end, streamed, [&](auto at) {
            const Vec<T> values = at(cotangent, A(0)), unit = normalised(at);
            if (kPerElement && affine) {
              add_to<T>(gweight, at, values * unit);
              add_to<T>(gbias, at, values);
            }
            const Vec<T> gradient = (values * w(at) - mean_u - unit * mean_ux) * normalised.r;
            return added == nullptr ? gradient : gradient + at(added + offset, A(0));
          });
        });
      });
  if (!affine) return;
  of_weight.add_up(gradient.weight);
  of_bias.add_up(gradient.bias);
}

// The sums of a row that its double backward needs, divided by K.
enum Mean { of_u, of_ux, of_uv, of_v, of_vx, of_au, of_aux, kMeans };

template <typename T, bool kPerElement>
void norm_double_backward(const GroupShape& shape, const RowLayout& layout, const void* v, ChannelPair cotangents,
                          const void* u, const void* x, const void* weight, RowMoments moments, void* du, void* dx,
                          void* dweight) {
  using A = Acc<T>;
  using Totals = Sums<A, kMeans>;
  const int64_t columns = layout.columns();
  const bool streamed = is_streamed<T>(shape, layout), wanted = dweight != nullptr;
  const bool of_weight = cotangents.weight != nullptr;
  const Coefficient<T, kPerElement> weights{static_cast<const A*>(weight), A(1)};
  const Coefficient<T, kPerElement> vweights{static_cast<const A*>(cotangents.weight), A(0)};
  const Coefficient<T, kPerElement> vbiases{static_cast<const A*>(cotangents.bias), A(0)};
  const ChannelSums<A> sums_of_weight(layout, wanted), sums_of_u(layout, wanted && !kPerElement),
      sums_of_ux(layout, wanted && !kPerElement);
  // An absent v is a row of zeros, the same for all.
  const std::unique_ptr<T[]> zeros(v == nullptr ? new T[columns]() : nullptr);
  const auto row_of_v = [&](int64_t row) {
    return v == nullptr ? zeros.get() : static_cast<const T*>(v) + row * columns;
  };
  for_rows<Totals>(
      layout, wanted && kPerElement,
      [&](int64_t row, int64_t chunk) {
        const T *const cotangent = static_cast<const T*>(u) + row * columns, *const second = row_of_v(row);
        const Normalised<T> normalised(layout, x, moments, row);
        const auto keep = [&](int64_t part, const Vec<T>* sums) {
          if (kPerElement || !wanted) return;
          sums_of_u.of_parts(layout, row)[part] = sum_of_lanes<T>(sums[of_u]);
          sums_of_ux.of_parts(layout, row)[part] = sum_of_lanes<T>(sums[of_ux]);
          sums_of_weight.of_parts(layout, row)[part] = sum_of_lanes<T>(sums[of_uv]);
        };
        const auto add = [&](auto at, const auto& w, int64_t, Vec<T>* sums) {
          const Vec<T> values = kPerElement ? at(cotangent, A(0)) * w(at) : at(cotangent, A(0));
          const Vec<T> unit = normalised(at), other = at(second, A(0));
          sums[of_u] += values;
          sums[of_ux] += values * unit;
          sums[of_uv] += values * other;
          sums[of_v] += other;
          sums[of_vx] += other * unit;
        };
        const auto add_of_weight = [&](auto at, const auto& w, int64_t run, Vec<T>* sums) {
          add(at, w, run, sums);
          const Vec<T> values = at(cotangent, A(0)) * vweights.of_run(layout, row, run)(at);
          sums[of_au] += values;
          sums[of_aux] += values * normalised(at);
        };
        constexpr int kWeighted = kPerElement ? 0 : 3;  // of_u, of_ux and of_uv
        Totals total;
        if (of_weight) {
          total = sum_runs<T, kMeans, kWeighted>(layout, row, chunk, weights, add_of_weight, keep);
        } else {
          const auto five = sum_runs<T, of_au, kWeighted>(layout, row, chunk, weights, add, keep);
          for (int i = 0; i < of_au; ++i) total.values[i] = five.values[i];
        }
        return total;
      },
      [&](int64_t row, Totals& total) {
        for (A& value : total.values) value /= A(columns);
        if (kPerElement || !wanted) return;
        A* const out = sums_of_weight.of_parts(layout, row);
        const A *const us = sums_of_u.of_parts(layout, row), *const uxs = sums_of_ux.of_parts(layout, row);
        const A r = static_cast<const A*>(moments.rstd)[row];
        for (int64_t i = 0; i < layout.parts(); ++i) {
          out[i] = r * (out[i] - us[i] * total.values[of_v] - uxs[i] * total.values[of_vx]);
        }
      },
      [&](int64_t row, int64_t chunk, const Totals& total, int64_t block) {
        const T *const cotangent = static_cast<const T*>(u) + row * columns, *const second = row_of_v(row);
        const Normalised<T> normalised(layout, x, moments, row);
        const A r = normalised.r, *const mean = total.values, mean_v = mean[of_v];
        const A c_u = mean[of_ux], c_v = mean[of_vx], c_uv = mean[of_uv] - mean[of_u] * mean_v - c_u * c_v;
        // dx as a combination of x̂, u, v and 1
        const A by_unit = r * r * (2 * c_u * c_v - c_uv) - r * mean[of_aux];
        const A by_one = r * r * (c_v * mean[of_u] + c_u * mean_v) - r * mean[of_au];
        A* const sums = sums_of_weight.of_elements(layout, row, block);
        layout.for_runs(chunk, [&](int64_t run, int64_t begin, int64_t end) {
          const auto w = weights.of_run(layout, row, run), a = vweights.of_run(layout, row, run);
          const auto h = vbiases.of_run(layout, row, run);
          write_values(static_cast<T*>(du) + row * columns, begin, end, streamed, [&](auto at) {
            const Vec<T> unit = normalised(at), projected = (at(second, A(0)) - mean_v - unit * c_v) * r;
            if (kPerElement && wanted) add_to<T>(sums, at, at(cotangent, A(0)) * projected);
            return projected * w(at) + unit * a(at) + h(at);
          });
          write_values(static_cast<T*>(dx) + row * columns, begin, end, streamed, [&](auto at) {
            const Vec<T> of_cotangent = at(cotangent, A(0)) * (a(at) * r - w(at) * (r * r * c_v));
            return of_cotangent + normalised(at) * by_unit - at(second, A(0)) * (r * r * c_u) + by_one;
          });
        });
      });
  if (wanted) sums_of_weight.add_up(dweight);
}

template <bool value>
struct PerElement {
  static constexpr bool of_elements = value;
};

// call(T(), PerElement<…>(), layout) with the storage type and how the coefficients vary.
template <typename Call>
void with_layout(const GroupShape& shape, bool affine, const Call& call) {
  if (shape.samples == 0) return;
  const RowLayout layout(shape, affine);
  with_dtype(shape.dtype, [&](auto example) {
    return layout.per_element ? call(example, PerElement<true>(), layout) : call(example, PerElement<false>(), layout);
  });
}

void group_norm(GroupShape shape, const void* x, ChannelPair affine, double eps, void* y, RowMoments moments) {
  with_layout(shape, affine.weight || affine.bias, [&](auto example, auto kind, const RowLayout& layout) {
    norm_forward<decltype(example), kind.of_elements>(shape, layout, x, affine, eps, y, moments);
  });
}

void group_norm_backward(GroupShape shape, const void* u, const void* x, const void* weight, RowMoments moments,
                         const void* x_cotangent, void* gx, ChannelPair gradient) {
  with_layout(shape, weight || gradient.weight, [&](auto example, auto kind, const RowLayout& layout) {
    norm_backward<decltype(example), kind.of_elements>(shape, layout, u, x, weight, moments, x_cotangent, gx, gradient);
  });
}

void group_norm_double_backward(GroupShape shape, const void* v, ChannelPair cotangents, const void* u, const void* x,
                                const void* weight, RowMoments moments, void* du, void* dx, void* dweight) {
  const bool affine = weight || cotangents.weight || cotangents.bias || dweight;
  with_layout(shape, affine, [&](auto example, auto kind, const RowLayout& layout) {
    norm_double_backward<decltype(example), kind.of_elements>(shape, layout, v, cotangents, u, x, weight, moments, du,
                                                              dx, dweight);
  });
}

}  // namespace rds_fast::cpu::RDS_FAST_CAPABILITY
