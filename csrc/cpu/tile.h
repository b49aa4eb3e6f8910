// Short rows as the kernels take them: as many at once as a vector has lanes.
//
// A Tile holds them transposed, one vector a column, so that nothing is reduced across lanes and no row has a
// remainder. FlatRows takes contiguous rows as they lie in memory, where a transposition would cost more than the work.
#pragma once

#include "rows.h"

namespace rds_fast::cpu::RDS_FAST_CAPABILITY {

// The longest row that is treated so: a tile of it stays in registers and the first-level cache.
constexpr int64_t kShort = 64;

// The lanes of v at the given indices.
template <typename T>
RDS_FAST_INLINE Vec<T> permuted(Vec<T> v, BitsVec<Acc<T>> lanes) {
#if defined(__clang__)
  Vec<T> result;
  for (int64_t lane = 0; lane < kLanes<T>; ++lane) result[lane] = v[lanes[lane]];
  return result;
#else
  return __builtin_shuffle(v, lanes);
#endif
}

// a₀ b₀ a₁ b₁ …, from lane begin on.
template <typename T>
RDS_FAST_INLINE Vec<T> interleaved(Vec<T> a, Vec<T> b, int64_t begin) {
  constexpr int64_t L = kLanes<T>;
#if defined(__clang__)
  Vec<T> result;
  for (int64_t lane = 0; lane < L; ++lane) result[lane] = (lane % 2 ? b : a)[begin + lane / 2];
  return result;
#else
  BitsVec<Acc<T>> lanes = {};
  for (int64_t lane = 0; lane < L; ++lane) lanes[lane] = begin + lane / 2 + lane % 2 * L;
  return __builtin_shuffle(a, b, lanes);
#endif
}

// block[i][j] to block[j][i]: interleaving the first half of the vectors with the second rotates the bits of the
// position of each value by one, and as many times as there are bits in a lane's number swap it with the vector's.
template <typename T>
RDS_FAST_INLINE void transpose(Vec<T> (&block)[kLanes<T>]) {
  constexpr int64_t L = kLanes<T>;
#pragma GCC unroll 4
  for (int64_t stage = 1; stage < L; stage *= 2) {
    Vec<T> next[L];
#pragma GCC unroll 8
    for (int64_t i = 0; i < L / 2; ++i) {
      next[2 * i] = interleaved<T>(block[i], block[i + L / 2], 0);
      next[2 * i + 1] = interleaved<T>(block[i], block[i + L / 2], L / 2);
    }
#pragma GCC unroll 16
    for (int64_t i = 0; i < L; ++i) block[i] = next[i];
  }
}

// The sum of block[i] in lane i, for every i: the transposition with the two results of each interleaving added up.
template <typename T>
RDS_FAST_INLINE Vec<T> sums_of_vectors(Vec<T> (&block)[kLanes<T>]) {
  constexpr int64_t L = kLanes<T>;
#pragma GCC unroll 4
  for (int64_t half = L / 2; half > 0; half /= 2) {
#pragma GCC unroll 8
    for (int64_t i = 0; i < half; ++i) {
      block[i] = interleaved<T>(block[i], block[i + half], 0) + interleaved<T>(block[i], block[i + half], L / 2);
    }
  }
  return block[0];
}

// count ≤ kLanes rows from first on, transposed. Lanes beyond count repeat the first row.
template <typename T>
struct Tile {
  static constexpr int64_t L = kLanes<T>;
  Vec<T> columns[(kShort + L - 1) / L * L];

  RDS_FAST_INLINE void gather(const Shape& shape, Rows rows, int64_t first, int64_t count) {
    // Reading on into the next rows spares the masks, but not at the end of the memory.
    const bool whole = rows.stride > 0 && first + 2 * L <= shape.rows;
    for (int64_t c = 0; c < shape.columns; c += L) {
      const int64_t width = shape.columns - c < L ? shape.columns - c : L;
      Vec<T> block[L];
#pragma GCC unroll 16
      for (int64_t lane = 0; lane < L; ++lane) {
        const T* const from = row_of<T>(rows, first + (lane < count ? lane : 0)) + c;
        block[lane] = whole || width == L ? load(from) : load_part(from, width, Acc<T>(0));
      }
      transpose<T>(block);
#pragma GCC unroll 16
      for (int64_t i = 0; i < L; ++i) columns[c + i] = block[i];
    }
  }
  // Through a copy in the cache: whole vectors need no masks there, each running on into the next row, whose own values
  // come after it; and the result is written line by line, where 16 partial stores would wait for the lines.
  RDS_FAST_INLINE void scatter(const Shape& shape, void* out, int64_t first, int64_t count) const {
    T rows[(kShort + 1) * L];
    for (int64_t c = (shape.columns - 1) / L * L; c >= 0; c -= L) {
      Vec<T> block[L];
#pragma GCC unroll 16
      for (int64_t i = 0; i < L; ++i) block[i] = columns[c + i];
      transpose<T>(block);
#pragma GCC unroll 16
      for (int64_t lane = 0; lane < L; ++lane) store(rows + lane * shape.columns + c, block[lane]);
    }
    std::memcpy(static_cast<T*>(out) + first * shape.columns, rows, count * shape.columns * sizeof(T));
  }
};

// Contiguous rows, element by element as they lie in memory. A tile of L rows is as many vectors as there are columns,
// and which row a lane of the i-th belongs to is the same in every tile.
template <typename T>
struct FlatRows {
  static constexpr int64_t L = kLanes<T>;
  int64_t columns;
  BitsVec<Acc<T>> row_of_lane[kShort];
  BitsVec<Acc<T>> lane_in_row;  // −1 in the lanes of a row's last vector that are its own, 0 in the others

