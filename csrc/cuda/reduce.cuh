// Merging the states of the threads that share a row. The order is fixed by the thread numbers, so the bits of the
// result are the same on every run.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

namespace rds_fast::cuda {

constexpr int WARP = 32;

template <typename State>
__device__ __forceinline__ State shuffle_xor(const State& state, int lane_mask) {
  static_assert(sizeof(State) % 4 == 0, "a state is exchanged in 4-byte words");
  uint32_t words[sizeof(State) / 4];
  memcpy(words, &state, sizeof(State));
#pragma unroll
  for (uint32_t& word : words) word = __shfl_xor_sync(0xffffffffu, word, lane_mask);
  State other;
  memcpy(&other, words, sizeof(State));
  return other;
}

// Every lane gets the merged state of its group of LANES (a power of two) neighbours. All 32 lanes must take part.
template <int LANES, typename Op>
__device__ __forceinline__ void merge_lanes(const Op& op, typename Op::State& state) {
#pragma unroll
  for (int offset = LANES / 2; offset > 0; offset /= 2) op.merge(state, shuffle_xor(state, offset));
}

// Every thread gets the merged state of its warp (THREADS = 32) or of the block of THREADS threads.
template <int THREADS, typename Op>
__device__ __forceinline__ void merge_threads(const Op& op, typename Op::State& state) {
  using State = typename Op::State;
  merge_lanes<WARP>(op, state);
  if constexpr (THREADS > WARP) {
    constexpr int WARPS = THREADS / WARP;
    __shared__ __align__(16) unsigned char storage[WARPS * sizeof(State)];  // bytes: a State has a constructor
    State* const states = reinterpret_cast<State*>(storage);
    __syncthreads();  // a warp may still be reading the states of the previous row
    if (threadIdx.x % WARP == 0) states[threadIdx.x / WARP] = state;
    __syncthreads();
    state = states[threadIdx.x % WARPS];
    merge_lanes<WARPS>(op, state);
  }
}

}  // namespace rds_fast::cuda
