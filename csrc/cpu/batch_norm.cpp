// Batch norm, its backward and its double backward: each one pass that sums and one that writes.
//
// With d = x − mean, r = (var + ε)^−½, x̂ = r d, z = γ r d + β + residual, y = z or, with a ReLU, max(z, 0); u the
// cotangent of y and u' = u where z > 0, else 0 (u' = u without a ReLU); v, a, b and c the cotangents of gx, gγ, gβ
// and gresidual; ū = mean(u'), v̄ = mean(v), and c_st = mean(s t) − mean(s) mean(t) of a channel:
//
//     backward           gx = γ r (u' − ū) − γ r³ c_ud d
//     double backward    p = u' − ū, q = v − v̄, cᵤ = r c_ud, cᵥ = r c_vd, cᵤᵥ = c_uv − cᵤ cᵥ:
//                        du = [z > 0] (γ r q + (a − γ cᵥ) r d + b + c),   dγ = r M cᵤᵥ,
//                        dx = (a r − γ r² cᵥ) p − γ r² cᵤ q − (γ r² (cᵤᵥ − 2 cᵤ cᵥ) + a r cᵤ) r d ... (see finish)
//     eval mode          gx = γ r u';   du = [z > 0] (γ r v + a r d + b + c),   dγ = r Σ u' v,   dx = a r u': one pass
//
// Where a residual was added, z is not recomputed: z > 0 where y > 0.
#include <cmath>

#include "channels.h"

namespace rds_fast::cpu::RDS_FAST_CAPABILITY {
namespace {

// Rows of the table of coefficients that every kernel has: the same arithmetic gives z, hence the same mask, anywhere.
enum Coefficient { kMean, kScale, kBias, kCommon };

template <typename T>
struct Parameters {
  const Acc<T>*weight, *bias, *mean, *var;
  double eps;
  explicit Parameters(const BatchNorm& norm)
      : weight(static_cast<const Acc<T>*>(norm.weight)),
        bias(static_cast<const Acc<T>*>(norm.bias)),
        mean(static_cast<const Acc<T>*>(norm.mean)),
        var(static_cast<const Acc<T>*>(norm.var)),
        eps(norm.eps) {}
  double weight_of(int64_t channel) const { return weight == nullptr ? 1.0 : double(weight[channel]); }
  double rstd_of(int64_t channel) const { return 1.0 / std::sqrt(double(var[channel]) + eps); }
};

// (rows, C) coefficients, the first three filled from the parameters.
template <typename T, int kRows>
struct Table {
  int64_t channels;
  Acc<T>* data;
  explicit Table(int64_t channels) : channels(channels), data(new Acc<T>[kRows * channels]) {}
  ~Table() { delete[] data; }
  Table(const Table&) = delete;
  Acc<T>& at(int row, int64_t channel) const { return data[row * channels + channel]; }
  void fill(const Parameters<T>& parameters, int64_t channel) const {
    at(kMean, channel) = parameters.mean[channel];
    at(kScale, channel) = Acc<T>(parameters.weight_of(channel) * parameters.rstd_of(channel));
    at(kBias, channel) = parameters.bias == nullptr ? Acc<T>(0) : parameters.bias[channel];
  }
  void fill(const Parameters<T>& parameters) const {
    for (int64_t channel = 0; channel < channels; ++channel) fill(parameters, channel);
  }
  // The first kCount rows, for the channels of a strip.
  template <bool planar, int kCount = kRows>
  Coefficients<T, kCount, planar> of(const Layout& layout, const Strip& strip) const {
    return {layout, strip, data + strip.first_channel, channels};
  }
};

template <typename T>
RDS_FAST_INLINE const T* tensor(const void* data) {
  return static_cast<const T*>(data);
}

template <typename T>
bool is_large(const Layout& layout) {
  return layout.channels * layout.values * int64_t(sizeof(T)) >= kStreamedBytes;
}

enum class Mask { none, of_x, of_y };

Mask mask_of(const BatchNorm& norm, const void* y) {
  return !norm.relu ? Mask::none : y == nullptr ? Mask::of_x : Mask::of_y;
}

// values where z > 0, else 0.
template <typename T, typename Table, typename At>
RDS_FAST_INLINE Vec<T> masked(Mask mask, Vec<T> values, Vec<T> centred, const Table& coefficient, const T* y,
                              int64_t offset, At at) {
  if (mask == Mask::none) return values;
  const Vec<T> z =
      mask == Mask::of_y ? at(y + offset, Acc<T>(0)) : centred * coefficient(kScale, at) + coefficient(kBias, at);
  return z > Vec<T>{} ? values : Vec<T>{};
}

// ---- Forward
// ---------------------------------------------------------------------------------------------------------

template <typename T, bool planar>
struct Normalise {
  const Layout& layout;
  const Table<T, kCommon>& table;
  const T* x;
  const T* residual;
  T* y;
  bool relu;

