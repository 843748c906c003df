// The product on AVX-512 without AVX512-BF16, and everywhere of rows and panels with wide scales:
// weights that are no small integers are brought to float32 through float16.
#include "few_rows.h"

namespace micromix::cpu {
namespace {

using namespace avx512;

struct Float32Pairs {
  static constexpr int kDigitRows = kNoLimit;

  template <int kLines, int kRows>
  [[gnu::always_inline]] static void fetch_ahead(const uint8_t* tile) {
    cpu::fetch_ahead<kLines>(tile);
  }

  // What e4m3_to_float16 leaves out.
  static constexpr int exponent(mx::ElementFormat weight) {
    return weight == mx::E4M3 ? kE4m3Exponent : 0;
  }

  [[gnu::always_inline]] static void store(Block block, uint8_t* elements) {
    float* const floats = reinterpret_cast<float*>(elements);
    _mm512_store_ps(floats, _mm512_permute_ps(block.low, 0b11011000));
    _mm512_store_ps(floats + 16, _mm512_permute_ps(block.high, 0b11011000));
  }

  // Words of a tile as float16: see avx512::for_each_pair.
  template <mx::ElementFormat kFormat, typename F>
  [[gnu::always_inline]] static void for_each_pair(const uint8_t* tile, const F& f) {
    if constexpr (kFormat == mx::E3M2) {
      avx512::for_each_pair<kFormat.bits>(tile, kE3m2Float16.values, f);
    } else {
#pragma GCC unroll 8
      for (int g = 0; g < 8; ++g) {
        const __m512i line = load(tile + g * kLine);
        f(2 * g, e4m3_to_float16(_mm512_slli_epi16(line, 8)));
        f(2 * g + 1, e4m3_to_float16(line));
      }
    }
  }

  template <mx::ElementFormat kFormat, bool kWide, int kRows, int kPanels>
  [[gnu::always_inline]] static void blocks(const mx::Segment& segment, const Panels& panels,
                                            const Prepared* rows, __m512 (*sums)[kRows]) {
    // Lanes 2n and 2n + 1 of `low` belong to row n of a panel, those of `high` to row n + 8.
    __m512 low[kPanels][kRows], high[kPanels][kRows];
    for (int p = 0; p < kPanels; ++p) {
      for (int m = 0; m < kRows; ++m) low[p][m] = high[p][m] = _mm512_setzero_ps();
    }
    const uint8_t* tile = panels.tile;
    for (int64_t b = segment.first_block; b < segment.first_block + segment.blocks; ++b) {
#pragma GCC unroll 4
      for (int p = 0; p < kPanels; ++p) {
        fetch_ahead<kFormat.bits, kRows>(tile + p * panels.bytes);
        __m512 dot_low[kRows], dot_high[kRows];
        for (int m = 0; m < kRows; ++m) dot_low[m] = dot_high[m] = _mm512_setzero_ps();
        for_each_pair<kFormat>(
            tile + p * panels.bytes, [&](int pair, __m512i words) [[gnu::always_inline]] {
              const __m512 w_low = _mm512_cvtph_ps(_mm512_castsi512_si256(words));
              const __m512 w_high = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(words, 1));
#pragma GCC unroll 8
              for (int m = 0; m < kRows; ++m) {
                const double* const pairs =
                    reinterpret_cast<const double*>(rows[m].elements + b * kElementBytes);
                const __m512 x = _mm512_castpd_ps(_mm512_set1_pd(pairs[pair]));
                dot_low[m] = _mm512_fmadd_ps(w_low, x, dot_low[m]);
                dot_high[m] = _mm512_fmadd_ps(w_high, x, dot_high[m]);
              }
            });
        const __m128i scale = panels.block_scales(p, b);
        const __m512i scale_low = _mm512_cvtepu8_epi32(_mm_unpacklo_epi8(scale, scale));
        const __m512i scale_high = _mm512_cvtepu8_epi32(_mm_unpackhi_epi8(scale, scale));
#pragma GCC unroll 8
        for (int m = 0; m < kRows; ++m) {
          low[p][m] = scaled_sum<kWide>(low[p][m], dot_low[m], scale_low, rows[m], b, 1.0f);
          high[p][m] = scaled_sum<kWide>(high[p][m], dot_high[m], scale_high, rows[m], b, 1.0f);
        }
      }
      tile += kFormat.bits * kLine;
    }
    const __m512i even =
        _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
    for (int p = 0; p < kPanels; ++p) {
      for (int m = 0; m < kRows; ++m) {
        const __m512 pairs = _mm512_add_ps(_mm512_permutex2var_ps(low[p][m], even, high[p][m]),
                                           _mm512_permutex2var_ps(low[p][m], odd, high[p][m]));
        sums[p][m] = _mm512_add_ps(sums[p][m], pairs);
      }
    }
  }
};

}  // namespace

const LinearKernel kLinearAvx512 = FewRows<Float32Pairs>::kernel("avx512");

}  // namespace micromix::cpu
