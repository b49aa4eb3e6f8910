// Rows in memory: 16-byte loads and stores, and how a row is cut so that they are aligned.
//
// A row is cut at the 16-byte boundaries of x into a body of whole chunks (WIDTH elements each) and at most
// 2 (WIDTH − 1) edge elements before and after it. The other tensors of an operation are cut at the same columns; one
// whose rows do not meet 16-byte boundaries there is read or written element by element (its *_aligned flag is false).
#pragma once

#include <cuda_runtime.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../numerics.h"

namespace rds_fast::cuda {

// float64 accumulates in float64, everything else in float32.
template <typename T>
using Accumulation = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Elements in 16 bytes.
template <typename T>
constexpr int WIDTH = 16 / sizeof(T);

// The (N, C) tensors of one operation. q is a third input, in the element type or (q_wide) the accumulation type.
template <typename T>
struct Rows {
  const T* x = nullptr;
  const T* v = nullptr;
  const void* q = nullptr;
  T* out = nullptr;  // contiguous
  int64_t x_stride = 0, v_stride = 0, q_stride = 0;
  int64_t rows = 0, columns = 0;
  bool v_aligned = true, q_aligned = true, out_aligned = true, q_wide = false;
};

// A column vector of N numbers, one a row, in the element type or (wide) the accumulation type.
template <typename T>
struct InputColumn {
  const void* data;
  int64_t stride;
  bool wide;

  __device__ __forceinline__ Accumulation<T> operator[](int64_t r) const {
    using A = Accumulation<T>;
    return wide ? static_cast<const A*>(data)[r * stride] : static_cast<A>(static_cast<const T*>(data)[r * stride]);
  }
};

template <typename T>
struct OutputColumn {
  void* data;
  bool wide;

  __device__ __forceinline__ void store(int64_t r, Accumulation<T> value) const {
    if (wide) {
      static_cast<Accumulation<T>*>(data)[r] = value;
    } else {
      static_cast<T*>(data)[r] = static_cast<T>(value);
    }
  }
};

// The rows are read once, so they pass by L1. Volatile keeps a batch of loads together before the first use of any.
__device__ __forceinline__ uint4 load_16_bytes(const void* address) {
#ifdef __CUDA_ARCH__
  uint4 bits;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(bits.x), "=r"(bits.y), "=r"(bits.z), "=r"(bits.w)
               : "l"(address));
  return bits;
#else
  return *static_cast<const uint4*>(address);
#endif
}

// Written as an instruction: beside the element by element branch that stores the same values, the compiler takes a
// plain store apart and merges the two.
__device__ __forceinline__ void store_16_bytes(void* address, uint4 bits) {
#ifdef __CUDA_ARCH__
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(bits.x), "r"(bits.y), "r"(bits.z),
               "r"(bits.w)
               : "memory");
#else
  *static_cast<uint4*>(address) = bits;
#endif
}

template <typename E>
__device__ __forceinline__ uint4 load_packed(const E* address, bool aligned) {
  if (aligned) return load_16_bytes(address);
  E elements[WIDTH<E>];
#pragma unroll
  for (int i = 0; i < WIDTH<E>; ++i) elements[i] = address[i];
  uint4 bits;
  memcpy(&bits, elements, sizeof(bits));
  return bits;
}

template <typename E, typename A>
__device__ __forceinline__ void unpack(uint4 bits, A* values) {
  E elements[WIDTH<E>];
  memcpy(elements, &bits, sizeof(bits));
#pragma unroll
  for (int i = 0; i < WIDTH<E>; ++i) values[i] = static_cast<A>(elements[i]);
}

template <typename E, typename A>
__device__ __forceinline__ void store_packed(E* address, const A* values, bool aligned) {
  E elements[WIDTH<E>];
#pragma unroll
  for (int i = 0; i < WIDTH<E>; ++i) elements[i] = static_cast<E>(values[i]);
  if (aligned) {
    uint4 bits;
    memcpy(&bits, elements, sizeof(bits));
    store_16_bytes(address, bits);
    return;
  }
#pragma unroll
  for (int i = 0; i < WIDTH<E>; ++i) address[i] = elements[i];
}

