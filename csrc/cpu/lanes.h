// Vectors of numbers, as wide as those of the instruction set that the including file is built for:
// the compiler makes poor code of wider ones. Written out where AVX-512 or AVX2 does with fewer
// instructions what the compiler makes of it.
#pragma once

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include <cstring>

#include "convert.h"

namespace micromix::cpu {
namespace {

#if defined(__AVX512BW__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
constexpr int kSums = 16;  // a row's numbers are summed up in so many lanes, whatever kLanes is
constexpr int kParts = kSums / kLanes;
typedef float Lanes __attribute__((vector_size(kLanes * sizeof(float))));
typedef uint32_t Words __attribute__((vector_size(kLanes * sizeof(float))));
typedef uint16_t Halves __attribute__((vector_size(kLanes * sizeof(uint16_t))));

[[gnu::always_inline]] inline Lanes load_floats(const float* from, int lanes) {
  Lanes v{};
  std::memcpy(&v, from, lanes * sizeof(float));
  return v;
}

// A NaN loses its payload in float16, as in float_to_float16; conversions from it make it quiet.
// The instructions look at no flag of the thread: its wish for zeros in place of subnormal numbers
// is about float32.
#if defined(__AVX512BW__)
[[gnu::always_inline]] inline Lanes from_float16(Halves bits) {
  return (Lanes)_mm512_cvtph_ps((__m256i)bits);
}

[[gnu::always_inline]] inline Halves to_float16(Lanes v) {
  const __m512i sign = _mm512_and_si512((__m512i)v, _mm512_set1_epi32(INT32_MIN));
  const __mmask16 nan = _mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_UNORD_Q);
  const __m512i number = _mm512_mask_or_epi32((__m512i)v, nan, sign, _mm512_set1_epi32(0x7FC00000));
  return (Halves)_mm512_cvtps_ph((__m512)number, _MM_FROUND_TO_NEAREST_INT);
}
#elif defined(__AVX2__)
[[gnu::always_inline]] inline Lanes from_float16(Halves bits) {
  return (Lanes)_mm256_cvtph_ps((__m128i)bits);
}

[[gnu::always_inline]] inline Halves to_float16(Lanes v) {
  const Words nan = ((Words)v & 0x80000000u) | 0x7FC00000u;
  const Lanes number = v == v ? v : (Lanes)nan;
  return (Halves)_mm256_cvtps_ph((__m256)number, _MM_FROUND_TO_NEAREST_INT);
}
#else
// Apart from the others, whose vectors stay in registers.
[[gnu::noinline]] Lanes from_float16(Halves bits) {
  Lanes v;
  for (int j = 0; j < kLanes; ++j) v[j] = float16_to_float(bits[j]);
  return v;
}

[[gnu::noinline]] Halves to_float16(Lanes v) {
  Halves bits;
  for (int j = 0; j < kLanes; ++j) bits[j] = float_to_float16(v[j]);
  return bits;
}
#endif

#if defined(__AVX512BW__)
[[gnu::always_inline]] inline __mmask16 first_lanes(int lanes) {
  return static_cast<__mmask16>((1u << lanes) - 1);
}

[[gnu::always_inline]] inline Lanes load_bfloat16(const uint16_t* from, int lanes) {
  const __m256i bits = _mm256_maskz_loadu_epi16(first_lanes(lanes), from);
  return (Lanes)_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16);
}

[[gnu::always_inline]] inline void store_bfloat16(Lanes v, uint16_t* to, int lanes) {
  // The high half of each word.
  const __m512i halves = _mm512_castsi256_si512(
      _mm256_setr_epi16(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31));
  const __m512i bits = _mm512_permutexvar_epi16(halves, (__m512i)v);
  _mm256_mask_storeu_epi16(to, first_lanes(lanes), _mm512_castsi512_si256(bits));
}

[[gnu::always_inline]] inline Lanes rounded_to_bfloat16(Lanes v) {
  const __m512i bits = (__m512i)v;
  const __mmask16 odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000));
  const __mmask16 number = _mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_ORD_Q);
  const __m512i sum = _mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF));
  const __m512i up = _mm512_mask_add_epi32(sum, odd, sum, _mm512_set1_epi32(1));
  return (Lanes)_mm512_mask_and_epi32(_mm512_set1_epi32(0x7FC00000), number, up,
                                      _mm512_set1_epi32(static_cast<int32_t>(0xFFFF0000)));
}

// NaN stays NaN.
[[gnu::always_inline]] inline Lanes clamped(Lanes v, float least, float most) {
  const __m512 high = _mm512_max_ps(_mm512_set1_ps(least), (__m512)v);
  return (Lanes)_mm512_min_ps(_mm512_set1_ps(most), high);
}
#else
[[gnu::always_inline]] inline Lanes load_bfloat16(const uint16_t* from, int lanes) {
#if defined(__AVX2__)
  if (lanes == kLanes) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return (Lanes)_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16);
  }
#endif
  Halves bits{};
  std::memcpy(&bits, from, lanes * sizeof(uint16_t));
  return (Lanes)(__builtin_convertvector(bits, Words) << 16);
}

[[gnu::always_inline]] inline void store_bfloat16(Lanes v, uint16_t* to, int lanes) {
  const Halves bits = __builtin_convertvector((Words)v >> 16, Halves);
  std::memcpy(to, &bits, lanes * sizeof(uint16_t));
}

[[gnu::always_inline]] inline Lanes rounded_to_bfloat16(Lanes v) {
  const Words bits = (Words)v;
  const Words up = (bits + 0x7FFFu + ((bits >> 16) & 1u)) & 0xFFFF0000u;
  return (Lanes)(v == v ? up : Words{} + 0x7FC00000u);
}

// NaN stays NaN.
[[gnu::always_inline]] inline Lanes clamped(Lanes v, float least, float most) {
  v = v < least ? least : v;
  return v > most ? most : v;
}
#endif

// Numbers of a row; lanes beyond its end are zero.
[[gnu::always_inline]] inline Lanes load(const void* from, Dtype dtype, int64_t at, int lanes) {
  if (dtype == Dtype::kFloat32) return load_floats(static_cast<const float*>(from) + at, lanes);
  const uint16_t* const halves = static_cast<const uint16_t*>(from) + at;
  if (dtype == Dtype::kBFloat16) return load_bfloat16(halves, lanes);
  Halves bits{};
  std::memcpy(&bits, halves, lanes * sizeof(uint16_t));
  return from_float16(bits);
}

// Stores numbers that are of `dtype` already.
[[gnu::always_inline]] inline void store(Lanes v, void* to, Dtype dtype, int64_t at, int lanes) {
  if (dtype == Dtype::kFloat32) {
    std::memcpy(static_cast<float*>(to) + at, &v, lanes * sizeof(float));
    return;
  }
  uint16_t* const halves = static_cast<uint16_t*>(to) + at;
  if (dtype == Dtype::kBFloat16) return store_bfloat16(v, halves, lanes);
  const Halves bits = to_float16(v);
  std::memcpy(halves, &bits, lanes * sizeof(uint16_t));
}

[[gnu::always_inline]] inline Lanes rounded(Lanes v, Dtype dtype) {
  if (dtype == Dtype::kBFloat16) return rounded_to_bfloat16(v);
  if (dtype == Dtype::kFloat16) return from_float16(to_float16(v));
  return v;
}

struct Sums {
  Lanes parts[kParts] = {};
};

[[gnu::always_inline]] inline float total(const Sums& sums) {
  float lanes[kSums];
  std::memcpy(lanes, sums.parts, sizeof lanes);
  for (int width = kSums / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}

}  // namespace
}  // namespace micromix::cpu
