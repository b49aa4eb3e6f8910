// The kernels: five ways to run a row operation, by the shape of its rows. What is computed is in the operation.
//
// An operation Op reduces rows, or maps their elements, or does both (a double backward: the elements of dx depend on
// a sum over the row). It is a struct, passed by value, with
//     Element, A                      element and accumulation type
//     READS_V, READS_Q                inputs beside x
//     REDUCES, MAPS, MAP_READS_Q      which of the two phases exist, and whether the second needs q
//     ROLLED                          whether its code is too long to be repeated for each chunk that a thread holds
//     Scalars scalars(r)              what it needs to know of row r
//     State identity()                the neutral state of the reduction; ANCHORED, add, …: see reduce.cuh
//     accumulate(state, scalars, values)    takes in neighbouring elements; ANCHORED: none above the anchor
//     finish(r, scalars, state)       writes the results that are one number a row; called by one thread
//     Coefficients coefficients(scalars, state)
//     A map(coefficients, x, v, q)    an element of the (N, C) result
//     HAS_COLUMN, column(coefficients), at_column(coefficients, x)
//                                     where one element of a row is mapped otherwise: its column, or −1, and how
//
//     kernel               a row is handled by             for
//     small_rows           one thread, in shared memory    C <= SMALL_COLUMNS (small.cuh)
//     reduce_rows          8 lanes, a warp, or blocks      reductions; long rows are split over blocks
//     map_rows             8 lanes, a warp, or blocks      maps; the second launch of a split double backward
//     reduce_map_held      8 lanes, a warp, or a block     both; the row stays in registers
//     reduce_map_stashed   a block                         both; the row stays in shared memory as far as it fits
//     (stash.cuh)
//
// What a row costs beside its elements (its addresses, the merging, the logarithm) is some hundred instructions of a
// warp. A row of 1000 bfloat16 is 2 KB, which the memory delivers in the time of some 500: so four rows share a warp.
#pragma once

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
  static constexpr bool ANCHORED = false;
  static constexpr bool ROLLED = false;
  static constexpr bool HAS_COLUMN = false;
  static constexpr bool REDUCES = false;
  static constexpr bool MAPS = false;
  static constexpr bool READS_V = false;
  static constexpr bool READS_Q = false;
  static constexpr bool MAP_READS_Q = false;

  __device__ __forceinline__ None scalars(int64_t) const { return {}; }
  __device__ __forceinline__ None identity() const { return {}; }
};

constexpr int BLOCK = 256;        // threads of a block that shares a row
constexpr int WARPS_BLOCK = 128;  // threads of a block whose warps, or groups of lanes, have a row each
constexpr int GROUP = 8;          // lanes of a group: their loads together are a cache line
constexpr int UNROLL = 4;         // chunks in flight a thread

// Threads of a block whose rows are handled by LANES threads each.
template <int LANES>
constexpr int THREADS = LANES <= WARP ? WARPS_BLOCK : LANES;

// Numbers of chunks: those of a short row fit in 32 bits.
template <int LANES>
using ChunkIndex = std::conditional_t<LANES <= WARP, int, int64_t>;

// Blocks that must fit on a multiprocessor together. Said wherever a kernel is bounded: it lets the compiler use 168 or
// 128 registers a thread, where its own rule stops lower and spills; the loads in flight still keep the memory busy.
template <int LANES>
constexpr int RESIDENT_BLOCKS = LANES <= WARP ? 3 : 2;

__device__ __forceinline__ unsigned char* dynamic_shared_memory() {
  extern __shared__ __align__(16) unsigned char dynamic_shared[];
  return dynamic_shared;
}

// Edge elements of a row that one of its LANES threads has at most.
template <typename Op, int LANES>
constexpr int EDGES = (2 * (WIDTH<typename Op::Element> - 1) + LANES - 1) / LANES;

// A loop over the COUNT chunks that a thread holds is unrolled, since registers cannot be chosen by a number. That of a
// ROLLED operation is not: it has COUNT turns of one chunk each, the one in the first place, and between two turns the
// chunks move up by one. After the last turn each is where it was.
template <typename Op, int COUNT>
constexpr int TURNS = Op::ROLLED ? COUNT : 1;

template <typename Op, int COUNT>
__device__ __forceinline__ void next_turn(Chunk (&chunks)[COUNT]) {
  if constexpr (Op::ROLLED) {
    const Chunk first = chunks[0];
#pragma unroll
    for (int i = 1; i < COUNT; ++i) chunks[i - 1] = chunks[i];
    chunks[COUNT - 1] = first;
  }
}

