// The backward and the double backward of batch norm: each one pass that sums and one that writes.
//
// In the notation of batch_norm.h, u the cotangent of y and u' = u where z > 0, else 0 (u' = u without a ReLU); v, a, b
// and c the cotangents of gx, gγ, gβ and gresidual; p = u' − mean(u'), q = v − mean(v); cov the covariance in a
// channel:
//
//     backward           gx = γ r p − γ r³ cov(u', d) d,   gγ = r M cov(u', d),   gβ = Σ u',   gresidual = u'
//     double backward    cᵤ = r cov(u', d), cᵥ = r cov(v, d), cᵤᵥ = cov(u', v) − cᵤ cᵥ, P(u') = p − cᵤ r d, P(v) alike:
//                        du = [z > 0] (γ r P(v) + a r d + b + c),   dγ = r M cᵤᵥ
//                        dx = −γ r² (cᵤᵥ r d + cᵥ P(u') + cᵤ P(v)) + a r P(u'), and gx again if it is wanted
//     eval mode          gx = γ r u',   gγ = r Σ u' d;   du = [z > 0] (γ r v + a r d + b + c),   dγ = r Σ u' v,
//                        dx = a r u': mean and r are constants, so one pass sums and writes
#include "batch_norm.h"

namespace rds_fast::cpu::RDS_FAST_CAPABILITY {
namespace {

// gx = γ r (p − d cov(u', d) / var(d)) from the sums of a channel; d is centred by what its mean is, since the mean
// that was taken off x is rounded.
template <typename T>
struct InputGradient {
  enum { kShiftU = kCommon, kReduceRows };
  enum { kMeanU = kShiftU, kGxOfD, kGxConstant, kRows };
  const Table<T, kRows>& table;
  const Parameters<T> parameters;
  int64_t values;

  // of_u = Σ u', of_ux = Σ u' x̂
  void fill(int64_t channel, double of_u, double of_ux, double mean_d) const {
    const double r = parameters.rstd_of(channel), count = double(values);
    const double of_d = -parameters.weight_of(channel) * r * r * of_ux / count;
    table.at(kMeanU, channel) = Acc<T>(of_u / count);
    table.at(kGxOfD, channel) = Acc<T>(of_d);
    table.at(kGxConstant, channel) = Acc<T>(-of_d * mean_d);
  }
  template <typename Coefficients, typename At>
  static RDS_FAST_INLINE Vec<T> value(const Coefficients& coefficient, At at, Vec<T> masked_u, Vec<T> centred) {
    const Vec<T> p = masked_u - coefficient(kMeanU, at);
    return p * coefficient(kScale, at) + (centred * coefficient(kGxOfD, at) + coefficient(kGxConstant, at));
  }
};

// In training mode u' is summed less a shift near its mean, or the rounding of d, which is alike where x is, would add
// up in Σ u' d.
template <typename T, bool planar>
struct Backward {
  enum { kOfU, kOfUD, kOfD, kPartials };
  using Gradient = InputGradient<T>;
  const Layout& layout;
  const Table<T, Gradient::kRows>& table;
  const Parameters<T> parameters;
  bool training;
  Mask mask;
  const T *u, *other_u, *x, *y, *x_cotangent;
  T *gx, *gresidual;
  Acc<T>* sums;

