// What the AVX-512 kernels share: element tables, decoding of packed rows, the epilogue. Included
// only by files that are compiled for AVX-512; everything is always inlined or local to the file.
#pragma once

#include <immintrin.h>

#include "convert.h"

namespace micromix::cpu::avx512 {
namespace {

// One value per code, repeated until 64 entries are full: vpermb and vpermw look at 6 and 5 bits of
// an index, so bits that belong to a neighbouring code need no masking.
template <typename T>
struct alignas(64) Table {
  T values[64];
};

// value * factor + offset, as bytes; the integers that stand for E2M1 (x2) and E2M3 (x8).
constexpr Table<int8_t> byte_table(mx::ElementFormat format, int factor, int offset) {
  Table<int8_t> table{};
  for (int i = 0; i < 64; ++i) {
    const uint8_t code = static_cast<uint8_t>(i & ((1 << format.bits) - 1));
    table.values[i] = static_cast<int8_t>(mx::decode(code, format) * factor + offset);
  }
  return table;
}

constexpr Table<uint16_t> float16_table(mx::ElementFormat format) {
  Table<uint16_t> table{};
  for (int i = 0; i < 64; ++i) {
    const uint8_t code = static_cast<uint8_t>(i & ((1 << format.bits) - 1));
    table.values[i] = float_to_float16(mx::decode(code, format));
  }
  return table;
}

constexpr Table<uint16_t> bfloat16_table(mx::ElementFormat format) {
  Table<uint16_t> table{};
  for (int i = 0; i < 64; ++i) {
    const uint8_t code = static_cast<uint8_t>(i & ((1 << format.bits) - 1));
    table.values[i] = float_to_bfloat16(mx::decode(code, format));
  }
  return table;
}

[[gnu::always_inline]] inline __m512i load(const void* p) { return _mm512_load_si512(p); }

// The 32 codes of a block of packed 6-bit elements, one a byte; the high 2 bits are not cleared.
[[gnu::always_inline]] inline __m256i unpack6(const uint8_t* packed) {
  const __m256i spread = _mm256_setr_epi8(0, 1, 2, 3, 4, 5, 0, 0, 6, 7, 8, 9, 10, 11, 0, 0, 12, 13,
                                          14, 15, 16, 17, 0, 0, 18, 19, 20, 21, 22, 23, 0, 0);
  const __m256i shifts = _mm256_set1_epi64x(0x2A241E18120C0600);  // 42, 36, ..., 6, 0
  const __m256i bytes = _mm256_maskz_loadu_epi8(0xFFFFFF, packed);
  return _mm256_multishift_epi64_epi8(shifts, _mm256_permutexvar_epi8(spread, bytes));
}

// The 32 codes of a block of packed 4-bit elements, one a byte; the high 4 bits are cleared.
[[gnu::always_inline]] inline __m256i unpack4(const uint8_t* packed) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(packed));
  const __m128i mask = _mm_set1_epi8(0xF);
  const __m128i even = _mm_and_si128(bytes, mask);
  const __m128i odd = _mm_and_si128(_mm_srli_epi16(bytes, 4), mask);
  return _mm256_set_m128i(_mm_unpackhi_epi8(even, odd), _mm_unpacklo_epi8(even, odd));
}

// The 32 codes of a block, one a byte.
template <int kBits>
[[gnu::always_inline]] inline __m256i unpack(const uint8_t* packed) {
  if constexpr (kBits == 4) return unpack4(packed);
  if constexpr (kBits == 6) return unpack6(packed);
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(packed));
}

// Words by the table of a 4- or 6-bit tile, two channels of 16 rows at once: word 2n + h is channel
// c + 2h of row n. Calls f(index of the pair of channels, words): pair 2g has channels 4g and
// 4g + 2, pair 2g + 1 channels 4g + 1 and 4g + 3.
template <int kBits, typename F>
[[gnu::always_inline]] inline void for_each_pair(const uint8_t* tile, const uint16_t* table,
                                                 const F& f) {
  if constexpr (kBits == 4) {
    const __m512i words = load(table);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const __m512i line = load(tile + j * kLine);
#pragma GCC unroll 4
      for (int t = 0; t < 4; ++t) {
        f(4 * j + 2 * (t % 2) + t / 2,
          _mm512_permutexvar_epi16(_mm512_srli_epi16(line, 4 * t), words));
      }
    }
    return;
  }
  const __m512i low_bits = _mm512_set1_epi8(0xF);
  const __m512i table0 = load(table), table1 = load(table + 32);
