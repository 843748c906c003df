// Operands of a product of E2M1 elements as 8-bit integers: their sums are exact, and AMX and VNNI
// add up twice as many products of integers as of bfloat16 numbers.
//
// Twice an E2M1 element is an integer of 5 bits, so a byte has room for 2^0 to 2^3 of its block's
// scale. The blocks of a row in one step of K whose scales lie within 2^3 below the largest form
// its first band; of the others those within 2^3 below their largest form the second, and so on. A
// band has one power of two, and stands for zero where the blocks of other bands are. Most rows
// have one band in every step.
//
// Included only by files that are compiled for AVX-512.
#pragma once

#include <bit>
#include <type_traits>

#include "avx512.h"

namespace micromix::cpu::avx512 {
namespace {

constexpr int kBandScales = 4;

// The integer of code c under a scale 2^d below its band's largest, at c + 16 d, with an offset.
constexpr Table<int8_t> integer_table(int offset) {
  Table<int8_t> table{};
  for (int i = 0; i < 64; ++i) {
    const int shift = kBandScales - 1 - i / 16;
    const float value = mx::decode(static_cast<uint8_t>(i % 16), mx::E2M1);
    table.values[i] = static_cast<int8_t>(static_cast<int>(value * (2 << shift)) + offset);
  }
  return table;
}
template <int kOffset>
constexpr Table<int8_t> kIntegersWithOffset = integer_table(kOffset);
constexpr const Table<int8_t>& kIntegers = kIntegersWithOffset<0>;
constexpr int kLargestInteger = kIntegers.values[7];

// What an integer of a band with this largest scale byte is to be multiplied by.
constexpr int kIntegerExponent = mx::E2M1.mantissa_bits + kBandScales - 1;
[[gnu::always_inline]] inline float band_factor(uint8_t largest) {
  const int byte = largest < kSmallestPlainScale ? kSmallestPlainScale : largest;
  return std::bit_cast<float>(static_cast<uint32_t>(byte - kIntegerExponent)
                              << mx::kFloat32MantissaBits);
}
static_assert(kSmallestPlainScale > kIntegerExponent);

// ---- The weight -------------------------------------------------------------------------------

// The largest scale byte, below `limit`, of each of a panel's rows in blocks [first, last); 0 where
// there is none. And whether all of these blocks are in one band with it.
struct PanelBand {
  __m128i largest;
  bool last;
};
[[gnu::always_inline]] inline PanelBand panel_band(const uint8_t* scales, int64_t first,
                                                   int64_t last, __m128i limit) {
  __m128i largest = _mm_setzero_si128(), smallest = _mm_set1_epi8(-1);
  for (int64_t b = first; b < last; ++b) {
    const __m128i scale = _mm_load_si128(reinterpret_cast<const __m128i*>(scales + b * kTileRows));
    const __mmask16 below = _mm_cmplt_epu8_mask(scale, limit);
    largest = _mm_mask_max_epu8(largest, below, largest, scale);
    smallest = _mm_mask_min_epu8(smallest, below, smallest, scale);
  }
  const __m128i span = _mm_subs_epu8(largest, smallest);
  return {largest, _mm_cmplt_epu8_mask(span, _mm_set1_epi8(kBandScales)) == 0xFFFF};
}

// The limit of the next band.
[[gnu::always_inline]] inline __m128i below_band(__m128i largest) {
  return _mm_subs_epu8(largest, _mm_set1_epi8(kBandScales - 1));
}

// A block of a panel as 8 lines of 4 channels x 16 rows, the rows' bands given by their largest
// scales. Their integers have an offset; zero is what stands for other bands.
template <int kOffset>
[[gnu::always_inline]] inline void decode_integers(const uint8_t* tile, const uint8_t* scales,
                                                   __m128i largest, uint8_t* out) {
  const __m128i scale = _mm_load_si128(reinterpret_cast<const __m128i*>(scales));
  const __m128i less = _mm_sub_epi8(largest, scale);
  const __mmask16 in_band = _mm_cmplt_epu8_mask(less, _mm_set1_epi8(kBandScales));
  const __m128i base = _mm_slli_epi16(_mm_and_si128(less, _mm_set1_epi8(kBandScales - 1)), 4);
  // Each row's byte four times.
  const __m512i rows =
      _mm512_set_epi32(0x0F0F0F0F, 0x0E0E0E0E, 0x0D0D0D0D, 0x0C0C0C0C, 0x0B0B0B0B, 0x0A0A0A0A,
                       0x09090909, 0x08080808, 0x07070707, 0x06060606, 0x05050505, 0x04040404,
                       0x03030303, 0x02020202, 0x01010101, 0);
  const __m512i bases = _mm512_shuffle_epi8(_mm512_broadcast_i32x4(base), rows);
  const __m512i table = load(&kIntegersWithOffset<kOffset>), low = _mm512_set1_epi8(0xF);
  const __m512i zeros = _mm512_set1_epi8(kOffset);
  const auto decode = [&](auto all) __attribute__((always_inline)) {
    const auto put = [&](int line, __m512i codes) __attribute__((always_inline)) {
      const __m512i index = _mm512_ternarylogic_epi64(low, codes, bases, 0xEA);  // & and |
      __m512i integers = _mm512_permutexvar_epi8(index, table);
      if constexpr (!all) integers = _mm512_mask_mov_epi32(zeros, in_band, integers);
      _mm512_store_si512(out + line * kLine, integers);
    };
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const __m512i line = load(tile + j * kLine);
      put(2 * j, line);
      put(2 * j + 1, _mm512_srli_epi16(line, 4));
    }
  };
  if (in_band == 0xFFFF) {
    decode(std::true_type());
  } else {
    decode(std::false_type());
  }
}

// ---- Activations ------------------------------------------------------------------------------

// The first blocks of at most 64.
[[gnu::always_inline]] inline __mmask64 blocks_mask(int64_t blocks) {
  return blocks >= 64 ? ~0ull : (1ull << blocks) - 1;
}

// A row's scale bytes in one step of K; those of zero blocks are 0.
[[gnu::always_inline]] inline __m512i row_scales(const uint8_t* scales, int64_t blocks) {
  return _mm512_maskz_loadu_epi8(blocks_mask(blocks), scales);
}

[[gnu::always_inline]] inline uint8_t largest_byte(__m512i x) {
  const __m256i y = _mm256_max_epu8(_mm512_castsi512_si256(x), _mm512_extracti64x4_epi64(x, 1));
  const __m128i z = _mm_max_epu8(_mm256_castsi256_si128(y), _mm256_extracti128_si256(y, 1));
  const __m128i words = _mm_max_epu8(z, _mm_srli_epi16(z, 8));  // in the low bytes
  const __m128i inverted = _mm_andnot_si128(words, _mm_set1_epi16(0xFF));
  return static_cast<uint8_t>(0xFF ^ _mm_cvtsi128_si32(_mm_minpos_epu16(inverted)));
}

// The next band of the blocks in `left`, which it takes from there: its largest scale and its
// blocks.
struct RowBand {
  uint8_t largest;
  __mmask64 blocks;
};
[[gnu::always_inline]] inline RowBand next_band(__m512i scales, __mmask64& left) {
  const uint8_t largest = largest_byte(_mm512_maskz_mov_epi8(left, scales));
  const __m512i less = _mm512_sub_epi8(_mm512_set1_epi8(static_cast<char>(largest)), scales);
  const __mmask64 in_band = _mm512_mask_cmplt_epu8_mask(left, less, _mm512_set1_epi8(kBandScales));
  left &= ~in_band;
  return {largest, in_band};
}

// The blocks of a band as a row of tiles, two blocks a tile; zeros where the band has none. Returns
// what their sums of products start at, so that the offset of the weight's integers goes.
template <int kOffset>
[[gnu::always_inline]] inline int32_t prepare_integers(const uint8_t* packed, __m512i scales,
                                                       int64_t blocks, RowBand band, uint8_t* out) {
  const __m512i less = _mm512_sub_epi8(_mm512_set1_epi8(static_cast<char>(band.largest)), scales);
  const __m512i bases =
      _mm512_slli_epi16(_mm512_and_si512(less, _mm512_set1_epi8(kBandScales - 1)), 4);
  const __m512i table = load(&kIntegers), low = _mm512_set1_epi8(0xF);
  __m512i pair = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi8(1), 1);
  __m512i sum = _mm512_setzero_si512();
  for (int64_t b = 0; b < blocks; b += 2, packed += kLine / 2, out += kTileBytes) {
    const __m256i bytes = _mm256_maskz_loadu_epi64(blocks - b >= 2 ? 0xF : 0x3, packed);
    const __m512i words = _mm512_cvtepu8_epi16(bytes);
    const __m512i codes = _mm512_or_si512(words, _mm512_slli_epi16(words, 4));
    const __m512i base = _mm512_permutexvar_epi8(pair, bases);
    const __mmask64 there = (band.blocks >> b & 1 ? 0xFFFFFFFFull : 0) |
                            (band.blocks >> b & 2 ? 0xFFFFFFFFull << 32 : 0);
    const __m512i index = _mm512_ternarylogic_epi64(low, codes, base, 0xEA);
    __builtin_prefetch(out + kLine, 1);  // the next row's: tiles are rarely in a cache
    const __m512i integers = _mm512_maskz_permutexvar_epi8(there, index, table);
    if constexpr (kOffset != 0) {
      sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(static_cast<char>(kOffset)), integers);
    }
    _mm512_store_si512(out, integers);
    pair = _mm512_add_epi8(pair, _mm512_set1_epi8(2));
  }
  return kOffset == 0 ? 0 : -_mm512_reduce_add_epi32(sum);
}

}  // namespace
}  // namespace micromix::cpu::avx512
