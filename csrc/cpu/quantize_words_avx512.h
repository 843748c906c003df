// Quantises a part of a row, on AVX-512 with VBMI: in words of 16 bits, 32 channels a vector, to
// E2M1 and E4M3. Words are bfloat16 numbers, or float32 numbers without their last 16 bits, of
// which the last bit of a word says whether any was set: with that bit and five others to spare a
// word is rounded to a code as the number is. Included only by files that are compiled for AVX-512;
// everything is always inlined or local to the file.
#pragma once

#include "quantize_part_avx512.h"

namespace micromix::cpu::avx512 {
namespace {

// The largest of each of up to 32 blocks of bfloat16 numbers, times 2 as integers: without signs.
template <bool kAll>
[[gnu::always_inline]] inline __m512i largest_words(const uint16_t* words, int64_t blocks) {
  const auto max = [](__m512i a, __m512i b)
                       __attribute__((always_inline)) { return _mm512_max_epu16(a, b); };
  __m512i eights[4];
#pragma GCC unroll 4
  for (int q = 0; q < 4; ++q) {
    eights[q] = _mm512_setzero_si512();
    if (!kAll && 8 * q >= blocks) continue;
    __m512i x[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      const int64_t b = 8 * q + i;
      x[i] =
          kAll || b < blocks ? _mm512_loadu_si512(words + b * mx::kBlock) : _mm512_setzero_si512();
      x[i] = _mm512_add_epi16(x[i], x[i]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) {
      x[i] = max(_mm512_unpacklo_epi16(x[i], x[i + 1]), _mm512_unpackhi_epi16(x[i], x[i + 1]));
    }
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4) {
      x[i] = max(_mm512_unpacklo_epi32(x[i], x[i + 2]), _mm512_unpackhi_epi32(x[i], x[i + 2]));
    }
    eights[q] = max(_mm512_unpacklo_epi64(x[0], x[4]), _mm512_unpackhi_epi64(x[0], x[4]));
  }
  const auto join = [&](__m512i a, __m512i b) __attribute__((always_inline)) {
    return max(_mm512_shuffle_i64x2(a, b, 0x88), _mm512_shuffle_i64x2(a, b, 0xDD));
  };
  return join(join(eights[0], eights[1]), join(eights[2], eights[3]));
}

// The codes of E2M1 by quarters of an octave, the first from 1/8 of the scale on; bit 5 is the
// sign.
constexpr Table<uint8_t> codes_of_quarters() {
  Table<uint8_t> table{};
  for (int i = 0; i < 64; ++i) {
    const uint32_t quarter = (mx::kFloat32Bias - 3) * 4 + i % 32;
    const float middle = std::bit_cast<float>(quarter << 21 | 1u << 20);
    table.values[i] = static_cast<uint8_t>(mx::encode(middle, mx::E2M1) | i / 32 << 3);
  }
  return table;
}
constexpr Table<uint8_t> kCodesOfQuarters = codes_of_quarters();

// The codes of up to four blocks of bfloat16 numbers. `below` of a block has in each half twice the
// bits of 1/8 of its scale, and 1. Where two codes are equally near the number is the first of its
// quarter, whose code is the upper one; the lower one is even where the top bit of the mantissa is
// clear, and there the number is moved to the quarter before, harmlessly for all others.
template <bool kAll>
[[gnu::always_inline]] inline void encode_words(const uint16_t* words, const uint32_t* below,
                                                int64_t blocks, uint8_t* packed) {
  __m512i index[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    index[i] = _mm512_setzero_si512();
    if (!kAll && i >= blocks) continue;
    const __m512i x = _mm512_loadu_si512(words + i * mx::kBlock);
    const __m512i twice = _mm512_add_epi16(x, x);
    const __m512i top = _mm512_srli_epi16(twice, 7);  // of the mantissa, in bit 0
    const __m512i moved = _mm512_ternarylogic_epi64(_mm512_set1_epi16(1), top, twice, 0xEA);
    const __m512i above = _mm512_subs_epu16(moved, _mm512_set1_epi32(static_cast<int>(below[i])));
    index[i] = _mm512_ternarylogic_epi64(_mm512_set1_epi16(1 << 5), _mm512_srli_epi16(x, 10),
                                         _mm512_srli_epi16(above, 6), 0xCA);
  }
  const __m512i table = load(kCodesOfQuarters.values);
  const auto pair = [&](__m512i a, __m512i b) __attribute__((always_inline)) {
    const __m512i codes = _mm512_permutexvar_epi8(_mm512_packus_epi16(a, b), table);
    return _mm512_maddubs_epi16(codes, _mm512_set1_epi16(0x1001));  // even + 16 odd
  };
  const __m512i bytes = _mm512_packus_epi16(pair(index[0], index[1]), pair(index[2], index[3]));
  const __m512i in_blocks = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __mmask16 mask = kAll ? 0xFFFF : static_cast<__mmask16>((1u << 4 * blocks) - 1);
  _mm512_mask_storeu_epi32(packed, mask, _mm512_permutexvar_epi32(in_blocks, bytes));
}

// The scales of a part, and of each block the word, twice, that `word_of` makes of scale bytes not
// below `smallest`; and the blocks that have to be encoded one by one: those with smaller scales,
// but for blocks of zeros.
struct WordScales {
  uint32_t nans, small;
};
template <mx::ElementFormat kFormat, typename F>
[[gnu::always_inline]] inline WordScales find_word_scales(const Part& part, Terms& terms,
                                                          int smallest, const F& word_of) {
  uint32_t small = 0;
  int at = 0;
  const uint32_t nans = find_scales<kFormat>(part, terms, [&](__m512i scale, __m512i amax) {
    const __m512i least = _mm512_set1_epi32(smallest);
    const __mmask16 there = lanes_before(at, part.blocks);
    const __mmask16 zero_or_small = _mm512_mask_cmplt_epu32_mask(there, scale, least);
    small |= static_cast<uint32_t>(_mm512_mask_test_epi32_mask(zero_or_small, amax, amax)) << at;
    at += 16;
    const __m512i word = word_of(_mm512_max_epu32(scale, least));
    return _mm512_or_si512(word, _mm512_slli_epi32(word, 16));
  });
  return {nans, small};
}

// The codes of a part's blocks of E2M1. Returns the blocks that hold NaN or Inf, and those whose
// codes are still to be found, as 1/8 of the scale is no normal number.
WordScales encode_e2m1(const Part& part, Terms& terms, const uint16_t* words) {
  constexpr int kSmallest = 3;
  const WordScales scales = find_word_scales<mx::E2M1>(part, terms, kSmallest, [](__m512i scale) {
    const __m512i eighth = _mm512_sub_epi32(scale, _mm512_set1_epi32(kSmallest));
    return _mm512_add_epi32(_mm512_slli_epi32(eighth, 8), _mm512_set1_epi32(1));
  });
  constexpr int64_t kBytes = mx::block_bytes(mx::E2M1);
  for (int64_t b = 0; b < part.blocks; b += 4) {
    for (int i = 0; i < 4; ++i) {
      _mm_prefetch(part.next + (b + i) * part.next_bytes, _MM_HINT_T0);
    }
    const uint16_t* const four = words + b * mx::kBlock;
    if (b + 4 <= part.blocks) {
      encode_words<true>(four, terms.term + b, 4, part.data + b * kBytes);
    } else {
      encode_words<false>(four, terms.term + b, part.blocks - b, part.data + b * kBytes);
    }
  }
  return scales;
}

// The same of E4M3: a number's bits less those that its exponent has too many are its code and four
// bits more, which are rounded off. Blocks with numbers that are subnormal in E4M3 are left.
WordScales encode_e4m3(const Part& part, Terms& terms, const uint16_t* words) {
  constexpr int kBias = mx::E4M3.bias, kMantissa = 7, kDropped = kMantissa - mx::E4M3.mantissa_bits;
  constexpr uint8_t kLargest = mx::encode(std::bit_cast<float>(mx::E4M3.largest_bits), mx::E4M3);
  // A subnormal number, whose bits are no exponent, is one of those that are left.
  constexpr int kSmallest = kBias + 1;
  WordScales scales = find_word_scales<mx::E4M3>(part, terms, kSmallest, [](__m512i scale) {
    return _mm512_slli_epi32(_mm512_sub_epi32(scale, _mm512_set1_epi32(kBias)), kMantissa);
  });
  const auto codes = [&](int64_t b) __attribute__((always_inline)) {
    _mm_prefetch(part.next + b * part.next_bytes, _MM_HINT_T0);
    const __m512i x = _mm512_loadu_si512(words + b * mx::kBlock);
    const __m512i magnitude = _mm512_and_si512(x, _mm512_set1_epi16(0x7FFF));
    const __m512i bits =
        _mm512_sub_epi16(magnitude, _mm512_set1_epi32(static_cast<int>(terms.term[b])));
    const __mmask32 normal = _mm512_cmpgt_epi16_mask(bits, _mm512_set1_epi16((1 << kMantissa) - 1));
    const __mmask32 left = _mm512_mask_test_epi16_mask(~normal, magnitude, magnitude);
    scales.small |= static_cast<uint32_t>(left != 0) << b;
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi16(bits, kDropped), _mm512_set1_epi16(1));
    const __m512i half = _mm512_add_epi16(odd, _mm512_set1_epi16((1 << (kDropped - 1)) - 1));
    const __m512i code =
        _mm512_maskz_min_epu16(normal, _mm512_srli_epi16(_mm512_add_epi16(bits, half), kDropped),
                               _mm512_set1_epi16(kLargest));
    return _mm512_ternarylogic_epi64(_mm512_set1_epi16(0x80), _mm512_srli_epi16(x, 8), code, 0xCA);
  };
  const __m512i in_blocks = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
  int64_t b = 0;
  for (; b + 2 <= part.blocks; b += 2) {
    const __m512i bytes = _mm512_packus_epi16(codes(b), codes(b + 1));
    _mm512_storeu_si512(part.data + b * mx::kBlock, _mm512_permutexvar_epi64(in_blocks, bytes));
  }
  if (b < part.blocks) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(part.data + b * mx::kBlock),
                        _mm512_cvtepi16_epi8(codes(b)));
  }
  return scales;
}