  explicit FlatRows(int64_t columns) : columns(columns) {
    for (int64_t lane = 0; lane < L; ++lane) lane_in_row[lane] = lane <= (columns - 1) % L ? -1 : 0;
    for (int64_t i = 0; i < columns; ++i) {
      for (int64_t lane = 0; lane < L; ++lane) row_of_lane[i][lane] = (i * L + lane) / columns;
    }
  }
  // The i-th vector of values that there is one of for each row.
  RDS_FAST_INLINE Vec<T> spread(Vec<T> of_rows, int64_t i) const { return permuted<T>(of_rows, row_of_lane[i]); }

  RDS_FAST_INLINE Vec<T> last_of_row(Vec<T> values) const { return lane_in_row ? values : Vec<T>{}; }

  // Σ f(value) over each of L rows that start stride values apart. Up to L − 1 values beyond the last row are read.
  template <typename From, typename F>
  RDS_FAST_INLINE Vec<T> row_sums(const From* from, int64_t stride, F f) const {
    if (columns <= L) {  // with a block of its own: one that the loop below adds to would be kept in memory
      Vec<T> block[L];
#pragma GCC unroll 16
      for (int64_t row = 0; row < L; ++row) block[row] = last_of_row(f(load(from + row * stride)));
      return sums_of_vectors<T>(block);
    }
    const int64_t last = (columns - 1) / L * L;
    Vec<T> block[L];
#pragma GCC unroll 16
    for (int64_t row = 0; row < L; ++row) block[row] = last_of_row(f(load(from + row * stride + last)));
    for (int64_t c = 0; c < last; c += L) {
#pragma GCC unroll 16
      for (int64_t row = 0; row < L; ++row) block[row] += f(load(from + row * stride + c));
    }
    return sums_of_vectors<T>(block);
  }

  // The i-th vector of count rows is compute(values, i).
  template <typename Compute>
  RDS_FAST_INLINE void write(const T* from, T* to, int64_t count, Compute compute) const {
    visit(count, [&](auto at, int64_t i) { at.set(to, compute(at(from, Acc<T>(0)), i)); });
  }
  // visit(at, i) on the i-th vector of count rows.
  template <typename Visit>
  RDS_FAST_INLINE void visit(int64_t count, Visit visit) const {
    const int64_t size = count * columns, whole = size / L;
    for (int64_t i = 0; i < whole; ++i) visit(Whole{i * L}, i);
    if (whole * L < size) visit(Part{whole * L, size - whole * L}, whole);
  }
};

// body(first, count) on every tile of rows.
template <typename T, typename Body>
void for_tiles(const Shape& shape, const Body& body) {
  constexpr int64_t L = kLanes<T>;
  parallel((shape.rows + L - 1) / L, row_grain(shape.columns * L), [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile) {
      body(tile * L, shape.rows - tile * L < L ? shape.rows - tile * L : L);
    }
  });
}

// One value a row, for the rows of a tile.
template <typename T>
RDS_FAST_INLINE Vec<T> values_of_lanes(Values values, int64_t first, int64_t count) {
  if (values.stride == 1) {
    return values.accumulated ? load_part(static_cast<const Acc<T>*>(values.data) + first, count, Acc<T>(0))
                              : load_part(static_cast<const T*>(values.data) + first, count, Acc<T>(0));
  }
  Acc<T> lanes[kLanes<T>];
  for (int64_t lane = 0; lane < kLanes<T>; ++lane) {
    lanes[lane] = value_of<T>(values, first + (lane < count ? lane : 0));
  }
  return load(lanes);
}

template <typename T>
RDS_FAST_INLINE void set_results(Results results, int64_t first, int64_t count, Vec<T> v) {
  if (results.accumulated) {
    store_part(static_cast<Acc<T>*>(results.data) + first, v, count);
  } else {
    store_part(static_cast<T*>(results.data) + first, v, count);
  }
}

}  // namespace rds_fast::cpu::RDS_FAST_CAPABILITY
