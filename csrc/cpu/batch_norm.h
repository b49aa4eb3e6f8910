// What the forward and the backwards of batch norm share: coefficients of the channels, and the mask of a ReLU.
//
// With d = x − mean, r = (var + ε)^−½, x̂ = r d:
//
//     z = γ r d + β + residual,   y = z or, with a ReLU, max(z, 0)
#pragma once

#include <cmath>

#include "channel_vectors.h"

namespace rds_fast::cpu::RDS_FAST_CAPABILITY {

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

inline Mask mask_of(const BatchNorm& norm, const void* y) {
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

}  // namespace rds_fast::cpu::RDS_FAST_CAPABILITY