template <mx::ElementFormat kFormat>
constexpr bool kHasWords = kFormat == mx::E2M1 || kFormat == mx::E4M3;

// Encodes a part from its words; the blocks that are left, from the numbers that `pair_at` gives.
template <mx::ElementFormat kFormat, typename F>
[[gnu::always_inline]] inline void encode_words_or_pairs(const Part& part, Terms& terms,
                                                         const uint16_t* words, const F& pair_at) {
  const WordScales scales =
      kFormat == mx::E2M1 ? encode_e2m1(part, terms, words) : encode_e4m3(part, terms, words);
  for (uint32_t left = scales.small; left; left &= left - 1) {
    const int b = std::countr_zero(left);
    encode_block<kFormat>(part, b, _mm512_set1_ps(mx::inverse_scale(part.scales[b])), pair_at(b));
  }
  clear_blocks<kFormat>(part, scales.nans);
}

// The same of a format without words.
template <mx::ElementFormat kFormat, typename F>
[[gnu::always_inline]] inline void encode_all_pairs(const Part& part, Terms& terms,
                                                    const F& pair_at) {
  const uint32_t nans = find_scales<kFormat>(
      part, terms, [](__m512i scale, __m512i) { return inverse_scales(scale); });
  encode_pairs<kFormat>(part, terms, pair_at);
  clear_blocks<kFormat>(part, nans);
}

