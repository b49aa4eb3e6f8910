// The kernels: five ways to run a row operation, by the shape of its rows. What is computed is in the operation.
//
// An operation Op reduces rows, or maps their elements, or does both (a double backward: the elements of dx depend on
// a sum over the row). It is a struct, passed by value, with
//     Element, A                      element and accumulation type
//     READS_V, READS_Q                inputs beside x
//     REDUCES, MAPS, MAP_READS_Q      which of the two phases exist, and whether the second needs q
//     Scalars scalars(r)              what it needs to know of row r
//     State identity()                the neutral state of the reduction
//     accumulate(state, scalars, values)    takes in neighbouring elements
//     merge(state, other)
//     finish(r, scalars, state)       writes the results that are one number a row; called by one thread
//     Coefficients coefficients(scalars, state)
//     A map(coefficients, x, v, q, column)  an element of the (N, C) result
//
//     kernel               a row is handled by             for
//     small_rows           one thread, in shared memory    C <= SMALL_COLUMNS (small.cuh)
//     reduce_rows          a warp, or blocks               reductions; long rows are split over blocks
//     map_rows             a warp, or blocks               maps; the second launch of a split double backward
//     reduce_map_held      a warp, or a block              both; the row stays in registers
//     reduce_map_stashed   a block                         both; the row stays in shared memory as far as it fits
//     (stash.cuh)
#pragma once

#include "memory.cuh"
#include "reduce.cuh"

namespace rds_fast::cuda {

// What an operation has unless it says otherwise.
template <typename T>
struct RowOperation {
  using Element = T;
  using A = Accumulation<T>;
  struct None {};
  using Scalars = None;
  using State = None;
  using Coefficients = None;
  static constexpr bool REDUCES = false;
  static constexpr bool MAPS = false;
  static constexpr bool READS_V = false;
  static constexpr bool READS_Q = false;
  static constexpr bool MAP_READS_Q = false;

  __device__ __forceinline__ None scalars(int64_t) const { return {}; }
  __device__ __forceinline__ None identity() const { return {}; }
};

constexpr int BLOCK = 256;        // threads of a block that shares a row
constexpr int WARPS_BLOCK = 128;  // threads of a block whose warps have a row each
constexpr int STASH_BLOCK = 512;
constexpr int UNROLL = 4;  // chunks in flight a thread

// Threads of a block whose rows are handled by LANES threads each.
template <int LANES>
constexpr int THREADS = LANES == WARP ? WARPS_BLOCK : LANES;

// Blocks that must fit on a multiprocessor together. Said wherever a kernel is bounded: it lets the compiler use 168 or
// 128 registers a thread, where its own rule stops lower and spills; the loads in flight still keep the memory busy.
template <int LANES>
constexpr int RESIDENT_BLOCKS = LANES == WARP ? 3 : 2;

__device__ __forceinline__ unsigned char* dynamic_shared_memory() {
  extern __shared__ __align__(16) unsigned char dynamic_shared[];
  return dynamic_shared;
}

template <typename Op>
__device__ __forceinline__ void map_chunk(const Op& op, const typename Op::Coefficients& coefficients,
                                          const Rows<typename Op::Element>& rows, const Row<Op>& row, int64_t column,
                                          const Chunk& chunk) {
  constexpr int W = WIDTH<typename Op::Element>;
  const auto in = unpack_chunk<Op>(rows, chunk);
  typename Op::A out[W];
#pragma unroll
  for (int i = 0; i < W; ++i) out[i] = op.map(coefficients, in.x[i], in.v[i], in.q[i], column + i);
  store_packed(row.out + column, out, rows.out_aligned);
}

template <typename Op>
__device__ __forceinline__ void map_element(const Op& op, const typename Op::Coefficients& coefficients,
                                            const Row<Op>& row, int64_t column, const Values<typename Op::A, 1>& in) {
  const auto out = op.map(coefficients, in.x[0], in.v[0], in.q[0], column);
  row.out[column] = static_cast<typename Op::Element>(out);
}

// Takes in the chunks first + lane, first + lane + LANES, … below last.
template <int LANES, typename Op>
__device__ __forceinline__ void accumulate_chunks(const Op& op, typename Op::State& state,
                                                  const typename Op::Scalars& scalars,
                                                  const Rows<typename Op::Element>& rows, const Row<Op>& row,
                                                  int64_t first, int64_t last) {
  for (int64_t base = first + threadIdx.x % LANES; base < last; base += LANES * UNROLL) {
    Chunk chunks[UNROLL];
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
      if (base + u * LANES < last) chunks[u] = load_chunk<Op>(rows, row, row.chunk_column(base + u * LANES));
    }
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
      if (base + u * LANES < last) op.accumulate(state, scalars, unpack_chunk<Op>(rows, chunks[u]));
    }
  }
}

// blockIdx.y is the part of the row: every part leaves its state in `partials` (rows, parts), a single one finishes.
template <typename Op, int LANES>
__global__ void __launch_bounds__(THREADS<LANES>, RESIDENT_BLOCKS<LANES>)
    reduce_rows(Op op, Rows<typename Op::Element> rows, typename Op::State* partials) {
  constexpr int ROWS = THREADS<LANES> / LANES;
  const int lane = threadIdx.x % LANES;
  const int64_t part = blockIdx.y;
  const int64_t parts = gridDim.y;
  for (int64_t r = int64_t{blockIdx.x} * ROWS + threadIdx.x / LANES; r < rows.rows; r += int64_t{gridDim.x} * ROWS) {
    const Row<Op> row(rows, r);
    const auto scalars = op.scalars(r);
    auto state = op.identity();
    const int64_t share = (row.body + parts - 1) / parts;
    const int64_t first = part * share;
    const int64_t last = first + share < row.body ? first + share : row.body;
    accumulate_chunks<LANES>(op, state, scalars, rows, row, first, last);
    if (part == 0 && lane < row.edges) {
      op.accumulate(state, scalars, load_element<Op>(rows, row, row.edge_column(lane)));
    }
    merge_threads<LANES>(op, state);
    if (lane != 0) continue;
    if (parts == 1) {
      op.finish(r, scalars, state);
    } else {
      partials[r * parts + part] = state;
    }
  }
}

