// How the values of a row are visited, and how rows are shared among threads.
//
// A row is reduced in chunks of a fixed length, merged in order, whether one thread has the whole row or several have
// its chunks: the result does not depend on the number of threads.
#pragma once

#include "vec.h"

namespace rds_fast::cpu::RDS_FAST_CAPABILITY {

constexpr int64_t kChunk = 16384;

// Where a vector is taken from a row, or put: all its lanes, or the first count, the rest being fill.
struct Whole {
  int64_t i;
  template <typename T>
  RDS_FAST_INLINE Vec<T> operator()(const T* row, Acc<T>) const {
    return load(row + i);
  }
  template <typename T>
  RDS_FAST_INLINE void set(T* row, Vec<T> v) const {
    store(row + i, v);
  }
};
struct Part {
  int64_t i;
  int64_t count;
  template <typename T>
  RDS_FAST_INLINE Vec<T> operator()(const T* row, Acc<T> fill) const {
    return load_part(row + i, count, fill);
  }
  template <typename T>
  RDS_FAST_INLINE void set(T* row, Vec<T> v) const {
    store_part(row + i, v, count);
  }
};

// visit(at, k) on the vectors of [begin, end); k counts 0, 1, 2, 3 cyclically, for independent accumulators.
template <typename T, typename Visit>
RDS_FAST_INLINE void for_vectors(int64_t begin, int64_t end, Visit visit) {
  constexpr int64_t L = kLanes<T>;
  int64_t i = begin;
  for (; i + 4 * L <= end; i += 4 * L) {
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) visit(Whole{i + k * L}, k);
  }
  for (; i + L <= end; i += L) visit(Whole{i}, 0);
  if (i < end) visit(Part{i, end - i}, 0);
}

template <typename T>
RDS_FAST_INLINE Vec<T> sum_of_four(const Vec<T> (&sums)[4]) {
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// A store that does not bring the line into the cache: a large result is gone from the cache before it is read again,
// and a line that is overwritten whole need not be fetched first. The address must be a multiple of the vector's size
// in T.
template <typename T>
RDS_FAST_INLINE void stream(T* to, Vec<T> v) {
  T values[kLanes<T>];
  store(values, v);
#if defined(__AVX512F__)
  if constexpr (sizeof(values) == 64) {
    return _mm512_stream_si512(reinterpret_cast<__m512i*>(to), _mm512_loadu_si512(values));
  }
#endif
#if defined(__AVX2__)
  if constexpr (sizeof(values) == 32) {
    return _mm256_stream_si256(reinterpret_cast<__m256i*>(to),
                               _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values)));
  }
#endif
#if defined(__x86_64__)
  if constexpr (sizeof(values) == 16) {
    return _mm_stream_si128(reinterpret_cast<__m128i*>(to), _mm_loadu_si128(reinterpret_cast<const __m128i*>(values)));
  }
#endif
  std::memcpy(to, values, sizeof(values));
}

// Streamed stores are seen by other threads after this.
RDS_FAST_INLINE void finish_streams() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// Results of this size or more do not fit in a cache beside their inputs.
constexpr int64_t kStreamedBytes = int64_t(8) << 20;

template <typename T>
RDS_FAST_INLINE bool is_streamed(const Shape& shape) {
  return shape.rows * shape.columns * int64_t(sizeof(T)) >= kStreamedBytes;
}

// out[i] = compute(at) on [begin, end).
template <typename T, typename Compute>
RDS_FAST_INLINE void write_values(T* out, int64_t begin, int64_t end, bool streamed, Compute compute) {
  constexpr int64_t L = kLanes<T>;
  int64_t i = begin;
  if (streamed) {
    const int64_t misaligned = reinterpret_cast<uintptr_t>(out + i) / sizeof(T) % L;
    const int64_t head = misaligned == 0 ? 0 : L - misaligned;
    if (head > 0 && i + head <= end) {
      store_part(out + i, compute(Part{i, head}), head);
      i += head;
    }
    if (reinterpret_cast<uintptr_t>(out + i) / sizeof(T) % L == 0) {
      for (; i + L <= end; i += L) stream(out + i, compute(Whole{i}));
    }
  }
  for (; i + L <= end; i += L) store(out + i, compute(Whole{i}));
  if (i < end) store_part(out + i, compute(Part{i, end - i}), end - i);
}

