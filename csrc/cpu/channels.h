// How the values of a channel lie in memory, and how channels are shared among threads.
//
// A tensor is seen as rows of columns, cut into strips of columns that hold whole channels:
//
//     planes      [N][C][S] with long S: a row is a sample, a strip is one channel, its columns are a plane
//     columns     short S: a row is a sample, a strip is some channels side by side, each of S columns
//                 S = 1, few channels (channels-last): the same, where several samples make one row
//
// Strips are cut into tiles of a fixed size. A sum of a tile is taken in the accumulation dtype, the sums of tiles are
// merged in float64, in order, whether one thread has the strip or several: the result does not depend on their number.
#pragma once

#include "rows.h"

namespace rds_fast::cpu::RDS_FAST_CAPABILITY {

constexpr int64_t kPlane = 128;                        // the shortest S treated as a plane
constexpr int64_t kPlaneValues = 512 * kLanes<float>;  // of a tile: few of them, so that each lane rounds little
constexpr int64_t kStripColumns = 512;                 // the most columns of a strip, if they are not a plane
constexpr int64_t kTileRows = 64;                      // then

// What a task does with a tile is compiled once, not into every loop over tiles.
#define RDS_FAST_OUTLINED __attribute__((noinline))

struct Strip {
  int64_t first_channel;
  int64_t channels;
  int64_t column;
  int64_t columns;
};

// Rows, and columns counted from the strip's first.
struct Tile {
  int64_t first_row;
  int64_t last_row;
  int64_t begin;
  int64_t end;
};

RDS_FAST_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
RDS_FAST_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

struct Layout {
  int64_t channels;
  int64_t values;  // M, of a channel
  bool planar;
  int64_t run;  // adjacent columns of one channel
  int64_t rows;
  int64_t columns;
  int64_t last_columns;  // of the last row
  int64_t strip_channels;
  int64_t tile_rows;
  int64_t tile_columns;

  explicit Layout(const ChannelShape& shape)
      : channels(shape.channels),
        values(shape.samples * shape.positions),
        planar(shape.positions >= kPlane),
        run(shape.positions),
        rows(shape.samples),
        columns(shape.channels * shape.positions),
        last_columns(columns),
        strip_channels(1),
        tile_rows(kTileRows),
        tile_columns(kStripColumns) {
    if (planar) {
      tile_columns = least(run, kPlaneValues);
      tile_rows = kPlaneValues / tile_columns;
    } else if (run == 1 && 2 * channels <= kStripColumns) {
      join_samples(shape.samples);
    } else {
      // Strips of equal length, and of whole cache lines where a channel is one column.
      const int64_t most = kStripColumns / run;
      strip_channels = ceil_div(channels, ceil_div(channels, most));
      if (run == 1) strip_channels = ceil_div(strip_channels, 32) * 32;
    }
  }

  int64_t strips() const { return ceil_div(channels, strip_channels); }
  int64_t column_tiles() const { return planar ? ceil_div(run, tile_columns) : 1; }
  int64_t tiles() const { return ceil_div(rows, tile_rows) * column_tiles(); }

  Strip strip(int64_t index) const {
    const int64_t first = index * strip_channels;
    const int64_t count = least(strip_channels, channels - first);
    // Joined samples: one strip, of more columns than one sample has.
    return {first, count, first * run, strip_channels == channels ? columns : count * run};
  }
  Tile tile(const Strip& strip, int64_t index) const {
    const int64_t row = index / column_tiles() * tile_rows, column = index % column_tiles() * tile_columns;
    return {row, least(row + tile_rows, rows), column, least(column + tile_columns, strip.columns)};
  }

  // The first few values of each channel of a tile.
  Tile sample(const Tile& tile) const {
    if (planar) return {tile.first_row, tile.first_row + 1, tile.begin, least(tile.end, tile.begin + 1024)};
    return {tile.first_row, least(tile.last_row, tile.first_row + 8), tile.begin, tile.end};
  }

  // visit(offset, begin, end) for the rows of a tile: the values at offset + [begin, end).
  template <typename Visit>
  RDS_FAST_INLINE void for_rows(const Strip& strip, const Tile& tile, const Visit& visit) const {
    for (int64_t row = tile.first_row; row < tile.last_row; ++row) {
      const int64_t present = row == rows - 1 ? last_columns - strip.column : strip.columns;
      visit(row * columns + strip.column, tile.begin, least(tile.end, present));
    }
  }
  int64_t values_of_channel(const Strip& strip, const Tile& tile) const {
    int64_t count = 0;
    for_rows(strip, tile, [&](int64_t, int64_t begin, int64_t end) { count += end - begin; });
    return count / strip.channels;
  }