  void operator()(const Strip& strip, const Tile& tile) const {
    const auto coefficient = table.template of<planar>(layout, strip);
    const bool streamed = is_large<T>(layout);
    T* const outputs[] = {y};
    layout.for_rows(strip, tile, [&](int64_t offset, int64_t begin, int64_t end) {
      write_outputs(outputs, offset, begin, end, streamed, [&](auto at, Vec<T>(&values)[1]) {
        const Vec<T> centred = at(x + offset, Acc<T>(0)) - coefficient(kMean, at);
        Vec<T> z = centred * coefficient(kScale, at) + coefficient(kBias, at);
        if (residual != nullptr) z += at(residual + offset, Acc<T>(0));
        values[0] = relu ? (z < Vec<T>{} ? Vec<T>{} : z) : z;
      });
    });
  }
};

// Mean and variance: in a tile the values are summed, then their deviations from the tile's mean, while the tile is in
// the first caches; tiles are merged by Chan's formula.
template <typename T, bool planar>
struct Train {
  enum { kCount, kTileMean, kSquares, kPartials };
  const Layout& layout;
  Normalise<T, planar> normalise;
  const Parameters<T> parameters;
  RunningStatistics running;
  Acc<T>*mean, *var;

  void prepare(const Strip&) const {}
  void reduce(const Strip& strip, const Tile& tile, double* partials) const {
    double* const means = partials + kTileMean * strip.channels;
    double* const squares = partials + kSquares * strip.channels;
    sum(strip, tile, means);
    const double count = double(layout.values_of_channel(strip, tile));
    Acc<T> rounded[planar ? 1 : kStripColumns] = {};
    for (int64_t c = 0; c < strip.channels; ++c) rounded[c] = Acc<T>(means[c] / count);
    double deviations[planar ? 2 : 2 * kStripColumns];
    sum_deviations(strip, tile, rounded, deviations);
    for (int64_t c = 0; c < strip.channels; ++c) {
      const double deviation = deviations[c], square = deviations[strip.channels + c] - deviation * deviation / count;
      partials[kCount * strip.channels + c] = count;
      means[c] = double(rounded[c]) + deviation / count;
      squares[c] = square < 0 ? 0 : square;  // NaN stays
    }
  }
  static void merge(double* total, const double* partial) {
    const double count = total[kCount] + partial[kCount], shift = partial[kTileMean] - total[kTileMean];
    total[kTileMean] += shift * (partial[kCount] / count);
    total[kSquares] += partial[kSquares] + shift * shift * (total[kCount] * partial[kCount] / count);
    total[kCount] = count;
  }
  void finish(int64_t channel, const double* total) const {
    const double variance = total[kSquares] / total[kCount];
    mean[channel] = Acc<T>(total[kTileMean]);
    var[channel] = Acc<T>(variance);
    normalise.table.fill(parameters, channel);
    // One value has no unbiased variance; its biased one is 0.
    const double unbiased = total[kCount] > 1 ? total[kSquares] / (total[kCount] - 1) : variance;
    update(running.mean, channel, total[kTileMean]);
    update(running.var, channel, unbiased);
  }
  void write(const Strip& strip, const Tile& tile) const { normalise(strip, tile); }

