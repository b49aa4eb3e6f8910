// States of a reduction: how values are taken in, and how the states of the threads that share a row are merged. The
// order is fixed by the thread numbers, so the bits of the result are the same on every run.
//
// An operation whose state is a plain sum of what was taken in has add(state, other). One whose sums are relative to
// the largest value so far (ANCHORED) has
//     Bound                    a Largest: of the elements, or of their magnitudes
//     State                    with members anchor, the largest value or more, and sums
//     move(state, anchor)      makes the sums relative to another anchor, not below the present one
//     add(sums, other)         of states with the same anchor
// Its states move rarely: once for a batch of chunks, and once when the threads of a row have agreed on an anchor.
#pragma once

#include "memory.cuh"

namespace rds_fast::cuda {

constexpr int WARP = 32;
constexpr unsigned ALL_LANES = 0xffffffffu;

// The lanes of this thread's warp that share its row, LANES neighbours.
template <int LANES>
__device__ __forceinline__ unsigned lanes_of_row() {
  if constexpr (LANES >= WARP) {
    return ALL_LANES;
  } else {
    return ((1u << LANES) - 1) << (threadIdx.x % WARP / LANES * LANES);
  }
}

template <typename State>
__device__ __forceinline__ State shuffle_xor(unsigned lanes, const State& state, int lane_mask) {
  static_assert(sizeof(State) % 4 == 0, "a state is exchanged in 4-byte words");
  uint32_t words[sizeof(State) / 4];
  memcpy(words, &state, sizeof(State));
#pragma unroll
  for (uint32_t& word : words) word = __shfl_xor_sync(lanes, word, lane_mask);
  State other;
  memcpy(&other, words, sizeof(State));
  return other;
}

// Merges two states, whatever their anchors.
template <typename Op>
__device__ __forceinline__ void merge(const Op& op, typename Op::State& state, typename Op::State other) {
  if constexpr (Op::ANCHORED) {
    const auto anchor = larger_of(state.anchor, other.anchor);
    op.move(state, anchor);
    op.move(other, anchor);
    op.add(state.sums, other.sums);
  } else {
    op.add(state, other);
  }
}

// Every lane gets the sum over its group of LANES (a power of two) neighbours. `lanes` must all take part.
template <int LANES, typename Op, typename Sums>
__device__ __forceinline__ void add_lanes(const Op& op, Sums& sums, unsigned lanes) {
#pragma unroll
  for (int offset = LANES / 2; offset > 0; offset /= 2) op.add(sums, shuffle_xor(lanes, sums, offset));
}

// Every lane gets the merged state of its group.
template <int LANES, typename Op>
__device__ __forceinline__ void merge_lanes(const Op& op, typename Op::State& state, unsigned lanes) {
  if constexpr (Op::ANCHORED) {
    auto anchor = state.anchor;
#pragma unroll
    for (int offset = LANES / 2; offset > 0; offset /= 2) {
      anchor = larger_of(anchor, shuffle_xor(lanes, anchor, offset));
    }
    op.move(state, anchor);
    add_lanes<LANES>(op, state.sums, lanes);
  } else {
    add_lanes<LANES>(op, state, lanes);
  }
}

// Every thread gets the merged state of its group (THREADS <= 32) or of the block of THREADS threads.
template <int THREADS, typename Op>
__device__ __forceinline__ void merge_threads(const Op& op, typename Op::State& state) {
  using State = typename Op::State;
  if constexpr (THREADS <= WARP) {
    merge_lanes<THREADS>(op, state, lanes_of_row<THREADS>());
  } else {
    merge_lanes<WARP>(op, state, ALL_LANES);
    constexpr int WARPS = THREADS / WARP;
    __shared__ State states[WARPS];
    __syncthreads();  // a warp may still be reading the states of the previous row
    if (threadIdx.x % WARP == 0) states[threadIdx.x / WARP] = state;
    __syncthreads();
    state = states[threadIdx.x % WARPS];
    merge_lanes<WARPS>(op, state, ALL_LANES);
  }
}

}  // namespace rds_fast::cuda