// Every thread gets the state of row r, merged from its parts.
template <int LANES, typename Op>
__device__ __forceinline__ typename Op::State merge_parts(const Op& op, const typename Op::State* partials, int parts,
                                                          int64_t r) {
  auto state = op.identity();
  for (int part = threadIdx.x % LANES; part < parts; part += LANES) op.merge(state, partials[r * parts + part]);
  merge_threads<LANES>(op, state);
  return state;
}

// The second launch of a reduction whose rows were split.
template <typename Op>
__global__ void __launch_bounds__(WARPS_BLOCK, RESIDENT_BLOCKS<WARP>)
    finish_rows(Op op, int64_t rows, const typename Op::State* partials, int parts) {
  constexpr int ROWS = WARPS_BLOCK / WARP;
  for (int64_t r = int64_t{blockIdx.x} * ROWS + threadIdx.x / WARP; r < rows; r += int64_t{gridDim.x} * ROWS) {
    const auto state = merge_parts<WARP>(op, partials, parts, r);
    if (threadIdx.x % WARP == 0) op.finish(r, op.scalars(r), state);
  }
}

// blockIdx.y is the part of the row, of the map; `parts` is the number of states a row that a reduction left before it.
template <typename Op, int LANES>
__global__ void __launch_bounds__(THREADS<LANES>, RESIDENT_BLOCKS<LANES>)
    map_rows(Op op, Rows<typename Op::Element> rows, const typename Op::State* partials, int parts) {
  constexpr int ROWS = THREADS<LANES> / LANES;
  const int lane = threadIdx.x % LANES;
  for (int64_t r = int64_t{blockIdx.x} * ROWS + threadIdx.x / LANES; r < rows.rows; r += int64_t{gridDim.x} * ROWS) {
    const Row<Op> row(rows, r);
    const auto scalars = op.scalars(r);
    auto state = op.identity();
    if constexpr (Op::REDUCES) {
      state = merge_parts<LANES>(op, partials, parts, r);
      if (blockIdx.y == 0 && lane == 0) op.finish(r, scalars, state);
    }
    const auto coefficients = op.coefficients(scalars, state);
    const int64_t share = (row.body + gridDim.y - 1) / gridDim.y;
    const int64_t first = blockIdx.y * share;
    const int64_t last = first + share < row.body ? first + share : row.body;
    for (int64_t base = first + lane; base < last; base += LANES * UNROLL) {
      Chunk chunks[UNROLL];
#pragma unroll
      for (int u = 0; u < UNROLL; ++u) {
        if (base + u * LANES < last) chunks[u] = load_chunk<Op>(rows, row, row.chunk_column(base + u * LANES));
      }
#pragma unroll
      for (int u = 0; u < UNROLL; ++u) {
        const int64_t chunk = base + u * LANES;
        if (chunk < last) map_chunk(op, coefficients, rows, row, row.chunk_column(chunk), chunks[u]);
      }
    }
    if (blockIdx.y == 0 && lane < row.edges) {
      const int64_t column = row.edge_column(lane);
      map_element(op, coefficients, row, column, load_element<Op>(rows, row, column));
    }
  }
}

// The row is loaded once, whole, into the registers of its LANES threads: at most LANES · HELD chunks.
template <typename Op, int LANES, int HELD>
__global__ void __launch_bounds__(THREADS<LANES>, RESIDENT_BLOCKS<LANES>)
    reduce_map_held(Op op, Rows<typename Op::Element> rows) {
  constexpr int ROWS = THREADS<LANES> / LANES;
  const int lane = threadIdx.x % LANES;
  for (int64_t r = int64_t{blockIdx.x} * ROWS + threadIdx.x / LANES; r < rows.rows; r += int64_t{gridDim.x} * ROWS) {
    const Row<Op> row(rows, r);
    const int body = static_cast<int>(row.body);
    Chunk held[HELD];
#pragma unroll
    for (int h = 0; h < HELD; ++h) {
      if (lane + h * LANES < body) held[h] = load_chunk<Op>(rows, row, row.chunk_column(lane + h * LANES));
    }
    Values<typename Op::A, 1> edge;
    if (lane < row.edges) edge = load_element<Op>(rows, row, row.edge_column(lane));
    const auto scalars = op.scalars(r);
    auto state = op.identity();
#pragma unroll
    for (int h = 0; h < HELD; ++h) {
      if (lane + h * LANES < body) op.accumulate(state, scalars, unpack_chunk<Op>(rows, held[h]));
    }
    if (lane < row.edges) op.accumulate(state, scalars, edge);
    merge_threads<LANES>(op, state);
    if (lane == 0) op.finish(r, scalars, state);
    const auto coefficients = op.coefficients(scalars, state);
#pragma unroll
    for (int h = 0; h < HELD; ++h) {
      const int chunk = lane + h * LANES;
      if (chunk < body) map_chunk(op, coefficients, rows, row, row.chunk_column(chunk), held[h]);
    }
    if (lane < row.edges) map_element(op, coefficients, row, row.edge_column(lane), edge);
  }
}

}  // namespace rds_fast::cuda
