// Coefficients and sums of channels, as the vectors of a strip meet them, and how results are written.
//
// In a plane every lane of a vector belongs to one channel, so coefficients and sums are registers; where a vector
// spans channels, there is one of each for every column, short enough for the first cache.
#pragma once

#include <type_traits>

#include "channels.h"

namespace rds_fast::cpu::RDS_FAST_CAPABILITY {

// kCount values of each channel from a table, (kCount, stride), that begins at the strip's first channel.
template <typename T, int kCount>
struct PlaneCoefficients {
  Acc<T> values[kCount];
  PlaneCoefficients(const Layout&, const Strip&, const Acc<T>* table, int64_t stride) {
    for (int k = 0; k < kCount; ++k) values[k] = table[k * stride];
  }
  template <typename At>
  RDS_FAST_INLINE Vec<T> operator()(int k, At) const {
    return splat<T>(values[k]);
  }
};

template <typename T, int kCount>
struct ColumnCoefficients {
  alignas(64) Acc<T> values[kCount][kStripColumns];
  ColumnCoefficients(const Layout& layout, const Strip& strip, const Acc<T>* table, int64_t stride) {
    for (int k = 0; k < kCount; ++k) {
      const Acc<T>* const of_channels = table + k * stride;
      if (layout.run == 1) {
        for (int64_t i = 0; i < strip.columns; i += strip.channels) {
          std::memcpy(values[k] + i, of_channels, strip.channels * sizeof(Acc<T>));
        }
        continue;
      }
      layout.for_runs(strip, [&](int64_t column, int64_t channel) {
        for (int64_t i = 0; i < layout.run; ++i) values[k][column + i] = of_channels[channel];
      });
    }
  }
  template <typename At>
  RDS_FAST_INLINE Vec<T> operator()(int k, At at) const {
    return at(values[k], Acc<T>(0));
  }
};

template <typename T, int kCount, bool planar>
using Coefficients = std::conditional_t<planar, PlaneCoefficients<T, kCount>, ColumnCoefficients<T, kCount>>;

// add(s, at, k, terms): terms of sum s; those beyond the end must be 0; k as for_vectors gives it.
// finish(layout, strip, sums): sums[s · channels + c] of the strip's channels.
template <typename T, int kSums>
struct PlaneSums {
  Vec<T> partial[kSums][2] = {};
  PlaneSums(const Strip&) {}
  template <typename At>
  RDS_FAST_INLINE void add(int s, At, int k, Vec<T> terms) {
    partial[s][k & 1] += terms;
  }
  void finish(const Layout&, const Strip&, double* sums) const {
    for (int s = 0; s < kSums; ++s) sums[s] = sum_of_lanes<T>(partial[s][0] + partial[s][1]);
  }
};

template <typename T, int kSums>
struct ColumnSums {
  alignas(64) Acc<T> partial[kSums][kStripColumns + kLanes<T>];
  ColumnSums(const Strip& strip) {
    for (auto& sum : partial) std::memset(sum, 0, (strip.columns + kLanes<T>)*sizeof(Acc<T>));
  }
  template <typename At>
  RDS_FAST_INLINE void add(int s, At at, int, Vec<T> terms) {
    store(partial[s] + at.i, load(partial[s] + at.i) + terms);
  }
  void finish(const Layout& layout, const Strip& strip, double* sums) const {
    for (int s = 0; s < kSums; ++s) {
      double* const of_channels = sums + s * strip.channels;
      std::memset(of_channels, 0, strip.channels * sizeof(double));
      if (layout.run == 1) {
        for (int64_t first = 0; first < strip.columns; first += strip.channels) {
          for (int64_t channel = 0; channel < strip.channels; ++channel)
            of_channels[channel] += partial[s][first + channel];
        }
        continue;
      }
      layout.for_runs(strip, [&](int64_t column, int64_t channel) {
        Acc<T> sum = 0;
        for (int64_t i = 0; i < layout.run; ++i) sum += partial[s][column + i];
        of_channels[channel] = sum;
      });
    }
  }
};

template <typename T, int kSums, bool planar>
using Sums = std::conditional_t<planar, PlaneSums<T, kSums>, ColumnSums<T, kSums>>;

// 0 beyond the end.
template <typename V>
RDS_FAST_INLINE V inside(Whole, V terms) {
  return terms;
}
template <typename V>
RDS_FAST_INLINE V inside(Part at, V terms) {
  V lane;
  for (size_t i = 0; i < sizeof(V) / sizeof(lane[0]); ++i) lane[i] = i;
  return lane < decltype(lane[0] + 0)(at.count) ? terms : V{};
}

// values of 0 for an absent (null) tensor
template <typename T, typename At>
RDS_FAST_INLINE Vec<T> optional_at(const T* data, int64_t offset, At at) {
  return data == nullptr ? Vec<T>{} : at(data + offset, Acc<T>(0));
}

// compute(at, values) gives kOutputs vectors for each vector of [begin, end); null outputs are left out. Streamed where
// all outputs reach a boundary of vectors together.
template <typename T, int kOutputs, typename Compute>
RDS_FAST_INLINE void write_outputs(T* const (&outputs)[kOutputs], int64_t offset, int64_t begin, int64_t end,
                                   bool streamed, const Compute& compute) {
  constexpr int64_t L = kLanes<T>;
  const auto misaligned = [&](const T* to) { return int64_t(reinterpret_cast<uintptr_t>(to) / sizeof(T) % L); };
  const auto write = [&](auto at, const auto& put) {
    Vec<T> values[kOutputs];
    compute(at, values);
    for (int k = 0; k < kOutputs; ++k) {
      if (outputs[k] != nullptr) put(outputs[k] + offset + at.i, values[k]);
    }
  };
  int64_t i = begin;
  const int64_t first = misaligned(outputs[0] + offset + i);
  for (const T* output : outputs) streamed &= output == nullptr || misaligned(output + offset + i) == first;
  if (streamed) {
    const int64_t head = least((L - first) % L, end - i);
    if (head > 0) write(Part{i, head}, [&](T* to, Vec<T> values) { store_part(to, values, head); });
    i += head;
    for (; i + L <= end; i += L) write(Whole{i}, [](T* to, Vec<T> values) { stream(to, values); });
  }
  for (; i + L <= end; i += L) write(Whole{i}, [](T* to, Vec<T> values) { store(to, values); });
  if (i < end) write(Part{i, end - i}, [&](T* to, Vec<T> values) { store_part(to, values, end - i); });
}

}  // namespace rds_fast::cpu::RDS_FAST_CAPABILITY
