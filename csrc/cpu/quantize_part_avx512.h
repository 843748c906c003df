// A part of a row, on AVX-512 with VBMI: up to 32 blocks of one segment, which stay in L1. What all
// of them need, and codes of float32 numbers, the even channels of a block in one vector and the
// odd ones in another. Included only by files that are compiled for AVX-512; everything is always
// inlined or local to the file.
#pragma once

#include "avx512.h"

namespace micromix::cpu::avx512 {
namespace {

constexpr int kPart = 32;  // blocks
constexpr int64_t kPartChannels = kPart * mx::kBlock;

// A part of one row.
struct Part {
  mx::ScaleRule rule;
  int64_t blocks;
  const uint8_t* next;  // what to fetch,
  int64_t next_bytes;   // so much for each block
  uint8_t* data;
  uint8_t* scales;
};

// Lanes of the vector at channel `first` that lie before channel k.
[[gnu::always_inline]] inline __mmask16 lanes_before(int64_t first, int64_t k) {
  const int64_t left = k - first;
  return left >= 16 ? 0xFFFF : left <= 0 ? 0 : static_cast<__mmask16>((1u << left) - 1);
}

// The same of a vector of 32.
[[gnu::always_inline]] inline __mmask32 words_before(int64_t first, int64_t k) {
  const int64_t left = k - first;
  return left >= 32 ? 0xFFFFFFFF : left <= 0 ? 0 : (1u << left) - 1;
}

struct Pair {
  __m512 even, odd;
};

// A vector with the low half of each word of `low` and the high half of `high`.
[[gnu::always_inline]] inline __m512i halves(__m512i low, __m512i high) {
  const __m512i mask = _mm512_set1_epi32(static_cast<int32_t>(0xFFFF0000));
  return _mm512_ternarylogic_epi64(mask, high, low, 0xCA);
}

[[gnu::always_inline]] inline Pair split(__m512 low, __m512 high) {
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odd = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
  return {_mm512_permutex2var_ps(low, even, high), _mm512_permutex2var_ps(low, odd, high)};
}

// The values of 32 channels from `at` on; those beyond channel k are zero.
template <Dtype kDtype>
[[gnu::always_inline]] inline Pair load_block(const void* row, int64_t at, int64_t k) {
  if constexpr (kDtype == Dtype::kBFloat16) {
    const __m512i words =
        _mm512_maskz_loadu_epi16(words_before(at, k), static_cast<const uint16_t*>(row) + at);
    const __m512i high = _mm512_set1_epi32(static_cast<int32_t>(0xFFFF0000));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(words, 16)),
            _mm512_castsi512_ps(_mm512_and_si512(words, high))};
  }
  return split(load_floats(row, kDtype, at, lanes_before(at, k)),
               load_floats(row, kDtype, at + 16, lanes_before(at + 16, k)));
}

// Lane i of the result is the largest lane of x(i), for i below `count`.
template <typename F>
[[gnu::always_inline]] inline __m512i largest_lanes(int64_t count, const F& x) {
  __m512i quads[4];
#pragma GCC unroll 4
  for (int q = 0; q < 4; ++q) {
    quads[q] = _mm512_setzero_si512();
    if (4 * q >= count) continue;
    const auto pair = [&](int i) __attribute__((always_inline)) {
      const __m512i first = x(i), second = i + 1 < count ? x(i + 1) : first;
      return _mm512_max_epu32(_mm512_unpacklo_epi32(first, second),
                              _mm512_unpackhi_epi32(first, second));
    };
    const __m512i a = pair(4 * q), b = 4 * q + 2 < count ? pair(4 * q + 2) : a;
    quads[q] = _mm512_max_epu32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
  }
  const auto join = [](__m512i a, __m512i b) __attribute__((always_inline)) {
    return _mm512_max_epu32(_mm512_shuffle_i64x2(a, b, 0x88), _mm512_shuffle_i64x2(a, b, 0xDD));
  };
  return join(join(quads[0], quads[1]), join(quads[2], quads[3]));
}

// What encoding needs of each block.
struct Terms {
  alignas(kLine) uint32_t amax[kPart];  // the bits
  alignas(kLine) uint32_t term[kPart];
};

// mx::scale_byte of a part's blocks, and of each the term that `term_of` makes of the scale bytes
// and amax of 16. Returns the blocks that hold NaN or Inf; their terms are of no use.
template <mx::ElementFormat kFormat, typename F>
[[gnu::always_inline]] inline uint32_t find_scales(const Part& part, Terms& terms,
                                                   const F& term_of) {
  const __m512i increment = _mm512_set1_epi32(mx::scale_increment(kFormat, part.rule));
  uint32_t nans = 0;
  for (int64_t b = 0; b < part.blocks; b += 16) {
    const __mmask16 mask = lanes_before(b, part.blocks);
    const __m512i amax = _mm512_load_si512(terms.amax + b);
    const __m512i exponent =
        _mm512_srli_epi32(_mm512_add_epi32(amax, increment), mx::kFloat32MantissaBits);
    __m512i scale = _mm512_max_epi32(_mm512_sub_epi32(exponent, _mm512_set1_epi32(kFormat.emax)),
                                     _mm512_setzero_si512());
    const __mmask16 nan =
        _mm512_mask_cmpge_epu32_mask(mask, amax, _mm512_set1_epi32(mx::kFloat32Exponent));
    scale = _mm512_mask_mov_epi32(scale, nan, _mm512_set1_epi32(mx::kNanScale));
    _mm512_mask_cvtepi32_storeu_epi8(part.scales + b, mask, scale);
    _mm512_store_si512(terms.term + b, term_of(scale, amax));
    nans |= static_cast<uint32_t>(nan) << b;
  }
  return nans;
}

