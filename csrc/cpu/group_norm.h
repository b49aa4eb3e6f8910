// How the rows of a group norm are cut, shared among threads, and met by coefficients and sums of channels.
//
// A row is the D channels of a group in one sample, each a run of S values. Coefficients are constants of a run, or,
// where S is 1, vary from value to value; the row is then taken as a single run. Sums over a channel lie across rows:
// sums of runs are stored for each row and added up afterwards, sums of single values grow in accumulators that a fixed
// number of samples share. Either way the order of summation does not depend on the number of threads.
#pragma once

#include <memory>

#include "rows.h"

namespace rds_fast::cpu::RDS_FAST_CAPABILITY {

struct RowLayout {
  int64_t samples, groups, channels;
  int64_t runs, length;    // a row is runs · length values
  bool per_element;        // whether coefficients vary within a run
  int64_t pieces;          // chunks of a run, where it is longer than one
  int64_t runs_per_chunk;  // where it is not

  RowLayout(const GroupShape& shape, bool affine)
      : samples(shape.samples), groups(shape.groups), channels(shape.channels) {
    const int64_t of_group = shape.channels / shape.groups;
    per_element = affine && shape.spatial == 1;
    runs = affine && !per_element ? of_group : 1;
    length = of_group * shape.spatial / runs;
    pieces = (length + kChunk - 1) / kChunk;
    runs_per_chunk = length < kChunk ? kChunk / length : 1;
  }
  int64_t rows() const { return samples * groups; }
  int64_t columns() const { return runs * length; }
  int64_t chunks() const { return pieces > 1 ? runs * pieces : (runs + runs_per_chunk - 1) / runs_per_chunk; }
  // Accumulators of single values: one for each block of samples. Long rows are cut, and the samples added in turn.
  int64_t samples_per_block() const {
    constexpr int64_t kFewest = 8, kMostBlocks = 128;
    if (chunks() > 1) return samples;
    return samples > kFewest * kMostBlocks ? (samples + kMostBlocks - 1) / kMostBlocks : kFewest;
  }
  int64_t blocks() const { return (samples + samples_per_block() - 1) / samples_per_block(); }

  // visit(run, begin, end) on each part of a run in a chunk, begin and end counted from the row's first value.
  template <typename Visit>
  RDS_FAST_INLINE void for_runs(int64_t chunk, Visit visit) const {
    if (pieces > 1) {
      const int64_t run = chunk / pieces, begin = chunk % pieces * kChunk;
      return visit(run, run * length + begin, run * length + (begin + kChunk < length ? begin + kChunk : length));
    }
    const int64_t first = chunk * runs_per_chunk;
    const int64_t last = first + runs_per_chunk < runs ? first + runs_per_chunk : runs;
    for (int64_t run = first; run < last; ++run) visit(run, run * length, (run + 1) * length);
  }
  // The number of the part of a run that begins at a value, among all parts of the row.
  RDS_FAST_INLINE int64_t part(int64_t run, int64_t begin) const {
    return run * pieces + (begin - run * length) / kChunk;
  }
  RDS_FAST_INLINE int64_t parts() const { return runs * pieces; }
};

// A coefficient of a channel (weight, bias or a cotangent of theirs), which may be absent.
template <typename T, bool kPerElement>
struct Coefficient {
  const Acc<T>* channels;
  Acc<T> otherwise;

