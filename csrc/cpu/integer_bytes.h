// E2M1 (x2) and E2M3 (x8) elements as bytes, for dot products of unsigned bytes of the weight with
// signed ones of the activations. Included only by files that are compiled for AVX-512.
#pragma once

#include "avx512.h"

namespace micromix::cpu::avx512 {
namespace {

// What bytes of a weight have added.
constexpr int integer_offset(mx::ElementFormat f) { return f == mx::E2M1 ? 12 : 64; }

// By the bits of a code.
template <int kBits>
constexpr mx::ElementFormat kSmallInteger = kBits == 4 ? mx::E2M1 : mx::E2M3;
template <int kBits>
constexpr Table<int8_t> kIntegerBytes =
    byte_table(kSmallInteger<kBits>, mx::integer_factor(kSmallInteger<kBits>), 0);
template <int kBits>
constexpr Table<int8_t> kOffsetBytes =
    byte_table(kSmallInteger<kBits>, mx::integer_factor(kSmallInteger<kBits>),
               integer_offset(kSmallInteger<kBits>));

// The signed bytes of a block of activations.
template <int kBits>
[[gnu::always_inline]] inline __m256i integer_bytes(const uint8_t* packed) {
  const __m512i codes = _mm512_castsi256_si512(unpack<kBits>(packed));
  return _mm512_castsi512_si256(_mm512_permutexvar_epi8(codes, load(&kIntegerBytes<kBits>)));
}

// What the sum of their products with a weight starts at, so that the offset goes.
[[gnu::always_inline]] inline int32_t integer_start(__m256i bytes, mx::ElementFormat weight) {
  const __m256i offset = _mm256_set1_epi8(static_cast<int8_t>(integer_offset(weight)));
  const __m256i sums = _mm256_dpbusd_epi32(_mm256_setzero_si256(), offset, bytes);
  return -_mm512_reduce_add_epi32(_mm512_zextsi256_si512(sums));
}

// The bytes of a 4- or 6-bit tile: 8 vectors of 16 rows x 4 channels.
template <int kBits>
[[gnu::always_inline]] inline void decode_bytes(const uint8_t* tile, __m512i* w) {
  const __m512i table = load(&kOffsetBytes<kBits>), low_bits = _mm512_set1_epi8(0xF);
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m512i line = load(tile + j * kLine);
    __m512i first = line, second = _mm512_srli_epi16(line, 4);
    if constexpr (kBits == 6) {
      const __m512i high = load(tile + (4 + j / 2) * kLine);
      const __m512i a = j % 2 ? high : _mm512_slli_epi16(high, 4);
      const __m512i b = j % 2 ? _mm512_srli_epi16(high, 2) : _mm512_slli_epi16(high, 2);
      first = _mm512_ternarylogic_epi64(low_bits, first, a, 0xCA);  // low_bits ? first : a
      second = _mm512_ternarylogic_epi64(low_bits, second, b, 0xCA);
    }
    w[2 * j] = _mm512_permutexvar_epi8(first, table);
    w[2 * j + 1] = _mm512_permutexvar_epi8(second, table);
  }
}

}  // namespace
}  // namespace micromix::cpu::avx512