// mx::inverse_scale.
[[gnu::always_inline]] inline __m512i inverse_scales(__m512i scale) {
  return _mm512_slli_epi32(_mm512_sub_epi32(_mm512_set1_epi32(254), scale),
                           mx::kFloat32MantissaBits);
}

// mx::encode, 16 at a time: one code per 32-bit lane. The terms that encode subtracts from the sum
// have nothing in the bits of a code but a constant, which `anchor` brings along.
template <mx::ElementFormat kFormat>
[[gnu::always_inline]] inline __m512i encode(__m512 x) {
  constexpr int kDropped = mx::kFloat32MantissaBits - kFormat.mantissa_bits;
  constexpr int kSmallestExponent = 1 - kFormat.bias + mx::kFloat32Bias;
  constexpr int kMagnitudeMask = (1 << (kFormat.bits - 1)) - 1;
  constexpr int kOffset =
      -((kDropped + kSmallestExponent) << kFormat.mantissa_bits) & kMagnitudeMask;
  static_assert(kOffset % 2 == 0, "an odd offset would turn ties to odd");
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i magnitude =
      _mm512_min_epu32(_mm512_and_si512(bits, _mm512_set1_epi32(mx::kFloat32Magnitude)),
                       _mm512_set1_epi32(kFormat.largest_bits));
  const __m512i exponent =
      _mm512_max_epu32(_mm512_and_si512(magnitude, _mm512_set1_epi32(mx::kFloat32Exponent)),
                       _mm512_set1_epi32(kSmallestExponent << mx::kFloat32MantissaBits));
  const __m512i anchor = _mm512_add_epi32(
      exponent, _mm512_set1_epi32((kDropped << mx::kFloat32MantissaBits) + kOffset));
  const __m512 sum = _mm512_add_ps(_mm512_castsi512_ps(magnitude), _mm512_castsi512_ps(anchor));
  const __m512i code =
      _mm512_add_epi32(_mm512_castps_si512(sum), _mm512_srli_epi32(anchor, kDropped));
  // The low bits of the code under the sign.
  return _mm512_ternarylogic_epi32(_mm512_set1_epi32(kMagnitudeMask), code,
                                   _mm512_srli_epi32(bits, 32 - kFormat.bits), 0xCA);
}

// Stores the codes of a block, packed.
template <int kBits>
[[gnu::always_inline]] inline void pack(__m512i even, __m512i odd, uint8_t* packed) {
  const __m512i pairs = _mm512_or_si512(even, _mm512_slli_epi32(odd, kBits));
  if constexpr (kBits == 4) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(packed), _mm512_cvtepi32_epi8(pairs));
  } else if constexpr (kBits == 8) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(packed), _mm512_cvtepi32_epi16(pairs));
  } else {
    // Three bytes of each 64 bits.
    const __m512i bytes = _mm512_castsi256_si512(
        _mm256_setr_epi8(0, 1, 2, 8, 9, 10, 16, 17, 18, 24, 25, 26, 32, 33, 34, 40, 41, 42, 48, 49,
                         50, 56, 57, 58, 0, 0, 0, 0, 0, 0, 0, 0));
    const __m512i fours = _mm512_or_si512(pairs, _mm512_srli_epi64(pairs, 20));
    const __m256i result = _mm512_castsi512_si256(_mm512_permutexvar_epi8(bytes, fours));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(packed), _mm256_castsi256_si128(result));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(packed + 16), _mm256_extracti128_si256(result, 1));
  }
}

// Encodes a block of a part, whose values are to be multiplied by `factor`.
template <mx::ElementFormat kFormat>
[[gnu::always_inline]] inline void encode_block(const Part& part, int64_t b, __m512 factor,
                                                Pair x) {
  pack<kFormat.bits>(encode<kFormat>(_mm512_mul_ps(x.even, factor)),
                     encode<kFormat>(_mm512_mul_ps(x.odd, factor)),
                     part.data + b * mx::block_bytes(kFormat));
}

// Encodes a part's blocks, whose values `pair_at` gives.
template <mx::ElementFormat kFormat, typename F>
[[gnu::always_inline]] inline void encode_pairs(const Part& part, const Terms& terms,
                                                const F& pair_at) {
  for (int64_t b = 0; b < part.blocks; ++b) {
    for (int64_t line = 0; line < part.next_bytes; line += kLine) {
      _mm_prefetch(part.next + b * part.next_bytes + line, _MM_HINT_T0);
    }
    const __m512 factor = _mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(terms.term[b])));
    encode_block<kFormat>(part, b, factor, pair_at(b));
  }
}

template <mx::ElementFormat kFormat>
void clear_blocks(const Part& part, uint32_t blocks) {
  for (; blocks; blocks &= blocks - 1) {
    const int b = std::countr_zero(blocks);
    std::memset(part.data + b * mx::block_bytes(kFormat), 0, mx::block_bytes(kFormat));
  }
}

}  // namespace
}  // namespace micromix::cpu::avx512