  // The shift of a channel is the mean of its first few values; 0 in eval mode, where nothing cancels.
  void prepare(const Strip& strip) const {
    for (int64_t c = 0; c < strip.channels; ++c) table.at(Gradient::kShiftU, strip.first_channel + c) = 0;
    if (!training) return;
    const Tile first = layout.sample(layout.tile(strip, 0));
    const double count = double(layout.values_of_channel(strip, first));
    double partials[kPartials * (planar ? 1 : kStripColumns)];
    reduce(strip, first, partials);
    for (int64_t c = 0; c < strip.channels; ++c) {
      table.at(Gradient::kShiftU, strip.first_channel + c) = Acc<T>(partials[kOfU * strip.channels + c] / count);
    }
  }
  RDS_FAST_OUTLINED void reduce(const Strip& strip, const Tile& tile, double* partials) const {
    const auto coefficient = table.template of<planar, Gradient::kReduceRows>(layout, strip);
    Sums<T, kPartials, planar> total(strip);
    const bool streamed = is_large<T>(layout);
    const auto masked_u = [&](auto at, int64_t offset, Vec<T> centred) {
      const Vec<T> both = at(u + offset, Acc<T>(0)) + optional_at(other_u, offset, at);
      return masked(mask, both, centred, coefficient, y, offset, at);
    };
    layout.for_rows(strip, tile, [&](int64_t offset, int64_t begin, int64_t end) {
      if (!training) {  // no sum is needed for gx
        T* const outputs[] = {gx, gresidual};
        write_outputs(outputs, offset, begin, end, streamed, [&](auto at, Vec<T>(&values)[2]) {
          const Vec<T> centred = at(x + offset, Acc<T>(0)) - coefficient(kMean, at);
          values[1] = masked_u(at, offset, centred);
          add(total, at, 0, values[1], centred);
          values[0] = values[1] * coefficient(kScale, at) + optional_at(x_cotangent, offset, at);
        });
      } else if (gresidual != nullptr) {  // u' is written for the second pass, which then needs neither y nor other_u
        T* const outputs[] = {gresidual};
        write_outputs(outputs, offset, begin, end, false, [&](auto at, Vec<T>(&values)[1]) {
          const Vec<T> centred = at(x + offset, Acc<T>(0)) - coefficient(kMean, at);
          values[0] = masked_u(at, offset, centred);
          add(total, at, 0, values[0] - coefficient(Gradient::kShiftU, at), centred);
        });
      } else {
        for_vectors<T>(begin, end, [&](auto at, int k) {
          const Vec<T> centred = at(x + offset, Acc<T>(0)) - coefficient(kMean, at);
          add(total, at, k, masked_u(at, offset, centred) - coefficient(Gradient::kShiftU, at), centred);
        });
      }
    });
    total.finish(layout, strip, partials);
  }
  static void merge(double* total, const double* partial) {
    for (int k = 0; k < kPartials; ++k) total[k] += partial[k];
  }
  void finish(int64_t channel, const double* total) const {
    const double count = double(layout.values), mean_d = training ? total[kOfD] / count : 0.0;
    const double of_u = total[kOfU] + count * double(table.at(Gradient::kShiftU, channel));
    const double of_ux = parameters.rstd_of(channel) * (total[kOfUD] - total[kOfU] * mean_d);
    sums[channel] = Acc<T>(of_u);
    sums[layout.channels + channel] = Acc<T>(of_ux);
    Gradient{table, parameters, layout.values}.fill(channel, of_u, of_ux, mean_d);
  }
  RDS_FAST_OUTLINED void write(const Strip& strip, const Tile& tile) const {
    if (!training) return;
    const auto coefficient = table.template of<planar>(layout, strip);
    const bool streamed = is_large<T>(layout);
    const T* const summed_u = gresidual != nullptr ? gresidual : u;
    const Mask mask_of_u = gresidual != nullptr ? Mask::none : mask;
    T* const outputs[] = {gx};
    layout.for_rows(strip, tile, [&](int64_t offset, int64_t begin, int64_t end) {
      write_outputs(outputs, offset, begin, end, streamed, [&](auto at, Vec<T>(&values)[1]) {
        const Vec<T> centred = at(x + offset, Acc<T>(0)) - coefficient(kMean, at);
        const Vec<T> masked_u =
            masked(mask_of_u, at(summed_u + offset, Acc<T>(0)), centred, coefficient, y, offset, at);
        values[0] = Gradient::value(coefficient, at, masked_u, centred) + optional_at(x_cotangent, offset, at);
      });
    });
  }