template <typename Op>
__device__ __forceinline__ void map_chunk(const Op& op, const typename Op::Coefficients& coefficients,
                                          const Rows<typename Op::Element>& rows, const Row<Op>& row, int64_t column,
                                          const Chunk& chunk) {
  constexpr int W = WIDTH<typename Op::Element>;
  const auto in = unpack_chunk<Op>(rows, chunk);
  typename Op::A out[W];
#pragma unroll
  for (int i = 0; i < W; ++i) out[i] = op.map(coefficients, in.x[i], in.v[i], in.q[i]);
  if constexpr (Op::HAS_COLUMN) {
    const int64_t place = op.column(coefficients) - column;
    if (place >= 0 && place < W) {  // of one chunk a row
#pragma unroll
      for (int i = 0; i < W; ++i) out[i] = i == place ? op.at_column(coefficients, in.x[i]) : out[i];
    }
  }
  store_packed(row.out + column, out, rows.out_aligned);
}

// Maps the chunks base, base + LANES, … below last of those loaded.
template <int LANES, int COUNT, typename Op, typename Index>
__device__ __forceinline__ void map_chunks(const Op& op, const typename Op::Coefficients& coefficients,
                                           const Rows<typename Op::Element>& rows, const Row<Op>& row, Index base,
                                           Index last, Chunk (&chunks)[COUNT]) {
#pragma unroll 1
  for (int turn = 0; turn < TURNS<Op, COUNT>; ++turn) {
#pragma unroll
    for (int u = 0; u < COUNT / TURNS<Op, COUNT>; ++u) {
      const Index chunk = base + (turn + u) * LANES;
      if (chunk < last) map_chunk(op, coefficients, rows, row, row.chunk_column(chunk), chunks[u]);
    }
    next_turn<Op>(chunks);
  }
}

template <typename Op>
__device__ __forceinline__ typename Op::A map_element(const Op& op, const typename Op::Coefficients& coefficients,
                                                      int64_t column, const Values<typename Op::A, 1>& in) {
  if constexpr (Op::HAS_COLUMN) {
    if (column == op.column(coefficients)) return op.at_column(coefficients, in.x[0]);
  }
  return op.map(coefficients, in.x[0], in.v[0], in.q[0]);
}

// Maps the edge elements that the threads of a row have, `lane` the number of this one.
template <int LANES, typename Op>
__device__ __forceinline__ void map_edges(const Op& op, const typename Op::Coefficients& coefficients,
                                          const Row<Op>& row, int lane,
                                          const Values<typename Op::A, 1> (&values)[EDGES<Op, LANES>]) {
#pragma unroll
  for (int e = 0; e < EDGES<Op, LANES>; ++e) {
    if (lane + e * LANES >= row.edges) return;
    const int64_t column = row.edge_column(lane + e * LANES);
    row.out[column] = static_cast<typename Op::Element>(map_element(op, coefficients, column, values[e]));
  }
}

template <int LANES, typename Op>
__device__ __forceinline__ void load_edges(const Rows<typename Op::Element>& rows, const Row<Op>& row, int lane,
                                           Values<typename Op::A, 1> (&values)[EDGES<Op, LANES>]) {
#pragma unroll
  for (int e = 0; e < EDGES<Op, LANES>; ++e) {
    if (lane + e * LANES < row.edges) values[e] = load_element<Op>(rows, row, row.edge_column(lane + e * LANES));
  }
}

// Takes in what a thread has of the edge elements.
template <int LANES, typename Op>
__device__ __forceinline__ void accumulate_edges(const Op& op, typename Op::State& state,
                                                 const typename Op::Scalars& scalars, const Row<Op>& row, int lane,
                                                 const Values<typename Op::A, 1> (&values)[EDGES<Op, LANES>]) {
#pragma unroll
  for (int e = 0; e < EDGES<Op, LANES>; ++e) {
    if (lane + e * LANES >= row.edges) return;
    if constexpr (Op::ANCHORED) op.move(state, larger_of(state.anchor, Op::Bound::of(values[e].x[0])));
    op.accumulate(state, scalars, values[e]);
  }
}

// Takes in the chunks base, base + LANES, … below last of those loaded.
template <int LANES, int COUNT, typename Op, typename Index>
__device__ __forceinline__ void accumulate_chunks(const Op& op, typename Op::State& state,
                                                  const typename Op::Scalars& scalars,
                                                  const Rows<typename Op::Element>& rows, Index base, Index last,
                                                  Chunk (&chunks)[COUNT]) {
  if constexpr (Op::ANCHORED) {
    typename Op::Bound bound;
#pragma unroll
    for (int u = 0; u < COUNT; ++u) {
      if (base + u * LANES < last) bound.take(chunks[u].x);
    }
    op.move(state, larger_of(state.anchor, bound.value()));
  }
#pragma unroll 1
  for (int turn = 0; turn < TURNS<Op, COUNT>; ++turn) {
#pragma unroll
    for (int u = 0; u < COUNT / TURNS<Op, COUNT>; ++u) {
      if (base + (turn + u) * LANES < last) op.accumulate(state, scalars, unpack_chunk<Op>(rows, chunks[u]));
    }
    next_turn<Op>(chunks);
  }
}