#pragma GCC unroll 8
  for (int g = 0; g < 8; ++g) {
    const int j = g / 2, shift = 4 * (j % 2) + 2 * (g % 2);
    const __m512i line = load(tile + j * kLine), high = load(tile + (4 + j / 2) * kLine);
    const __m512i low = g % 2 ? _mm512_srli_epi16(line, 4) : line;
    const __m512i moved =
        shift < 4 ? _mm512_slli_epi16(high, 4 - shift) : _mm512_srli_epi16(high, shift - 4);
    const __m512i codes = _mm512_ternarylogic_epi64(low_bits, low, moved, 0xCA);
    f(2 * g, _mm512_permutex2var_epi16(table0, codes, table1));
    f(2 * g + 1, _mm512_permutex2var_epi16(table0, _mm512_srli_epi16(codes, 8), table1));
  }
}

// Sums and differences of lanes whose numbers differ in one bit: `swapped` is x with them
// exchanged, `high` the lanes where the bit is set. The products are exact.
[[gnu::always_inline]] inline __m512 butterfly(__m512 x, __m512 swapped, __mmask16 high) {
  const __m512 sign = _mm512_mask_blend_ps(high, _mm512_set1_ps(1.0f), _mm512_set1_ps(-1.0f));
  return _mm512_fmadd_ps(x, sign, swapped);
}

// E4M3 codes in the high bytes of words to float16 with 2^-8 of their values. Subnormal codes
// become subnormal float16 numbers, which conversion to float32 keeps.
[[gnu::always_inline]] inline __m512i e4m3_to_float16(__m512i words) {
  return _mm512_and_si512(_mm512_srai_epi16(words, 1),
                          _mm512_set1_epi16(static_cast<int16_t>(0xBF80)));
}
constexpr int kE4m3Exponent = 8;

[[gnu::always_inline]] inline __m512 load_floats(const void* values, Dtype dtype, int64_t i,
                                                 __mmask16 mask) {
  if (dtype == Dtype::kFloat32) {
    return _mm512_maskz_loadu_ps(mask, static_cast<const float*>(values) + i);
  }
  const __m256i half = _mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(values) + i);
  if (dtype == Dtype::kFloat16) return _mm512_cvtph_ps(half);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

// Rounds to bfloat16, nearest even; vcvtneps2bf16 would flush subnormal numbers.
[[gnu::always_inline]] inline __m256i to_bfloat16(__m512 x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i bias = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF));
  const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, bias), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_mask_blend_epi32(nan, rounded, _mm512_set1_epi32(0x7FC0)));
}

[[gnu::always_inline]] inline void store_floats(void* values, Dtype dtype, int64_t i,
                                                __mmask16 mask, __m512 x) {
  if (dtype == Dtype::kFloat32) {
    _mm512_mask_storeu_ps(static_cast<float*>(values) + i, mask, x);
  } else {
    const __m256i half = dtype == Dtype::kBFloat16
                             ? to_bfloat16(x)
                             : _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm256_mask_storeu_epi16(static_cast<uint16_t*>(values) + i, mask, half);
  }
}

// Columns of the panel that exist.
[[gnu::always_inline]] inline __mmask16 column_mask(const LinearTask& task, int64_t panel) {
  const int64_t left = task.n - panel * kTileRows;
  return left >= kTileRows ? 0xFFFF : static_cast<__mmask16>((1u << left) - 1);
}

// Adds the bias, rounds once, and stores 16 sums of one row.
[[gnu::always_inline]] inline void finish(const LinearTask& task, int64_t row, int64_t panel,
                                          __mmask16 columns, __m512 sums) {
  const int64_t n = panel * kTileRows;
  if (task.bias) {
    sums = _mm512_add_ps(sums, load_floats(task.bias, task.bias_dtype, n, columns));
  }
  const int64_t out_row = task.out_rows ? task.out_rows[row] : row;
  store_floats(task.out, task.out_dtype, out_row * task.n + n, columns, sums);
}

}  // namespace
}  // namespace micromix::cpu::avx512