 private:
  template <typename Total, typename At>
  RDS_FAST_INLINE void add(Total& total, At at, int k, Vec<T> p, Vec<T> centred) const {
    total.add(kOfU, at, k, inside(at, p));
    total.add(kOfUD, at, k, inside(at, p * centred));
    total.add(kOfD, at, k, inside(at, centred));
  }
};

// ---- Double backward ------------------------------------------------------------------------------------------------

template <typename T>
struct Cotangents {
  const T *x, *residual;
  const Acc<T>*weight, *bias;
  explicit Cotangents(const BatchNormCotangents& v)
      : x(tensor<T>(v.x)),
        residual(tensor<T>(v.residual)),
        weight(static_cast<const Acc<T>*>(v.weight)),
        bias(static_cast<const Acc<T>*>(v.bias)) {}
  double weight_of(int64_t channel) const { return weight == nullptr ? 0.0 : double(weight[channel]); }
  Acc<T> bias_of(int64_t channel) const { return bias == nullptr ? Acc<T>(0) : bias[channel]; }
};

// u' and v are summed less a shift near their means, or mean(u' v) − mean(u') mean(v) would cancel.
template <typename T, bool planar>
struct DoubleBackward {
  enum { kOfU, kOfV, kOfUD, kOfVD, kOfUV, kOfD, kPartials };
  enum { kShiftU = kCommon, kShiftV, kReduceRows };
  enum {
    kMeanU = kShiftU,
    kMeanV = kShiftV,
    kDuOfD,
    kDuConstant,
    kDxOfU,
    kDxOfV,
    kDxOfD,
    kDxConstant,
    kGxConstant,
    kRows
  };
  const Layout& layout;
  const Table<T, kRows>& table;
  const Parameters<T> parameters;
  Mask mask;
  Cotangents<T> v;
  const T *u, *x, *y;
  T *du, *dx, *gx;
  Acc<T>* dweight;

  // The shift of a channel is the mean of its first few values.
  void prepare(const Strip& strip) const {
    const Tile first = layout.sample(layout.tile(strip, 0));
    const double count = double(layout.values_of_channel(strip, first));
    for (int64_t c = 0; c < strip.channels; ++c) {
      table.at(kShiftU, strip.first_channel + c) = table.at(kShiftV, strip.first_channel + c) = 0;
    }
    double sums[kPartials * (planar ? 1 : kStripColumns)];
    reduce(strip, first, sums);
    for (int64_t c = 0; c < strip.channels; ++c) {
      table.at(kShiftU, strip.first_channel + c) = Acc<T>(sums[kOfU * strip.channels + c] / count);
      table.at(kShiftV, strip.first_channel + c) = Acc<T>(sums[kOfV * strip.channels + c] / count);
    }
  }
  RDS_FAST_OUTLINED void reduce(const Strip& strip, const Tile& tile, double* partials) const {
    const auto coefficient = table.template of<planar, kReduceRows>(layout, strip);
    const Mask mask_of_u = mask == Mask::of_y ? Mask::none : mask;  // where there is a y, u is masked
    Sums<T, kPartials, planar> sums(strip);
    layout.for_rows(strip, tile, [&](int64_t offset, int64_t begin, int64_t end) {
      for_vectors<T>(begin, end, [&](auto at, int k) {
        const Vec<T> d = inside(at, at(x + offset, Acc<T>(0)) - coefficient(kMean, at));
        const Vec<T> masked_u = masked(mask_of_u, at(u + offset, Acc<T>(0)), d, coefficient, y, offset, at);
        const Vec<T> p = inside(at, masked_u - coefficient(kShiftU, at));
        const Vec<T> q = inside(at, optional_at(v.x, offset, at) - coefficient(kShiftV, at));
        sums.add(kOfU, at, k, p);
        sums.add(kOfV, at, k, q);
        sums.add(kOfUD, at, k, p * d);
        sums.add(kOfVD, at, k, q * d);
        sums.add(kOfUV, at, k, p * q);
        sums.add(kOfD, at, k, d);
      });
    });
    sums.finish(layout, strip, partials);
  }
  static void merge(double* total, const double* partial) {
    for (int k = 0; k < kPartials; ++k) total[k] += partial[k];
  }
  void finish(int64_t channel, const double* total) const {
    const double r = parameters.rstd_of(channel), gamma = parameters.weight_of(channel), a = v.weight_of(channel);
    const double count = double(layout.values);
    const auto covariance = [&](int product, int s, int t) {
      return (total[product] - total[s] * total[t] / count) / count;
    };
    const double cu = r * covariance(kOfUD, kOfU, kOfD), cv = r * covariance(kOfVD, kOfV, kOfD);
    const double cuv = covariance(kOfUV, kOfU, kOfV) - cu * cv;
    dweight[channel] = Acc<T>(r * count * cuv);
    table.at(kMeanU, channel) += Acc<T>(total[kOfU] / count);
    table.at(kMeanV, channel) += Acc<T>(total[kOfV] / count);
    // The mean is rounded, so mean(d) is not quite 0: the constants take it off d.
    const double mean_d = total[kOfD] / count;
    const double of_p = r * (a - gamma * r * cv), of_q = -gamma * r * r * cu;
    const double of_d = -r * (gamma * r * r * cuv + of_p * cu + of_q * cv);
    table.at(kDuOfD, channel) = Acc<T>(of_p);
    table.at(kDuConstant, channel) = Acc<T>(double(v.bias_of(channel)) - of_p * mean_d);
    table.at(kDxOfU, channel) = Acc<T>(of_p);
    table.at(kDxOfV, channel) = Acc<T>(of_q);
    table.at(kDxOfD, channel) = Acc<T>(of_d);
    table.at(kDxConstant, channel) = Acc<T>(-of_d * mean_d);
    table.at(kGxConstant, channel) = Acc<T>(-of_q * mean_d);
  }
  RDS_FAST_OUTLINED void write(const Strip& strip, const Tile& tile) const {
    const auto coefficient = table.template of<planar>(layout, strip);
    const bool streamed = is_large<T>(layout);
    T* const outputs[] = {du, dx, gx};
    layout.for_rows(strip, tile, [&](int64_t offset, int64_t begin, int64_t end) {
      write_outputs(outputs, offset, begin, end, streamed, [&](auto at, Vec<T>(&values)[3]) {
        const Vec<T> d = at(x + offset, Acc<T>(0)) - coefficient(kMean, at);
        const Vec<T> masked_u =
            masked(mask == Mask::of_y ? Mask::none : mask, at(u + offset, Acc<T>(0)), d, coefficient, y, offset, at);
        const Vec<T> p = masked_u - coefficient(kMeanU, at);
        const Vec<T> q = optional_at(v.x, offset, at) - coefficient(kMeanV, at);
        const Vec<T> of_y = q * coefficient(kScale, at) + d * coefficient(kDuOfD, at) + coefficient(kDuConstant, at) +
                            optional_at(v.residual, offset, at);
        values[0] = masked(mask, of_y, d, coefficient, y, offset, at);
        values[1] = p * coefficient(kDxOfU, at) + q * coefficient(kDxOfV, at) +
                    (d * coefficient(kDxOfD, at) + coefficient(kDxConstant, at));
        // −γ r³ cov(u', d), which d has in gx, is what q has in dx.
        values[2] = p * coefficient(kScale, at) + (d * coefficient(kDxOfV, at) + coefficient(kGxConstant, at));
      });
    });
  }
};

// Eval mode: mean and r are constants, so du and dx need no sum.
template <typename T, bool planar>
struct EvalDoubleBackward {
  enum { kOfUV, kPartials };
  enum { kDuBias = kCommon, kOfVweight, kRows };
  const Layout& layout;
  const Table<T, kRows>& table;
  const Parameters<T> parameters;
  Mask mask;
  Cotangents<T> v;
  const T *u, *x, *y;
  T *du, *dx, *gx;
  Acc<T>* dweight;