// A part of a row: its first chunk and the one after its last.
struct Part {
  int64_t first, last;

  template <typename Op>
  __device__ __forceinline__ Part(const Row<Op>& row, int64_t part, int64_t parts) : first(0), last(row.body) {
    if (parts == 1) return;
    const int64_t share = (row.body + parts - 1) / parts;
    first = part * share;
    last = first + share < row.body ? first + share : row.body;
  }
};

// blockIdx.y is the part of the row: every part leaves its state in `partials` (rows, parts), a single one finishes.
template <typename Op, int LANES>
__global__ void __launch_bounds__(THREADS<LANES>, RESIDENT_BLOCKS<LANES>)
    reduce_rows(Op op, Rows<typename Op::Element> rows, typename Op::State* partials) {
  using Index = ChunkIndex<LANES>;
  constexpr int ROWS = THREADS<LANES> / LANES;
  const int lane = threadIdx.x % LANES;
  const int64_t part = LANES <= WARP ? 0 : blockIdx.y;
  const int64_t parts = LANES <= WARP ? 1 : gridDim.y;
  for (int64_t r = int64_t{blockIdx.x} * ROWS + threadIdx.x / LANES; r < rows.rows; r += int64_t{gridDim.x} * ROWS) {
    const Row<Op> row(rows, r);
    const auto scalars = op.scalars(r);
    auto state = op.identity();
    const Part own(row, part, parts);
    const auto last = static_cast<Index>(own.last);
    for (auto base = static_cast<Index>(own.first + lane); base < last; base += LANES * UNROLL) {
      Chunk chunks[UNROLL];
      load_chunks<Op, LANES>(rows, row, base, last, chunks);
      accumulate_chunks<LANES>(op, state, scalars, rows, base, last, chunks);
    }
    if (part == 0) {
      Values<typename Op::A, 1> edges[EDGES<Op, LANES>];
      load_edges<LANES>(rows, row, lane, edges);
      accumulate_edges<LANES>(op, state, scalars, row, lane, edges);
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
  for (int part = threadIdx.x % LANES; part < parts; part += LANES) merge(op, state, partials[r * parts + part]);
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
  using Index = ChunkIndex<LANES>;
  constexpr int ROWS = THREADS<LANES> / LANES;
  const int lane = threadIdx.x % LANES;
  const int64_t part = LANES <= WARP ? 0 : blockIdx.y;
  for (int64_t r = int64_t{blockIdx.x} * ROWS + threadIdx.x / LANES; r < rows.rows; r += int64_t{gridDim.x} * ROWS) {
    const Row<Op> row(rows, r);
    const auto scalars = op.scalars(r);
    auto state = op.identity();
    if constexpr (Op::REDUCES) {
      state = merge_parts<LANES>(op, partials, parts, r);
      if (part == 0 && lane == 0) op.finish(r, scalars, state);
    }
    const auto coefficients = op.coefficients(scalars, state);
    const Part own(row, part, LANES <= WARP ? 1 : gridDim.y);
    const auto last = static_cast<Index>(own.last);
    for (auto base = static_cast<Index>(own.first + lane); base < last; base += LANES * UNROLL) {
      Chunk chunks[UNROLL];
      load_chunks<Op, LANES>(rows, row, base, last, chunks);
      map_chunks<LANES>(op, coefficients, rows, row, base, last, chunks);
    }
    if (part == 0) {
      Values<typename Op::A, 1> edges[EDGES<Op, LANES>];
      load_edges<LANES>(rows, row, lane, edges);
      map_edges<LANES>(op, coefficients, row, lane, edges);
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
    load_chunks<Op, LANES>(rows, row, lane, body, held);
    Values<typename Op::A, 1> edges[EDGES<Op, LANES>];
    load_edges<LANES>(rows, row, lane, edges);
    const auto scalars = op.scalars(r);
    auto state = op.identity();
    accumulate_chunks<LANES>(op, state, scalars, rows, lane, body, held);
    accumulate_edges<LANES>(op, state, scalars, row, lane, edges);
    merge_threads<LANES>(op, state);
    if (lane == 0) op.finish(r, scalars, state);
    const auto coefficients = op.coefficients(scalars, state);
    map_chunks<LANES>(op, coefficients, rows, row, lane, body, held);
    map_edges<LANES>(op, coefficients, row, lane, edges);
  }
}

}  // namespace rds_fast::cuda
