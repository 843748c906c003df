// What the AVX2 kernels share. Included only by files that are compiled for AVX2, FMA and F16C;
// everything is always inlined or local to the file.
#pragma once

#include <immintrin.h>

#include "convert.h"

namespace micromix::cpu::avx2 {
namespace {

[[gnu::always_inline]] inline __m256i load(const void* p) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(p));
}

// Eight values of any type as float32.
[[gnu::always_inline]] inline __m256 load_floats(const void* values, Dtype dtype, int64_t i) {
  if (dtype == Dtype::kFloat32) return _mm256_loadu_ps(static_cast<const float*>(values) + i);
  const __m128i half =
      _mm_loadu_si128(reinterpret_cast<const __m128i*>(static_cast<const uint16_t*>(values) + i));
  if (dtype == Dtype::kFloat16) return _mm256_cvtph_ps(half);
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

}  // namespace
}  // namespace micromix::cpu::avx2