 private:
  void sum(const Strip& strip, const Tile& tile, double* sums) const {
    Sums<T, 1, planar> total(strip);
    layout.for_rows(strip, tile, [&](int64_t offset, int64_t begin, int64_t end) {
      for_vectors<T>(begin, end, [&](auto at, int k) { total.add(0, at, k, at(normalise.x + offset, Acc<T>(0))); });
    });
    total.finish(layout, strip, sums);
  }
  void sum_deviations(const Strip& strip, const Tile& tile, const Acc<T>* means, double* sums) const {
    const Coefficients<T, 1, planar> mean_of(layout, strip, means, 0);
    Sums<T, 2, planar> total(strip);
    layout.for_rows(strip, tile, [&](int64_t offset, int64_t begin, int64_t end) {
      for_vectors<T>(begin, end, [&](auto at, int k) {
        const Vec<T> deviation = inside(at, at(normalise.x + offset, Acc<T>(0)) - mean_of(0, at));
        total.add(0, at, k, deviation);
        total.add(1, at, k, deviation * deviation);
      });
    });
    total.finish(layout, strip, sums);
  }
  void update(void* statistics, int64_t channel, double value) const {
    if (statistics == nullptr) return;
    Acc<T>& average = static_cast<Acc<T>*>(statistics)[channel];
    average = Acc<T>((1 - running.momentum) * double(average) + running.momentum * value);
  }
};

// ---- Backward
// --------------------------------------------------------------------------------------------------------

template <typename T, bool planar>
struct Backward {
  enum { kOfU, kOfUD, kOfD, kPartials };
  enum { kMeanU = kCommon, kOfCentred, kRows };
  const Layout& layout;
  const Table<T, kRows>& table;
  const Parameters<T> parameters;
  bool training;
  Mask mask;
  const T *u, *x, *y, *x_cotangent;
  T *gx, *gresidual;
  Acc<T>*gweight, *gbias;

  void prepare(const Strip&) const {}
  void reduce(const Strip& strip, const Tile& tile, double* partials) const {
    const auto coefficient = table.template of<planar, kCommon>(layout, strip);
    Sums<T, kPartials, planar> sums(strip);
    if (!training) {
      write_rows(strip, tile, coefficient, [&](auto at, Vec<T> masked_u, Vec<T> centred) {
        add(sums, at, 0, masked_u, centred);
        return masked_u * coefficient(kScale, at);
      });
    } else {
      layout.for_rows(strip, tile, [&](int64_t offset, int64_t begin, int64_t end) {
        for_vectors<T>(begin, end, [&](auto at, int k) {
          const Vec<T> centred = at(x + offset, Acc<T>(0)) - coefficient(kMean, at);
          add(sums, at, k, masked(mask, at(u + offset, Acc<T>(0)), centred, coefficient, y, offset, at), centred);
        });
      });
    }
    sums.finish(layout, strip, partials);
  }
  static void merge(double* total, const double* partial) {
    for (int k = 0; k < kPartials; ++k) total[k] += partial[k];
  }
  void finish(int64_t channel, const double* total) const {
    const double r = parameters.rstd_of(channel), count = double(layout.values);
    // The mean is rounded: Σ d is not quite 0. Without this, Σ u' d would be wrong by the rounding times Σ u'.
    const double product = training ? total[kOfUD] - total[kOfU] * total[kOfD] / count : total[kOfUD];
    gbias[channel] = Acc<T>(total[kOfU]);
    gweight[channel] = Acc<T>(r * product);
    table.at(kMeanU, channel) = Acc<T>(total[kOfU] / count);
    table.at(kOfCentred, channel) = Acc<T>(-parameters.weight_of(channel) * r * r * r * product / count);
  }
  void write(const Strip& strip, const Tile& tile) const {
    if (!training) return;
    const auto coefficient = table.template of<planar>(layout, strip);
    write_rows(strip, tile, coefficient, [&](auto at, Vec<T> masked_u, Vec<T> centred) {
      return (masked_u - coefficient(kMeanU, at)) * coefficient(kScale, at) + centred * coefficient(kOfCentred, at);
    });
  }

