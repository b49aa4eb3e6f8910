// reduce_map_stashed: rows too long for registers, kept in shared memory between the reduction and the map.
//
// A block loads a row, and puts what it loads into up to 227 KB of dynamic shared memory; the map takes it from there.
// Of a row that is longer only the rest is read a second time, much of it from the L2 cache, because few such rows are
// under way at once. Every thread takes back only what it put there itself, and its slots are the same in every row, so
// no barrier is needed.
#pragma once

#include "rows.cuh"

namespace rds_fast::cuda {

// Threads of a block. 512 have 128 registers each, which the float64 powers of a ROLLED operation exceed on sm_120.
template <typename Op>
constexpr int STASH_BLOCK = Op::ROLLED && sizeof(typename Op::Element) == 8 ? 256 : 512;

// Chunks in flight a thread: as many as do not spill on sm_100, the most demanding architecture. 512 threads with two
// of two inputs have 32 KB of loads under way.
template <typename Op>
constexpr int IN_FLIGHT = sizeof(typename Op::Element) == 8 ? 1
                          : Op::READS_Q || Op::ROLLED       ? 2
                                                            : UNROLL;

template <typename Op>
struct Stash {
  static constexpr bool KEEPS_Q = Op::READS_Q && Op::MAP_READS_Q;
  uint4* slots;
  // Chunks that there is room for, of each input: they lie this far apart, however many of them a row has. Else a
  // thread that is ahead would put its next row where another has yet to take its last.
  int64_t capacity;
  int64_t chunks;  // those of the row that fit
  bool q_wide;

  // 16-byte slots that a chunk of every input takes.
  static __host__ __device__ int slots_per_chunk(bool q_wide) {
    return 1 + (Op::READS_V ? 1 : 0) + (KEEPS_Q ? (q_wide ? 2 : 1) : 0);
  }

  __device__ __forceinline__ void put(int64_t chunk, const Chunk& values) const {
    uint4* slot = slots + chunk;
    *slot = values.x;
    if constexpr (Op::READS_V) *(slot += capacity) = values.v;
    if constexpr (KEEPS_Q) {
      *(slot += capacity) = values.q[0];
      if (q_wide) *(slot += capacity) = values.q[1];
    }
  }

  __device__ __forceinline__ Chunk take(int64_t chunk) const {
    const uint4* slot = slots + chunk;
    Chunk values;
    values.x = *slot;
    if constexpr (Op::READS_V) values.v = *(slot += capacity);
    if constexpr (KEEPS_Q) {
      values.q[0] = *(slot += capacity);
      if (q_wide) values.q[1] = *(slot += capacity);
    }
    return values;
  }
};

template <typename Op>
__device__ __forceinline__ void accumulate_and_stash(const Op& op, typename Op::State& state,
                                                     const typename Op::Scalars& scalars,
                                                     const Rows<typename Op::Element>& rows, const Row<Op>& row,
                                                     const Stash<Op>& stash) {
  for (int64_t base = threadIdx.x; base < row.body; base += STASH_BLOCK<Op> * IN_FLIGHT<Op>) {
    Chunk chunks[IN_FLIGHT<Op>];
    load_chunks<Op, STASH_BLOCK<Op>>(rows, row, base, row.body, chunks);
#pragma unroll
    for (int u = 0; u < IN_FLIGHT<Op>; ++u) {
      const int64_t chunk = base + u * STASH_BLOCK<Op>;
      if (chunk < stash.chunks) stash.put(chunk, chunks[u]);
    }
    accumulate_chunks<STASH_BLOCK<Op>>(op, state, scalars, rows, base, row.body, chunks);
  }
}

template <typename Op>
__device__ __forceinline__ void map_stashed(const Op& op, const typename Op::Coefficients& coefficients,
                                            const Rows<typename Op::Element>& rows, const Row<Op>& row,
                                            const Stash<Op>& stash) {
  for (int64_t base = threadIdx.x; base < row.body; base += STASH_BLOCK<Op> * IN_FLIGHT<Op>) {
    Chunk chunks[IN_FLIGHT<Op>];
    if (stash.chunks < row.body && base + (IN_FLIGHT<Op> - 1) * STASH_BLOCK<Op> >= stash.chunks) {  // not all fitted
      load_chunks<Op, STASH_BLOCK<Op>>(rows, row, base, row.body, chunks);
    }
#pragma unroll
    for (int u = 0; u < IN_FLIGHT<Op>; ++u) {
      const int64_t chunk = base + u * STASH_BLOCK<Op>;
      if (chunk < stash.chunks) chunks[u] = stash.take(chunk);
    }
    map_chunks<STASH_BLOCK<Op>>(op, coefficients, rows, row, base, row.body, chunks);
  }
}

template <typename Op>
__global__ void __launch_bounds__(STASH_BLOCK<Op>, 1)
    reduce_map_stashed(Op op, Rows<typename Op::Element> rows, int64_t capacity) {
  for (int64_t r = blockIdx.x; r < rows.rows; r += gridDim.x) {
    const Row<Op> row(rows, r);
    const int64_t fitting = capacity < row.body ? capacity : row.body;
    const Stash<Op> stash{reinterpret_cast<uint4*>(dynamic_shared_memory()), capacity, fitting, rows.q_wide};
    const auto scalars = op.scalars(r);
    auto state = op.identity();
    accumulate_and_stash(op, state, scalars, rows, row, stash);
    Values<typename Op::A, 1> edges[EDGES<Op, STASH_BLOCK<Op>>];
    load_edges<STASH_BLOCK<Op>>(rows, row, threadIdx.x, edges);
    accumulate_edges<STASH_BLOCK<Op>>(op, state, scalars, row, threadIdx.x, edges);
    merge_threads<STASH_BLOCK<Op>>(op, state);
    if (threadIdx.x == 0) op.finish(r, scalars, state);
    const auto coefficients = op.coefficients(scalars, state);
    map_stashed(op, coefficients, rows, row, stash);
    map_edges<STASH_BLOCK<Op>>(op, coefficients, row, threadIdx.x, edges);
  }
}

}  // namespace rds_fast::cuda
