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

// The same 16 bytes, element by element.
template <typename E>
__device__ __forceinline__ uint4 load_elements(const E* address) {
  E elements[WIDTH<E>];
#pragma unroll
  for (int i = 0; i < WIDTH<E>; ++i) elements[i] = address[i];
  uint4 bits;
  memcpy(&bits, elements, sizeof(bits));
  return bits;
}

template <typename E, typename A>
__device__ __forceinline__ void unpack(uint4 bits, A* values) {
  if constexpr (std::is_same_v<E, c10::BFloat16>) {  // the upper half of a float32: one instruction each
    const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t low = words[i] << 16;
      const uint32_t high = words[i] & 0xffff0000u;
      memcpy(values + 2 * i, &low, sizeof(low));
      memcpy(values + 2 * i + 1, &high, sizeof(high));
    }
  } else {
    E elements[WIDTH<E>];
    memcpy(elements, &bits, sizeof(bits));
#pragma unroll
    for (int i = 0; i < WIDTH<E>; ++i) values[i] = static_cast<A>(elements[i]);
  }
}

// Instructions for two 16-bit numbers in one word came with sm_80. A GPU older than that, for which the kernels are
// built where it is the one present, takes the numbers one by one.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
#define RDS_FAST_PAIRED_INSTRUCTIONS
#endif

// Two numbers in one word, rounded to nearest.
template <typename E>
__device__ __forceinline__ uint32_t pack_pair(float first, float second) {
  static_assert(sizeof(E) == 2);
  uint32_t word;
#ifdef RDS_FAST_PAIRED_INSTRUCTIONS
  if constexpr (std::is_same_v<E, c10::BFloat16>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
  }
#else
  const E elements[2] = {static_cast<E>(first), static_cast<E>(second)};
  memcpy(&word, elements, sizeof(word));
#endif
  return word;
}

template <typename E, typename A>
__device__ __forceinline__ uint4 pack(const A* values) {
  uint4 bits;
  if constexpr (sizeof(E) == 2) {
    bits = {pack_pair<E>(values[0], values[1]), pack_pair<E>(values[2], values[3]), pack_pair<E>(values[4], values[5]),
            pack_pair<E>(values[6], values[7])};
  } else {
    memcpy(&bits, values, sizeof(bits));
  }
  return bits;
}

template <typename E, typename A>
__device__ __forceinline__ void store_packed(E* address, const A* values, bool aligned) {
  const uint4 bits = pack<E>(values);
  if (aligned) {
    store_16_bytes(address, bits);
    return;
  }
  E elements[WIDTH<E>];
  memcpy(elements, &bits, sizeof(bits));
#pragma unroll
  for (int i = 0; i < WIDTH<E>; ++i) address[i] = elements[i];
}

__device__ __forceinline__ float larger_of(float a, float b) { return fmaxf(a, b); }  // of a NaN and b: b
__device__ __forceinline__ double larger_of(double a, double b) { return fmax(a, b); }