template <typename Body>
void parallel(int64_t count, int64_t grain, const Body& body) {
  parallel_for(
      count, grain, [](int64_t begin, int64_t end, void* context) { (*static_cast<const Body*>(context))(begin, end); },
      const_cast<Body*>(&body));
}

// The least work worth another thread, in values.
constexpr int64_t kGrain = 16384;

RDS_FAST_INLINE int64_t row_grain(int64_t columns) { return columns >= kGrain ? 1 : (kGrain + columns - 1) / columns; }

// write(row, begin, end) for every chunk of every row.
template <typename Write>
void for_chunks(const Shape& shape, const Write& write) {
  const int64_t chunks = (shape.columns + kChunk - 1) / kChunk;
  parallel(shape.rows * chunks, row_grain(shape.columns < kChunk ? shape.columns : kChunk),
           [&](int64_t first, int64_t last) {
             for (int64_t unit = first; unit < last; ++unit) {
               const int64_t begin = unit % chunks * kChunk;
               write(unit / chunks, begin, begin + kChunk < shape.columns ? begin + kChunk : shape.columns);
             }
             finish_streams();
           });
}

// For every row: total = reduce(row, begin, end) merged over its chunks, then finish(row, total), then
// write(row, begin, end, total) on its chunks. Merging is merge(total, partial).
template <typename Partial, typename Reduce, typename Merge, typename Finish, typename Write>
void reduce_rows(const Shape& shape, const Reduce& reduce, const Merge& merge, const Finish& finish,
                 const Write& write) {
  const int64_t columns = shape.columns;
  const int64_t chunks = (columns + kChunk - 1) / kChunk;
  const auto end_of = [&](int64_t chunk) { return (chunk + 1) * kChunk < columns ? (chunk + 1) * kChunk : columns; };
  if (chunks == 1 || shape.rows >= 4 * thread_count()) {
    parallel(shape.rows, row_grain(columns), [&](int64_t first, int64_t last) {
      for (int64_t row = first; row < last; ++row) {
        Partial total = reduce(row, int64_t(0), end_of(0));
        for (int64_t chunk = 1; chunk < chunks; ++chunk) merge(total, reduce(row, chunk * kChunk, end_of(chunk)));
        finish(row, total);
        // Backwards: what was read last is still in the cache.
        for (int64_t chunk = chunks - 1; chunk >= 0; --chunk) write(row, chunk * kChunk, end_of(chunk), total);
      }
      finish_streams();
    });
    return;
  }
  Partial* const partials = new Partial[shape.rows * chunks];
  for_chunks(shape, [&](int64_t row, int64_t begin, int64_t end) {
    partials[row * chunks + begin / kChunk] = reduce(row, begin, end);
  });
  for (int64_t row = 0; row < shape.rows; ++row) {
    Partial& total = partials[row * chunks];
    for (int64_t chunk = 1; chunk < chunks; ++chunk) merge(total, partials[row * chunks + chunk]);
    finish(row, total);
  }
  for_chunks(shape, [&](int64_t row, int64_t begin, int64_t end) { write(row, begin, end, partials[row * chunks]); });
  delete[] partials;
}

template <typename T>
RDS_FAST_INLINE const T* row_of(Rows rows, int64_t row) {
  return static_cast<const T*>(rows.data) + row * rows.stride;
}
template <typename T>
RDS_FAST_INLINE Acc<T> value_of(Values values, int64_t row) {
  const int64_t i = row * values.stride;
  return values.accumulated ? static_cast<const Acc<T>*>(values.data)[i] : widen(static_cast<const T*>(values.data)[i]);
}
template <typename T>
RDS_FAST_INLINE void set_result(Results results, int64_t row, Acc<T> value) {
  if (results.accumulated) {
    static_cast<Acc<T>*>(results.data)[row] = value;
  } else {
    store_part(static_cast<T*>(results.data) + row, splat<T>(value), 1);
  }
}

// call(T()) with the storage type of a dtype.
template <typename Call>
RDS_FAST_INLINE void with_dtype(Dtype dtype, const Call& call) {
  switch (dtype) {
    case Dtype::float64:
      return call(double());
    case Dtype::float32:
      return call(float());
    case Dtype::bfloat16:
      return call(BFloat16());
    case Dtype::float16:
      return call(Half());
  }
}

}  // namespace rds_fast::cpu::RDS_FAST_CAPABILITY