 private:
  template <typename Total, typename At>
  RDS_FAST_INLINE void add(Total& sums, At at, int k, Vec<T> masked_u, Vec<T> centred) const {
    sums.add(kOfU, at, k, masked_u);
    sums.add(kOfUD, at, k, inside(at, masked_u * centred));
    sums.add(kOfD, at, k, inside(at, centred));
  }
  // gx = value(at, u', d) + x_cotangent, and gresidual = u'.
  template <typename Table, typename Value>
  RDS_FAST_INLINE void write_rows(const Strip& strip, const Tile& tile, const Table& coefficient,
                                  const Value& value) const {
    const bool streamed = is_large<T>(layout);
    T* const outputs[] = {gx, gresidual};
    layout.for_rows(strip, tile, [&](int64_t offset, int64_t begin, int64_t end) {
      write_outputs(outputs, offset, begin, end, streamed, [&](auto at, Vec<T>(&values)[2]) {
        const Vec<T> centred = at(x + offset, Acc<T>(0)) - coefficient(kMean, at);
        values[1] = masked(mask, at(u + offset, Acc<T>(0)), centred, coefficient, y, offset, at);
        values[0] = value(at, values[1], centred) + optional_at(x_cotangent, offset, at);
      });
    });
  }
};

// ---- Double backward
// -------------------------------------------------------------------------------------------------

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
  enum { kMeanU = kShiftU, kMeanV = kShiftV, kDuBias, kDuOfD, kDxOfU, kDxOfV, kDxOfD, kRows };
  const Layout& layout;
  const Table<T, kRows>& table;
  const Parameters<T> parameters;
  Mask mask;
  Cotangents<T> v;
  const T *u, *x, *y;
  T *du, *dx;
  Acc<T>* dweight;