  struct OfRun {
    const Acc<T>* values;  // by the value's place in the row
    Acc<T> constant;
    template <typename At>
    RDS_FAST_INLINE Vec<T> operator()(At at) const {
      if constexpr (kPerElement) {
        if (values != nullptr) return at(values, Acc<T>(0));
      }
      return splat<T>(constant);
    }
  };
  RDS_FAST_INLINE OfRun of_run(const RowLayout& layout, int64_t row, int64_t run) const {
    if (channels == nullptr) return {nullptr, otherwise};
    const Acc<T>* const first = channels + row % layout.groups * (kPerElement ? layout.length : layout.runs);
    return {first, kPerElement ? otherwise : first[run]};
  }
};

template <typename T>
RDS_FAST_INLINE void add_to(Acc<T>* sums, Whole at, Vec<T> values) {
  store(sums + at.i, load(sums + at.i) + values);
}
template <typename T>
RDS_FAST_INLINE void add_to(Acc<T>* sums, Part at, Vec<T> values) {
  store_part(sums + at.i, at(sums, Acc<T>(0)) + values, at.count);
}

// For every row: total = reduce(row, chunk) added up over its chunks, then finish(row, total), then write(row, chunk,
// total, block) on its chunks. across_rows: whether write adds to the accumulators of its block.
template <typename Partial, typename Reduce, typename Finish, typename Write>
void for_rows(const RowLayout& layout, bool across_rows, const Reduce& reduce, const Finish& finish,
              const Write& write) {
  const int64_t chunks = layout.chunks();
  const auto whole_row = [&](int64_t row, int64_t block) {
    Partial total = reduce(row, int64_t(0));
    for (int64_t chunk = 1; chunk < chunks; ++chunk) total += reduce(row, chunk);
    finish(row, total);
    // Backwards: what was read last is still in the cache.
    for (int64_t chunk = chunks - 1; chunk >= 0; --chunk) write(row, chunk, total, block);
  };
  if (across_rows && chunks == 1) {
    const int64_t rows = layout.samples_per_block() * layout.groups;
    return parallel(layout.blocks(), row_grain(rows * layout.columns()), [&](int64_t first, int64_t last) {
      const int64_t end = last * rows < layout.rows() ? last * rows : layout.rows();
      for (int64_t row = first * rows; row < end; ++row) whole_row(row, row / rows);
      finish_streams();
    });
  }
  if (!across_rows && (chunks == 1 || layout.rows() >= 4 * thread_count())) {
    return parallel(layout.rows(), row_grain(layout.columns()), [&](int64_t first, int64_t last) {
      for (int64_t row = first; row < last; ++row) whole_row(row, 0);
      finish_streams();
    });
  }
  const std::unique_ptr<Partial[]> partials(new Partial[layout.rows() * chunks]);
  parallel(layout.rows() * chunks, 1, [&](int64_t first, int64_t last) {
    for (int64_t unit = first; unit < last; ++unit) partials[unit] = reduce(unit / chunks, unit % chunks);
  });
  for (int64_t row = 0; row < layout.rows(); ++row) {
    Partial& total = partials[row * chunks];
    for (int64_t chunk = 1; chunk < chunks; ++chunk) total += partials[row * chunks + chunk];
    finish(row, total);
  }
  // A chunk of all samples in turn: its accumulators are no other thread's.
  parallel(layout.groups * chunks, 1, [&](int64_t first, int64_t last) {
    for (int64_t unit = first; unit < last; ++unit) {
      for (int64_t sample = 0; sample < layout.samples; ++sample) {
        const int64_t row = sample * layout.groups + unit / chunks;
        write(row, unit % chunks, partials[row * chunks], 0);
      }
    }
    finish_streams();
  });
}

// Where sums over channels are collected: one value for each channel's part in each of `count` blocks or samples.
template <typename A>
struct ChannelSums {
  int64_t count, channels, pieces;
  std::unique_ptr<A[]> values;

  ChannelSums(const RowLayout& layout, bool wanted)
      : count(layout.per_element ? layout.blocks() : layout.samples),
        channels(layout.channels),
        pieces(layout.per_element ? 1 : layout.pieces),
        values(wanted ? new A[count * channels * pieces]() : nullptr) {}

  // The accumulators of a row's values, by their place in the row.
  RDS_FAST_INLINE A* of_elements(const RowLayout& layout, int64_t row, int64_t block) const {
    return values.get() + block * channels + row % layout.groups * layout.length;
  }
  RDS_FAST_INLINE A* of_parts(const RowLayout& layout, int64_t row) const {
    return values.get() + row * layout.parts();
  }
  void add_up(void* result) const {
    constexpr int64_t kTile = 64;
    parallel((channels + kTile - 1) / kTile, row_grain(count * pieces * kTile), [&](int64_t first, int64_t last) {
      for (int64_t tile = first; tile < last; ++tile) {
        const int64_t begin = tile * kTile, width = begin + kTile < channels ? kTile : channels - begin;
        double totals[kTile] = {};
        for (int64_t i = 0; i < count; ++i) {
          const A* const from = values.get() + (i * channels + begin) * pieces;
          for (int64_t j = 0; j < width * pieces; ++j) totals[j / pieces] += from[j];
        }
        for (int64_t j = 0; j < width; ++j) static_cast<A*>(result)[begin + j] = A(totals[j]);
      }
    });
  }
};

}  // namespace rds_fast::cpu::RDS_FAST_CAPABILITY