// Quantises a part of a row of bfloat16.
template <mx::ElementFormat kFormat>
void quantize_words(const Part& part, const uint16_t* words) {
  Terms terms;
  const __m512i largest = part.blocks == kPart ? largest_words<true>(words, part.blocks)
                                               : largest_words<false>(words, part.blocks);
  const auto widened = [](__m256i twice) {
    return _mm512_slli_epi32(_mm512_cvtepu16_epi32(twice), 15);
  };
  _mm512_store_si512(terms.amax, widened(_mm512_castsi512_si256(largest)));
  _mm512_store_si512(terms.amax + 16, widened(_mm512_extracti64x4_epi64(largest, 1)));
  const auto pair_at = [&](int64_t b) __attribute__((always_inline)) {
    return load_block<Dtype::kBFloat16>(words, b * mx::kBlock, (b + 1) * mx::kBlock);
  };
  if constexpr (kHasWords<kFormat>) {
    encode_words_or_pairs<kFormat>(part, terms, words, pair_at);
  } else {
    encode_all_pairs<kFormat>(part, terms, pair_at);
  }
}

// Quantises a part whose values, as float32, `pair_at` gives. `values`: room for them.
template <mx::ElementFormat kFormat, typename F>
[[gnu::always_inline]] inline void quantize_floats(const Part& part, float* values,
                                                   const F& pair_at) {
  auto* const words = reinterpret_cast<uint16_t*>(values);
  const __m512i magnitude = _mm512_set1_epi32(mx::kFloat32Magnitude);
  Terms terms;
  for (int64_t group = 0; group < part.blocks; group += 16) {
    const auto magnitudes = [&](int i) __attribute__((always_inline)) {
      const int64_t at = (group + i) * mx::kBlock;
      const Pair x = pair_at(group + i);
      const __m512i even = _mm512_castps_si512(x.even), odd = _mm512_castps_si512(x.odd);
      if constexpr (kHasWords<kFormat>) {
        const __m512i last = halves(even, _mm512_slli_epi32(odd, 16));
        const __m512i any = _mm512_min_epu16(last, _mm512_set1_epi16(1));
        const __m512i first = halves(_mm512_srli_epi32(even, 16), odd);
        _mm512_store_si512(words + at, _mm512_or_si512(first, any));
      } else {
        _mm512_store_ps(values + at, x.even);
        _mm512_store_ps(values + at + 16, x.odd);
      }
      return _mm512_max_epu32(_mm512_and_si512(even, magnitude), _mm512_and_si512(odd, magnitude));
    };
    _mm512_store_si512(terms.amax + group, largest_lanes(part.blocks - group, magnitudes));
  }
  if constexpr (kHasWords<kFormat>) {
    encode_words_or_pairs<kFormat>(part, terms, words, pair_at);
  } else {
    encode_all_pairs<kFormat>(part, terms, [&](int64_t b) __attribute__((always_inline)) {
      const float* const at = values + b * mx::kBlock;
      return Pair{_mm512_load_ps(at), _mm512_load_ps(at + 16)};
    });
  }
}

}  // namespace
}  // namespace micromix::cpu::avx512