  // The shift of a channel is the mean of its first few values.
  void prepare(const Strip& strip) const {
    Tile first = layout.tile(strip, 0);
    first.last_row = least(first.last_row, planar ? 1 : 4);
    first.end = least(first.end, planar ? 64 : kStripColumns);
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
  void reduce(const Strip& strip, const Tile& tile, double* partials) const {
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
    table.at(kDuBias, channel) = v.bias_of(channel);
    table.at(kDuOfD, channel) = Acc<T>(r * (a - gamma * r * cv));
    // P(u') = p − cᵤ r d and P(v) = q − cᵥ r d, put into dx = −γ r² (cᵤᵥ r d + cᵥ P(u') + cᵤ P(v)) + a r P(u').
    const double of_p = r * (a - gamma * r * cv), of_q = -gamma * r * r * cu;
    table.at(kDxOfU, channel) = Acc<T>(of_p);
    table.at(kDxOfV, channel) = Acc<T>(of_q);
    table.at(kDxOfD, channel) = Acc<T>(-r * (gamma * r * r * cuv + of_p * cu + of_q * cv));
  }
  void write(const Strip& strip, const Tile& tile) const {
    const auto coefficient = table.template of<planar>(layout, strip);
    const bool streamed = is_large<T>(layout);
    T* const outputs[] = {du, dx};
    layout.for_rows(strip, tile, [&](int64_t offset, int64_t begin, int64_t end) {
      write_outputs(outputs, offset, begin, end, streamed, [&](auto at, Vec<T>(&values)[2]) {
        const Vec<T> d = at(x + offset, Acc<T>(0)) - coefficient(kMean, at);
        const Vec<T> masked_u =
            masked(mask == Mask::of_y ? Mask::none : mask, at(u + offset, Acc<T>(0)), d, coefficient, y, offset, at);
        const Vec<T> p = masked_u - coefficient(kMeanU, at);
        const Vec<T> q = optional_at(v.x, offset, at) - coefficient(kMeanV, at);
        const Vec<T> of_y = q * coefficient(kScale, at) + d * coefficient(kDuOfD, at) + coefficient(kDuBias, at) +
                            optional_at(v.residual, offset, at);
        values[0] = masked(mask, of_y, d, coefficient, y, offset, at);
        values[1] = p * coefficient(kDxOfU, at) + q * coefficient(kDxOfV, at) + d * coefficient(kDxOfD, at);
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
  T *du, *dx;
  Acc<T>* dweight;

  void prepare(const Strip& strip) const {
    for (int64_t c = strip.first_channel; c < strip.first_channel + strip.channels; ++c) {
      table.at(kDuBias, c) = v.bias_of(c);
      table.at(kOfVweight, c) = Acc<T>(v.weight_of(c) * parameters.rstd_of(c));
    }
  }
  void reduce(const Strip& strip, const Tile& tile, double* partials) const {
    const auto coefficient = table.template of<planar>(layout, strip);
    const bool streamed = is_large<T>(layout), needs_x = v.weight != nullptr || mask == Mask::of_x;
    Sums<T, kPartials, planar> sums(strip);
    T* const outputs[] = {du, dx};
    layout.for_rows(strip, tile, [&](int64_t offset, int64_t begin, int64_t end) {
      write_outputs(outputs, offset, begin, end, streamed, [&](auto at, Vec<T>(&values)[2]) {
        const Vec<T> d = needs_x ? at(x + offset, Acc<T>(0)) - coefficient(kMean, at) : Vec<T>{};
        const Vec<T> masked_u =
            masked(mask == Mask::of_y ? Mask::none : mask, at(u + offset, Acc<T>(0)), d, coefficient, y, offset, at);
        const Vec<T> of_x = optional_at(v.x, offset, at);
        sums.add(kOfUV, at, 0, masked_u * of_x);
        const Vec<T> of_y = of_x * coefficient(kScale, at) + d * coefficient(kOfVweight, at) +
                            coefficient(kDuBias, at) + optional_at(v.residual, offset, at);
        values[0] = masked(mask, of_y, d, coefficient, y, offset, at);
        values[1] = masked_u * coefficient(kOfVweight, at);
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

// call(T(), planar as a constant, layout)
template <typename Call>
RDS_FAST_INLINE void with_layout(const ChannelShape& shape, const Call& call) {
  if (shape.samples * shape.channels * shape.positions == 0) return;
  const Layout layout(shape);
  with_dtype(shape.dtype, [&](auto example) {
    if (layout.planar) return call(example, std::true_type(), layout);
    call(example, std::false_type(), layout);
  });
}

}  // namespace

void batch_norm(ChannelShape shape, const void* x, BatchNorm norm, const void* residual, RunningStatistics running,
                void* y, void* mean, void* var) {
  with_layout(shape, [&](auto example, auto planar, const Layout& layout) {
    using T = decltype(example);
    const Table<T, kCommon> table(layout.channels);
    const Normalise<T, planar> normalise{layout,   table, tensor<T>(x), tensor<T>(residual), static_cast<T*>(y),
                                         norm.relu};
    reduce_channels(layout, Train<T, planar>{layout, normalise, Parameters<T>(norm), running,
                                             static_cast<Acc<T>*>(mean), static_cast<Acc<T>*>(var)});
  });
}

void batch_norm_inference(ChannelShape shape, const void* x, BatchNorm norm, const void* residual, void* y) {
  with_layout(shape, [&](auto example, auto planar, const Layout& layout) {
    using T = decltype(example);
    const Table<T, kCommon> table(layout.channels);
    table.fill(Parameters<T>(norm));
    const Normalise<T, planar> normalise{layout,   table, tensor<T>(x), tensor<T>(residual), static_cast<T*>(y),
                                         norm.relu};
    for_tiles(layout, [&](const Strip& strip, const Tile& tile, int64_t) { normalise(strip, tile); });
  });
}

void batch_norm_backward(ChannelShape shape, const void* u, const void* x, const void* y, BatchNorm norm,
                         const void* x_cotangent, void* gx, void* gweight, void* gbias, void* gresidual) {
  with_layout(shape, [&](auto example, auto planar, const Layout& layout) {
    using T = decltype(example);
    using Task = Backward<T, planar>;
    const Parameters<T> parameters(norm);
    const Table<T, Task::kRows> table(layout.channels);
    table.fill(parameters);
    reduce_channels(layout, Task{layout, table, parameters, norm.training, mask_of(norm, y), tensor<T>(u), tensor<T>(x),
                                 tensor<T>(y), tensor<T>(x_cotangent), static_cast<T*>(gx), static_cast<T*>(gresidual),
                                 static_cast<Acc<T>*>(gweight), static_cast<Acc<T>*>(gbias)});
  });
}

void batch_norm_double_backward(ChannelShape shape, BatchNormCotangents v, const void* u, const void* x, const void* y,
                                BatchNorm norm, void* du, void* dx, void* dweight) {
  with_layout(shape, [&](auto example, auto planar, const Layout& layout) {
    using T = decltype(example);
    const Parameters<T> parameters(norm);
    const auto run = [&](auto task_type) {
      using Task = typename decltype(task_type)::type;
      const Table<T, Task::kRows> table(layout.channels);
      table.fill(parameters);
      reduce_channels(layout,
                      Task{layout, table, parameters, mask_of(norm, y), Cotangents<T>(v), tensor<T>(u), tensor<T>(x),
                           tensor<T>(y), static_cast<T*>(du), static_cast<T*>(dx), static_cast<Acc<T>*>(dweight)});
    };
    if (norm.training) return run(std::common_type<DoubleBackward<T, planar>>());
    run(std::common_type<EvalDoubleBackward<T, planar>>());
  });
}

}  // namespace rds_fast::cpu::RDS_FAST_CAPABILITY
