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

// The same back, each rounded once.
[[gnu::always_inline]] inline void store_eight(void* values, Dtype dtype, int64_t i, __m256 x) {
  if (dtype == Dtype::kFloat32) return _mm256_storeu_ps(static_cast<float*>(values) + i, x);
  auto* const to = reinterpret_cast<__m128i*>(static_cast<uint16_t*>(values) + i);
  if (dtype == Dtype::kFloat16) {
    return _mm_storeu_si128(to, _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i bias = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF));
  const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, bias), 16);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  const __m256i result = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7FC0), nan);
  _mm_storeu_si128(
      to, _mm_packus_epi32(_mm256_castsi256_si128(result), _mm256_extracti128_si256(result, 1)));
}

}  // namespace
}  // namespace micromix::cpu::avx2