// COUNT neighbouring columns of every input; what an operation does not read stays 0 and costs nothing.
template <typename A, int COUNT>
struct Values {
  A x[COUNT] = {};
  A v[COUNT] = {};
  A q[COUNT] = {};
};

// One row of every tensor of an operation.
template <typename Op>
struct Row {
  using T = typename Op::Element;
  const T* x;
  const T* v;
  const void* q;
  T* out;
  int64_t columns;
  int64_t body;  // chunks
  int head;      // edge elements before the body
  int edges;     // before and after

  __device__ __forceinline__ Row(const Rows<T>& rows, int64_t r) : columns(rows.columns) {
    x = rows.x + r * rows.x_stride;
    v = rows.v + r * rows.v_stride;
    const int64_t q_size = rows.q_wide ? sizeof(Accumulation<T>) : sizeof(T);
    q = static_cast<const char*>(rows.q) + r * rows.q_stride * q_size;
    out = rows.out + r * columns;
    const int past_boundary = static_cast<int>(reinterpret_cast<uintptr_t>(x) / sizeof(T)) & (WIDTH<T> - 1);
    const int to_boundary = -past_boundary & (WIDTH<T> - 1);
    head = columns < to_boundary ? static_cast<int>(columns) : to_boundary;
    body = (columns - head) / WIDTH<T>;
    edges = static_cast<int>(columns - body * WIDTH<T>);
  }

  __device__ __forceinline__ int64_t chunk_column(int64_t chunk) const { return head + chunk * WIDTH<T>; }
  __device__ __forceinline__ int64_t edge_column(int edge) const { return edge < head ? edge : columns - edges + edge; }
};

// A chunk of every input as it lies in memory: 16-bit elements stay packed, so that twice as many fit in registers.
struct Chunk {
  uint4 x, v, q[2];
};

template <typename Op>
__device__ __forceinline__ Chunk load_chunk(const Rows<typename Op::Element>& rows, const Row<Op>& row,
                                            int64_t column) {
  using T = typename Op::Element;
  using A = Accumulation<T>;
  Chunk chunk;
  chunk.x = load_16_bytes(row.x + column);
  if constexpr (Op::READS_V) chunk.v = load_packed(row.v + column, rows.v_aligned);
  if constexpr (Op::READS_Q) {
    if (std::is_same_v<T, A> || !rows.q_wide) {
      chunk.q[0] = load_packed(static_cast<const T*>(row.q) + column, rows.q_aligned);
    } else {
      const A* q = static_cast<const A*>(row.q) + column;
      chunk.q[0] = load_packed(q, rows.q_aligned);
      chunk.q[1] = load_packed(q + WIDTH<A>, rows.q_aligned);
    }
  }
  return chunk;
}

template <typename Op>
__device__ __forceinline__ Values<typename Op::A, WIDTH<typename Op::Element>> unpack_chunk(
    const Rows<typename Op::Element>& rows, const Chunk& chunk) {
  using T = typename Op::Element;
  using A = Accumulation<T>;
  Values<A, WIDTH<T>> values;
  unpack<T>(chunk.x, values.x);
  if constexpr (Op::READS_V) unpack<T>(chunk.v, values.v);
  if constexpr (Op::READS_Q) {
    if (std::is_same_v<T, A> || !rows.q_wide) {
      unpack<T>(chunk.q[0], values.q);
    } else if constexpr (!std::is_same_v<T, A>) {
      unpack<A>(chunk.q[0], values.q);
      unpack<A>(chunk.q[1], values.q + WIDTH<A>);
    }
  }
  return values;
}

template <typename Op>
__device__ __forceinline__ Values<typename Op::A, 1> load_element(const Rows<typename Op::Element>& rows,
                                                                  const Row<Op>& row, int64_t column) {
  using T = typename Op::Element;
  using A = Accumulation<T>;
  Values<A, 1> values;
  values.x[0] = static_cast<A>(row.x[column]);
  if constexpr (Op::READS_V) values.v[0] = static_cast<A>(row.v[column]);
  if constexpr (Op::READS_Q) {
    values.q[0] =
        rows.q_wide ? static_cast<const A*>(row.q)[column] : static_cast<A>(static_cast<const T*>(row.q)[column]);
  }
  return values;
}

}  // namespace rds_fast::cuda