  // visit(column, channel) where the columns of each channel of a strip begin; channels count from its first.
  template <typename Visit>
  RDS_FAST_INLINE void for_runs(const Strip& strip, const Visit& visit) const {
    for (int64_t first = 0; first < strip.columns; first += strip.channels * run) {
      for (int64_t channel = 0; channel < strip.channels; ++channel) visit(first + channel * run, channel);
    }
  }

 private:
  // As many samples a row as fit; whole cache lines, if that many do.
  void join_samples(int64_t samples) {
    int64_t joined = kStripColumns / channels;
    int64_t aligned = 32;
    while (aligned > 1 && channels * (aligned / 2) % 32 == 0) aligned /= 2;
    if (joined >= aligned) joined = joined / aligned * aligned;
    rows = ceil_div(samples, joined);
    columns = channels * joined;
    last_columns = (samples - (rows - 1) * joined) * channels;
    strip_channels = channels;
  }
};

// ---- Threads --------------------------------------------------------------------------------------------------------

// work(strip, tile) on every tile, backwards: what was read last is still in the cache.
template <typename Work>
void for_tiles(const Layout& layout, const Work& work) {
  const int64_t tiles = layout.tiles();
  const int64_t grain = ceil_div(kGrain, layout.tile_rows * least(layout.tile_columns, layout.columns));
  parallel(layout.strips() * tiles, grain, [&](int64_t first, int64_t last) {
    for (int64_t unit = last; unit-- > first;) {
      const Strip strip = layout.strip(unit / tiles);
      work(strip, layout.tile(strip, unit % tiles), unit);
    }
    finish_streams();
  });
}

// For every strip: task.prepare(strip); task.reduce(strip, tile, partials) for its tiles, partials[k · channels + c];
// Task::merge(total, partial) in order; task.finish(channel, total); task.write(strip, tile) for its tiles.
template <typename Task>
void reduce_channels(const Layout& layout, const Task& task) {
  constexpr int kPartials = Task::kPartials;
  const int64_t strips = layout.strips(), tiles = layout.tiles();
  const int64_t partials_of_tile = kPartials * layout.strip_channels;
  const auto finish = [&](const Strip& strip, int64_t channel, const double* partials) {
    double total[kPartials];
    for (int k = 0; k < kPartials; ++k) total[k] = partials[k * strip.channels + channel];
    for (int64_t tile = 1; tile < tiles; ++tile) {
      double partial[kPartials];
      for (int k = 0; k < kPartials; ++k) {
        partial[k] = partials[tile * partials_of_tile + k * strip.channels + channel];
      }
      Task::merge(total, partial);
    }
    task.finish(strip.first_channel + channel, total);
  };
  if (strips >= 4 * thread_count() || tiles == 1) {
    const int64_t grain = row_grain(layout.values * layout.strip_channels);
    parallel(strips, grain, [&](int64_t first, int64_t last) {
      double* const partials = new double[tiles * partials_of_tile];
      for (int64_t unit = first; unit < last; ++unit) {
        const Strip strip = layout.strip(unit);
        task.prepare(strip);
        for (int64_t tile = 0; tile < tiles; ++tile) {
          task.reduce(strip, layout.tile(strip, tile), partials + tile * partials_of_tile);
        }
        for (int64_t channel = 0; channel < strip.channels; ++channel) finish(strip, channel, partials);
        for (int64_t tile = tiles; tile-- > 0;) task.write(strip, layout.tile(strip, tile));
      }
      delete[] partials;
      finish_streams();
    });
    return;
  }
  double* const partials = new double[strips * tiles * partials_of_tile];
  for (int64_t strip = 0; strip < strips; ++strip) task.prepare(layout.strip(strip));
  for_tiles(layout, [&](const Strip& strip, const Tile& tile, int64_t unit) {
    task.reduce(strip, tile, partials + unit * partials_of_tile);
  });
  parallel(layout.channels, row_grain(tiles * kPartials), [&](int64_t first, int64_t last) {
    for (int64_t channel = first; channel < last; ++channel) {
      const int64_t strip = channel / layout.strip_channels;
      finish(layout.strip(strip), channel % layout.strip_channels, partials + strip * tiles * partials_of_tile);
    }
  });
  for_tiles(layout, [&](const Strip& strip, const Tile& tile, int64_t) { task.write(strip, tile); });
  delete[] partials;
}

}  // namespace rds_fast::cpu::RDS_FAST_CAPABILITY