  void prepare(const Strip& strip) const {
    for (int64_t c = strip.first_channel; c < strip.first_channel + strip.channels; ++c) {
      table.at(kDuBias, c) = v.bias_of(c);
      table.at(kOfVweight, c) = Acc<T>(v.weight_of(c) * parameters.rstd_of(c));
    }
  }
  RDS_FAST_OUTLINED void reduce(const Strip& strip, const Tile& tile, double* partials) const {
    const auto coefficient = table.template of<planar>(layout, strip);
    const bool streamed = is_large<T>(layout), needs_x = v.weight != nullptr || mask == Mask::of_x;
    Sums<T, kPartials, planar> sums(strip);
    T* const outputs[] = {du, dx, gx};
    layout.for_rows(strip, tile, [&](int64_t offset, int64_t begin, int64_t end) {
      write_outputs(outputs, offset, begin, end, streamed, [&](auto at, Vec<T>(&values)[3]) {
        const Vec<T> d = needs_x ? at(x + offset, Acc<T>(0)) - coefficient(kMean, at) : Vec<T>{};
        const Vec<T> masked_u =
            masked(mask == Mask::of_y ? Mask::none : mask, at(u + offset, Acc<T>(0)), d, coefficient, y, offset, at);
        const Vec<T> of_x = optional_at(v.x, offset, at);
        sums.add(kOfUV, at, 0, masked_u * of_x);
        const Vec<T> of_y = of_x * coefficient(kScale, at) + d * coefficient(kOfVweight, at) +
                            coefficient(kDuBias, at) + optional_at(v.residual, offset, at);
        values[0] = masked(mask, of_y, d, coefficient, y, offset, at);
        values[1] = masked_u * coefficient(kOfVweight, at);
        values[2] = masked_u * coefficient(kScale, at);
      });
    });
    sums.finish(layout, strip, partials);
  }
  static void merge(double* total, const double* partial) { total[kOfUV] += partial[kOfUV]; }
  void finish(int64_t channel, const double* total) const {
    dweight[channel] = Acc<T>(parameters.rstd_of(channel) * total[kOfUV]);
  }
  void write(const Strip&, const Tile&) const {}
};

}  // namespace

void batch_norm_backward(ChannelShape shape, const void* u, const void* other_u, const void* x, const void* y,
                         BatchNorm norm, const void* x_cotangent, void* gx, void* gresidual, void* sums) {
  with_layout(shape, [&](auto example, auto planar, const Layout& layout) {
    using T = decltype(example);
    const Parameters<T> parameters(norm);
    const Table<T, InputGradient<T>::kRows> table(layout.channels);
    table.fill(parameters);
    reduce_channels(layout,
                    Backward<T, planar>{layout, table, parameters, norm.training, mask_of(norm, y), tensor<T>(u),
                                        tensor<T>(other_u), tensor<T>(x), tensor<T>(y), tensor<T>(x_cotangent),
                                        static_cast<T*>(gx), static_cast<T*>(gresidual), static_cast<Acc<T>*>(sums)});
  });
}

void batch_norm_input_gradient(ChannelShape shape, const void* u, const void* x, BatchNorm norm, const void* sums,
                               void* gx) {
  with_layout(shape, [&](auto example, auto planar, const Layout& layout) {
    using T = decltype(example);
    using Gradient = InputGradient<T>;
    const Parameters<T> parameters(norm);
    const Table<T, Gradient::kRows> table(layout.channels);
    const auto* const of = static_cast<const Acc<T>*>(sums);
    table.fill(parameters);
    for (int64_t c = 0; c < layout.channels; ++c) {
      const bool training = norm.training;  // in eval mode the sums take no part
      Gradient{table, parameters, layout.values}.fill(c, training ? of[c] : 0, training ? of[layout.channels + c] : 0,
                                                      0);
    }
    const bool streamed = is_large<T>(layout);
    T* const outputs[] = {static_cast<T*>(gx)};
    for_tiles(layout, [&](const Strip& strip, const Tile& tile, int64_t) {
      const auto coefficient = table.template of<planar>(layout, strip);
      layout.for_rows(strip, tile, [&](int64_t offset, int64_t begin, int64_t end) {
        write_outputs(outputs, offset, begin, end, streamed, [&](auto at, Vec<T>(&values)[1]) {
          const Vec<T> centred = at(tensor<T>(x) + offset, Acc<T>(0)) - coefficient(kMean, at);
          const Vec<T> one_u = at(tensor<T>(u) + offset, Acc<T>(0));
          const Vec<T> masked_u =
              masked(mask_of(norm, nullptr), one_u, centred, coefficient, tensor<T>(nullptr), offset, at);
          values[0] = Gradient::value(coefficient, at, masked_u, centred);
        });
      });
    });
  });
}

void batch_norm_double_backward(ChannelShape shape, BatchNormCotangents v, const void* u, const void* x, const void* y,
                                BatchNorm norm, void* du, void* dx, void* dweight, void* gx) {
  with_layout(shape, [&](auto example, auto planar, const Layout& layout) {
    using T = decltype(example);
    const Parameters<T> parameters(norm);
    const auto run = [&](auto task_type) {
      using Task = typename decltype(task_type)::type;
      const Table<T, Task::kRows> table(layout.channels);
      table.fill(parameters);
      reduce_channels(layout, Task{layout, table, parameters, mask_of(norm, y), Cotangents<T>(v), tensor<T>(u),
                                   tensor<T>(x), tensor<T>(y), static_cast<T*>(du), static_cast<T*>(dx),
                                   static_cast<T*>(gx), static_cast<Acc<T>*>(dweight)});
    };
    if (norm.training) return run(std::common_type<DoubleBackward<T, planar>>());
    run(std::common_type<EvalDoubleBackward<T, planar>>());
  });
}

}  // namespace rds_fast::cpu::RDS_FAST_CAPABILITY
