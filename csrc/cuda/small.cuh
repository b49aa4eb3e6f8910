// small_rows: rows of few columns, one thread each. A block copies its rows to shared memory and back, so that memory
// sees whole stretches of them, and no thread waits for another's part of a sum.
#pragma once

#include "rows.cuh"

namespace rds_fast::cuda {

constexpr int SMALL_COLUMNS = 32;

// Rows of a small_rows block, one a thread: three tiles fit in the 48 KB that every launch may use.
template <typename Op>
constexpr int SMALL_ROWS = sizeof(typename Op::A) == 8 ? 48 : 96;

// Copies `count` short rows into a tile of shared memory: neighbouring threads read neighbouring elements. The pitch is
// odd, so that the threads, each reading its own row of the tile, hit different banks.
template <typename E, typename A>
__device__ __forceinline__ void fill_tile(A* tile, const E* source, int64_t stride, int count, int columns) {
  const int pitch = columns | 1;
  const int row_step = blockDim.x / columns;
  const int column_step = blockDim.x % columns;
  int row = threadIdx.x / columns;
  int column = threadIdx.x % columns;
#pragma unroll 4
  while (row < count) {
    tile[row * pitch + column] = static_cast<A>(source[row * stride + column]);
    row += row_step;
    column += column_step;
    if (column >= columns) {
      column -= columns;
      ++row;
    }
  }
}

// Column c of a row in shared memory.
template <typename Op>
__device__ __forceinline__ Values<typename Op::A, 1> small_element(const typename Op::A* x, const typename Op::A* v,
                                                                   const typename Op::A* q, int c) {
  Values<typename Op::A, 1> values;
  values.x[0] = x[c];
  if constexpr (Op::READS_V) values.v[0] = v[c];
  if constexpr (Op::READS_Q) values.q[0] = q[c];
  return values;
}

template <typename Op>
__device__ __forceinline__ void small_row(const Op& op, int64_t r, int columns, typename Op::A* x,
                                          const typename Op::A* v, const typename Op::A* q) {
  const auto scalars = op.scalars(r);
  auto state = op.identity();
  if constexpr (Op::ANCHORED) {
    auto anchor = state.anchor;
    for (int c = 0; c < columns; ++c) anchor = larger_of(Op::Bound::of(x[c]), anchor);
    op.move(state, anchor);
  }
  if constexpr (Op::REDUCES) {
    for (int c = 0; c < columns; ++c) op.accumulate(state, scalars, small_element<Op>(x, v, q, c));
    op.finish(r, scalars, state);
  }
  if constexpr (Op::MAPS) {
    const auto coefficients = op.coefficients(scalars, state);
    for (int c = 0; c < columns; ++c) x[c] = map_element(op, coefficients, c, small_element<Op>(x, v, q, c));
  }
}

template <typename Op>
__global__ void __launch_bounds__(SMALL_ROWS<Op>, 8) small_rows(Op op, Rows<typename Op::Element> rows) {
  using T = typename Op::Element;
  using A = Accumulation<T>;
  constexpr int ROWS = SMALL_ROWS<Op>;
  const int columns = static_cast<int>(rows.columns);
  const int pitch = columns | 1;
  A* const x_tile = reinterpret_cast<A*>(dynamic_shared_memory());
  A* const v_tile = x_tile + ROWS * pitch;
  A* const q_tile = v_tile + (Op::READS_V ? ROWS * pitch : 0);
  for (int64_t first = int64_t{blockIdx.x} * ROWS; first < rows.rows; first += int64_t{gridDim.x} * ROWS) {
    const int count = rows.rows - first < ROWS ? static_cast<int>(rows.rows - first) : ROWS;
    __syncthreads();  // the previous tile is still being written out
    fill_tile(x_tile, rows.x + first * rows.x_stride, rows.x_stride, count, columns);
    if constexpr (Op::READS_V) fill_tile(v_tile, rows.v + first * rows.v_stride, rows.v_stride, count, columns);
    if constexpr (Op::READS_Q) {
      const int64_t offset = first * rows.q_stride;
      if (rows.q_wide) {
        fill_tile(q_tile, static_cast<const A*>(rows.q) + offset, rows.q_stride, count, columns);
      } else {
        fill_tile(q_tile, static_cast<const T*>(rows.q) + offset, rows.q_stride, count, columns);
      }
    }
    __syncthreads();
    const int own = threadIdx.x * pitch;
    if (threadIdx.x < count) small_row(op, first + threadIdx.x, columns, x_tile + own, v_tile + own, q_tile + own);
    if constexpr (Op::MAPS) {
      __syncthreads();
      T* const out = rows.out + first * columns;
      for (int i = threadIdx.x; i < count * columns; i += ROWS) {
        out[i] = static_cast<T>(x_tile[i / columns * pitch + i % columns]);
      }
    }
  }
}

}  // namespace rds_fast::cuda
