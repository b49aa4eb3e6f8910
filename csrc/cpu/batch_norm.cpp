// Batch norm: a pass for mean and variance, and one that normalises, with the sum and the ReLU after it.
#include "batch_norm.h"

namespace rds_fast::cpu::RDS_FAST_CAPABILITY {
namespace {

template <typename T, bool planar>
struct Normalise {
  const Layout& layout;
  const Table<T, kCommon>& table;
  const T* x;
  const T* residual;
  T* y;
  bool relu;

  RDS_FAST_OUTLINED void operator()(const Strip& strip, const Tile& tile) const {
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

// Mean and variance: in a tile, of the n deviations d from the mean of the tile's first m values, which is at most
// sqrt(Σ (x − mean)² / m) from its mean: so Σ d² is at most 1 + n/m, or 65, times what is left when (Σ d)² / n is taken
// off, however the values lie. Tiles are merged by Chan's formula.
template <typename T, bool planar>
struct Train {
  enum { kCount, kTileMean, kSquares, kPartials };
  const Layout& layout;
  Normalise<T, planar> normalise;
  const Parameters<T> parameters;
  RunningStatistics running;
  Acc<T>*mean, *var;

  void prepare(const Strip&) const {}
  RDS_FAST_OUTLINED void reduce(const Strip& strip, const Tile& tile, double* partials) const {
    double* const means = partials + kTileMean * strip.channels;
    double* const squares = partials + kSquares * strip.channels;
    const Tile first = layout.sample(tile);
    sum(strip, first, means);
    const double count = double(layout.values_of_channel(strip, tile));
    const double first_count = double(layout.values_of_channel(strip, first));
    Acc<T> shifts[planar ? 1 : kStripColumns] = {};
    for (int64_t c = 0; c < strip.channels; ++c) shifts[c] = Acc<T>(means[c] / first_count);
    double deviations[planar ? 2 : 2 * kStripColumns];
    sum_deviations(strip, tile, shifts, deviations);
    for (int64_t c = 0; c < strip.channels; ++c) {
      const double deviation = deviations[c], square = deviations[strip.channels + c] - deviation * deviation / count;
      partials[kCount * strip.channels + c] = count;
      means[c] = double(shifts[c]) + deviation / count;
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
  void sum_deviations(const Strip& strip, const Tile& tile, const Acc<T>* shifts, double* sums) const {
    const Coefficients<T, 1, planar> shift(layout, strip, shifts, 0);
    Sums<T, 2, planar> total(strip);
    layout.for_rows(strip, tile, [&](int64_t offset, int64_t begin, int64_t end) {
      for_vectors<T>(begin, end, [&](auto at, int k) {
        const Vec<T> deviation = inside(at, at(normalise.x + offset, Acc<T>(0)) - shift(0, at));
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

}  // namespace rds_fast::cpu::RDS_FAST_CAPABILITY
