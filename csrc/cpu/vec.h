// Vectors of the accumulation dtype, by the compiler's vector extension: the same source serves every instruction set.
// Loads widen 16-bit values to float32, stores round to nearest even; nothing but registers is in between.
//
// Everything lies in the namespace of one capability (see kernels.h), or would be shared between differently compiled
// copies of a kernel.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <cstdint>
#include <cstring>

#include "../numerics.h"
#include "kernels.h"

#if defined(__AVX512F__)
#define RDS_FAST_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define RDS_FAST_VECTOR_BYTES 32
#else
#define RDS_FAST_VECTOR_BYTES 16
#endif

#define RDS_FAST_INLINE __attribute__((always_inline)) inline

namespace rds_fast::cpu::RDS_FAST_CAPABILITY {

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

// By storage type T: Acc<T> accumulates it, Vec<T> is a vector of Acc<T>, kLanes<T> its length.
template <typename T>
struct Traits {
  using Acc = float;
  using Bits = int32_t;
};
template <>
struct Traits<double> {
  using Acc = double;
  using Bits = int64_t;
};
template <typename T>
using Acc = typename Traits<T>::Acc;

typedef float FloatVec __attribute__((vector_size(RDS_FAST_VECTOR_BYTES)));
typedef double DoubleVec __attribute__((vector_size(RDS_FAST_VECTOR_BYTES)));
typedef int32_t IntVec __attribute__((vector_size(RDS_FAST_VECTOR_BYTES)));
typedef uint32_t UintVec __attribute__((vector_size(RDS_FAST_VECTOR_BYTES)));
typedef int64_t LongVec __attribute__((vector_size(RDS_FAST_VECTOR_BYTES)));
typedef uint16_t ShortVec __attribute__((vector_size(RDS_FAST_VECTOR_BYTES / 2)));

template <typename A>
struct VecOf;
template <>
struct VecOf<float> {
  using type = FloatVec;
  using bits = IntVec;
};
template <>
struct VecOf<double> {
  using type = DoubleVec;
  using bits = LongVec;
};
template <typename T>
using Vec = typename VecOf<Acc<T>>::type;
template <typename A>
using BitsVec = typename VecOf<A>::bits;
template <typename T>
constexpr int64_t kLanes = RDS_FAST_VECTOR_BYTES / sizeof(Acc<T>);

template <typename To, typename From>
RDS_FAST_INLINE To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

template <typename T>
RDS_FAST_INLINE Vec<T> splat(Acc<T> value) {
  return value - Vec<T>{};  // not + : −0 must stay −0
}

// Comparisons with NaN are false, so larger(x, NaN) is NaN and larger(NaN, x) is x: as the machine's maximum.
template <typename V>
RDS_FAST_INLINE V larger(V a, V b) {
  return a > b ? a : b;
}
template <typename V>
RDS_FAST_INLINE V smaller(V a, V b) {
  return a < b ? a : b;
}

RDS_FAST_INLINE FloatVec magnitudes(FloatVec x) { return bits_as<FloatVec>(bits_as<IntVec>(x) & 0x7fffffff); }
RDS_FAST_INLINE DoubleVec magnitudes(DoubleVec x) {
  return bits_as<DoubleVec>(bits_as<LongVec>(x) & 0x7fffffffffffffff);
}

// sizes ≥ 0 with the signs of x.
RDS_FAST_INLINE FloatVec with_sign(FloatVec sizes, FloatVec x) {
  return bits_as<FloatVec>(bits_as<IntVec>(sizes) | (bits_as<IntVec>(x) & INT32_MIN));
}
RDS_FAST_INLINE DoubleVec with_sign(DoubleVec sizes, DoubleVec x) {
  return bits_as<DoubleVec>(bits_as<LongVec>(sizes) | (bits_as<LongVec>(x) & INT64_MIN));
}

// Reductions over the lanes, in a fixed order.
template <typename T>
RDS_FAST_INLINE Acc<T> sum_of_lanes(Vec<T> v) {
  Acc<T> lanes[kLanes<T>];
  std::memcpy(lanes, &v, sizeof(v));
  for (int64_t width = kLanes<T> / 2; width > 0; width /= 2) {
    for (int64_t i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  }
  return lanes[0];
}
template <typename T>
RDS_FAST_INLINE Acc<T> largest_lane(Vec<T> v) {
  Acc<T> lanes[kLanes<T>];
  std::memcpy(lanes, &v, sizeof(v));
  for (int64_t width = kLanes<T> / 2; width > 0; width /= 2) {
    for (int64_t i = 0; i < width; ++i) lanes[i] = lanes[i] > lanes[i + width] ? lanes[i] : lanes[i + width];
  }
  return lanes[0];
}

// Whether a comparison holds in every lane. Its lanes are 0 or −1.
RDS_FAST_INLINE bool holds_everywhere(IntVec comparison) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask((__m512i)comparison) == 0xffff;
#elif defined(__AVX2__)
  return _mm256_movemask_epi8((__m256i)comparison) == -1;
#else
  bool holds = true;
  for (int64_t lane = 0; lane < kLanes<float>; ++lane) holds &= comparison[lane] != 0;
  return holds;
#endif
}
RDS_FAST_INLINE bool holds_everywhere(LongVec comparison) { return holds_everywhere(bits_as<IntVec>(comparison)); }

RDS_FAST_INLINE FloatVec load(const float* from) {
  FloatVec v;
  std::memcpy(&v, from, sizeof(v));
  return v;
}
RDS_FAST_INLINE DoubleVec load(const double* from) {
  DoubleVec v;
  std::memcpy(&v, from, sizeof(v));
  return v;
}
RDS_FAST_INLINE void store(float* to, FloatVec v) { std::memcpy(to, &v, sizeof(v)); }
RDS_FAST_INLINE void store(double* to, DoubleVec v) { std::memcpy(to, &v, sizeof(v)); }

RDS_FAST_INLINE FloatVec load(const BFloat16* from) {
  ShortVec halves;
  std::memcpy(&halves, from, sizeof(halves));
  return bits_as<FloatVec>(__builtin_convertvector(halves, UintVec) << 16);
}
RDS_FAST_INLINE void store(BFloat16* to, FloatVec v) {
  const UintVec bits = bits_as<UintVec>(v);
  const UintVec rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const ShortVec halves = __builtin_convertvector(v == v ? rounded : (bits >> 16) | 0x40, ShortVec);
  std::memcpy(to, &halves, sizeof(halves));
}

#if defined(__AVX512F__)
// The masked forms, with every lane chosen: GCC 12 warns of an uninitialised value within the plain ones.
RDS_FAST_INLINE FloatVec load(const Half* from) {
  return (FloatVec)_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
RDS_FAST_INLINE void store(Half* to, FloatVec v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                      _mm512_maskz_cvtps_ph(0xffff, (__m512)v, _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__F16C__)
RDS_FAST_INLINE FloatVec load(const Half* from) {
  return (FloatVec)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
RDS_FAST_INLINE void store(Half* to, FloatVec v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
}
#else
// A float16 shifted into float32's fields is too small by 2¹¹²; the multiplication mends subnormals too. Infinity and
// NaN have the largest exponent in either format.
RDS_FAST_INLINE FloatVec load(const Half* from) {
  ShortVec halves;
  std::memcpy(&halves, from, sizeof(halves));
  const UintVec bits = __builtin_convertvector(halves, UintVec);
  const UintVec shifted = (bits & 0x7fff) << 13;
  const UintVec finite = bits_as<UintVec>(bits_as<FloatVec>(shifted) * 0x1p112f);
  const UintVec size = (bits & 0x7c00) == 0x7c00 ? shifted | 0x7f800000 : finite;
  return bits_as<FloatVec>(size | ((bits & 0x8000) << 16));
}
// Normal results round by integer arithmetic on the shifted bits; subnormal ones by adding 0.5, whose last place is
// float16's smallest number; from 65520 on the result is infinite.
RDS_FAST_INLINE void store(Half* to, FloatVec v) {
  const UintVec bits = bits_as<UintVec>(v);
  const UintVec size = bits & 0x7fffffff;
  const UintVec normal = (size - (112u << 23) + 0xfff + ((size >> 13) & 1)) >> 13;
  const UintVec subnormal = bits_as<UintVec>(bits_as<FloatVec>(size) + 0.5f) - 0x3f000000;
  UintVec halves = size < (113u << 23) ? subnormal : normal;
  halves = size >= 0x477ff000 ? UintVec{} + 0x7c00 : halves;
  halves = size > 0x7f800000 ? UintVec{} + 0x7e00 : halves;
  const ShortVec packed = __builtin_convertvector(halves | ((bits >> 16) & 0x8000), ShortVec);
  std::memcpy(to, &packed, sizeof(packed));
}
#endif

// The first count lanes; the others are fill.
template <typename T>
RDS_FAST_INLINE Vec<T> load_part(const T* from, int64_t count, Acc<T> fill) {
#if defined(__AVX512F__)
  const uint32_t mask = (uint32_t(1) << count) - 1;
  if constexpr (sizeof(T) == 4) return (Vec<T>)_mm512_mask_loadu_ps((__m512)splat<T>(fill), mask, from);
  if constexpr (sizeof(T) == 8) return (Vec<T>)_mm512_mask_loadu_pd((__m512d)splat<T>(fill), mask, from);
  if constexpr (sizeof(T) == 2) {
    T values[kLanes<T>];
    store(values, splat<T>(fill));
    __m256i packed;
    std::memcpy(&packed, values, sizeof(packed));
    packed = _mm256_mask_loadu_epi16(packed, mask, from);
    std::memcpy(values, &packed, sizeof(packed));
    return load(values);
  }
#endif
  T values[kLanes<T>];
  store(values, splat<T>(fill));
  for (int64_t i = 0; i < count; ++i) values[i] = from[i];
  return load(values);
}
template <typename T>
RDS_FAST_INLINE void store_part(T* to, Vec<T> v, int64_t count) {
#if defined(__AVX512F__)
  const uint32_t mask = (uint32_t(1) << count) - 1;
  if constexpr (sizeof(T) == 4) return _mm512_mask_storeu_ps(to, mask, (__m512)v);
  if constexpr (sizeof(T) == 8) return _mm512_mask_storeu_pd(to, mask, (__m512d)v);
#endif
  T values[kLanes<T>];
  store(values, v);
  for (int64_t i = 0; i < count; ++i) to[i] = values[i];
}

template <typename T>
RDS_FAST_INLINE Acc<T> widen(T value) {
  return load_part(&value, 1, Acc<T>(0))[0];
}
template <>
RDS_FAST_INLINE float widen<float>(float value) {
  return value;
}
template <>
RDS_FAST_INLINE double widen<double>(double value) {
  return value;
}

}  // namespace rds_fast::cpu::RDS_FAST_CAPABILITY