// The larger in each half of two words of a 16-bit type; of a NaN and b: b.
template <typename T>
__device__ __forceinline__ uint32_t larger_pair(uint32_t a, uint32_t b) {
  uint32_t result;
#ifdef RDS_FAST_PAIRED_INSTRUCTIONS
  if constexpr (std::is_same_v<T, c10::BFloat16>) {
    asm("max.bf16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
  } else {
    asm("max.f16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
  }
#else
  T first[2], second[2];
  memcpy(first, &a, sizeof(a));
  memcpy(second, &b, sizeof(b));
  for (int i = 0; i < 2; ++i)
    first[i] = static_cast<T>(larger_of(static_cast<float>(first[i]), static_cast<float>(second[i])));
  memcpy(&result, first, sizeof(result));
#endif
  return result;
}

// The largest of many elements, or (MAGNITUDE) of their magnitudes, taken in 16 bytes at a time: two of a 16-bit type
// by one instruction. A NaN counts as nothing; of no elements it is −inf, or 0.
template <typename T, bool MAGNITUDE>
class Largest {
  using A = Accumulation<T>;
  static constexpr bool PAIRS = sizeof(T) == 2;
  static constexpr uint32_t LEAST_PAIR = std::is_same_v<T, c10::BFloat16> ? 0xff80ff80u : 0xfc00fc00u;  // −inf, −inf
  using Kept = std::conditional_t<PAIRS, uint32_t, A>;

 public:
  __device__ __forceinline__ Largest() {
    if constexpr (PAIRS) {
      kept_ = MAGNITUDE ? 0 : LEAST_PAIR;
    } else {
      kept_ = MAGNITUDE ? A(0) : -static_cast<A>(INFINITY);
    }
  }

  static __device__ __forceinline__ A of(A value) { return MAGNITUDE ? magnitude(value) : value; }

  __device__ __forceinline__ void take(uint4 bits) {
    if constexpr (PAIRS) {
      const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) kept_ = larger_pair<T>(MAGNITUDE ? words[i] & 0x7fff7fffu : words[i], kept_);
    } else {
      A values[WIDTH<T>];
      unpack<T>(bits, values);
#pragma unroll
      for (int i = 0; i < WIDTH<T>; ++i) kept_ = larger_of(of(values[i]), kept_);
    }
  }

  __device__ __forceinline__ A value() const {
    if constexpr (PAIRS) {
      T pair[2];
      memcpy(pair, &kept_, sizeof(kept_));
      return larger_of(static_cast<A>(pair[0]), static_cast<A>(pair[1]));
    } else {
      return kept_;
    }
  }

 private:
  Kept kept_;
};

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

// Loads the chunks base, base + LANES, … below last of one input. One branch for all of them, so that the loads of a
// batch are under way together.
template <int LANES, int COUNT, typename E, typename Index, typename Put>
__device__ __forceinline__ void load_input(const E* first_chunk, int64_t elements_per_chunk, bool aligned, Index base,
                                           Index last, Put put) {
  const auto load_each = [&](auto load) {
#pragma unroll
    for (int u = 0; u < COUNT; ++u) {
      if (base + u * LANES < last) put(u, load(first_chunk + (base + u * LANES) * elements_per_chunk));
    }
  };
  if (aligned) {
    load_each([](const E* address) { return load_16_bytes(address); });
  } else {
    load_each([](const E* address) { return load_elements(address); });
  }
}

// Loads the chunks base, base + LANES, … below last of every input, COUNT at most.
template <typename Op, int LANES, int COUNT, typename Index>
__device__ __forceinline__ void load_chunks(const Rows<typename Op::Element>& rows, const Row<Op>& row, Index base,
                                            Index last, Chunk (&chunks)[COUNT]) {
  using T = typename Op::Element;
  using A = Accumulation<T>;
  constexpr int64_t W = WIDTH<T>;
  load_input<LANES, COUNT>(row.x + row.head, W, true, base, last, [&](int u, uint4 bits) { chunks[u].x = bits; });
  if constexpr (Op::READS_V) {
    load_input<LANES, COUNT>(row.v + row.head, W, rows.v_aligned, base, last,
                             [&](int u, uint4 bits) { chunks[u].v = bits; });
  }
  if constexpr (Op::READS_Q) {
    if (std::is_same_v<T, A> || !rows.q_wide) {
      load_input<LANES, COUNT>(static_cast<const T*>(row.q) + row.head, W, rows.q_aligned, base, last,
                               [&](int u, uint4 bits) { chunks[u].q[0] = bits; });
    } else {
      const A* q = static_cast<const A*>(row.q) + row.head;
      load_input<LANES, COUNT>(q, W, rows.q_aligned, base, last, [&](int u, uint4 bits) { chunks[u].q[0] = bits; });
      load_input<LANES, COUNT>(q + WIDTH<A>, W, rows.q_aligned, base, last,
                               [&](int u, uint4 bits) { chunks[u].q[1] = bits; });
    }
  }
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
