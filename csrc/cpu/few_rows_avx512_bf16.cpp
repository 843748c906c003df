// The product of few rows on AVX512-BF16: weights that are no small integers are multiplied as
// pairs of bfloat16 numbers.
#include "bfloat16_tiles.h"
#include "few_rows.h"

namespace micromix::cpu {
namespace {

using namespace avx512;

constexpr Table<uint16_t> kE2m1Words = bfloat16_table(mx::E2M1);
constexpr Table<uint16_t> kE2m3Words = bfloat16_table(mx::E2M3);
constexpr Table<uint16_t> kE3m2Words = bfloat16_table(mx::E3M2);
template <mx::ElementFormat kFormat>
constexpr const uint16_t* words_of() {
  return (kFormat == mx::E2M1 ? kE2m1Words : kFormat == mx::E2M3 ? kE2m3Words : kE3m2Words).values;
}

// The low or the high byte of the bfloat16 number of each E4M3 code without its sign.
struct alignas(64) E4m3Bytes {
  uint8_t values[128];
};
constexpr E4m3Bytes e4m3_bytes(int shift) {
  E4m3Bytes bytes{};
  for (int code = 0; code < 128; ++code) {
    const uint16_t word = float_to_bfloat16(mx::decode(static_cast<uint8_t>(code), mx::E4M3));
    bytes.values[code] = static_cast<uint8_t>(word >> shift);
  }
  return bytes;
}
constexpr E4m3Bytes kE4m3Bytes[2] = {e4m3_bytes(0), e4m3_bytes(8)};

struct Bfloat16Pairs {
  static constexpr int kDigitRows = 1;

  // One or two rows wait for memory, and L1 of Zen 4 for few lines at once.
  template <int kLines, int kRows>
  [[gnu::always_inline]] static void fetch_ahead(const uint8_t* tile) {
    if constexpr (kRows <= 2) {
      cpu::fetch_ahead<kLines, 2, 4096>(tile);
    } else {
      cpu::fetch_ahead<kLines>(tile);
    }
  }

  static constexpr int exponent(mx::ElementFormat) { return 0; }

  [[gnu::always_inline]] static void store(Block block, uint8_t* elements) {
    store_tile_row(block, elements);
  }

  // Words of a tile as bfloat16: see avx512::for_each_pair.
  template <mx::ElementFormat kFormat, typename F>
  [[gnu::always_inline]] static void for_each_pair(const uint8_t* tile, const F& f) {
    if constexpr (kFormat != mx::E4M3) {
      avx512::for_each_pair<kFormat.bits>(tile, words_of<kFormat>(), f);
    } else {
      const __m512i low0 = load(kE4m3Bytes[0].values), low1 = load(kE4m3Bytes[0].values + 64);
      const __m512i high0 = load(kE4m3Bytes[1].values), high1 = load(kE4m3Bytes[1].values + 64);
      const __m512i even = _mm512_set1_epi16(0xFF), sign = _mm512_set1_epi8(INT8_MIN);
#pragma GCC unroll 8
      for (int g = 0; g < 8; ++g) {
        const __m512i codes = load(tile + g * kLine);
        const __m512i low = _mm512_permutex2var_epi8(low0, codes, low1);
        const __m512i magnitude = _mm512_permutex2var_epi8(high0, codes, high1);
        const __m512i high = _mm512_ternarylogic_epi64(magnitude, codes, sign, 0xF8);  // | (& sign)
        const auto select = [&](__m512i a, __m512i b) __attribute__((always_inline)) {
          return _mm512_ternarylogic_epi64(even, a, b, 0xCA);  // even ? a : b
        };
        f(2 * g, select(low, _mm512_slli_epi16(high, 8)));
        f(2 * g + 1, select(_mm512_srli_epi16(low, 8), high));
      }
    }
  }

  template <mx::ElementFormat kFormat, bool kWide, int kRows, int kPanels>
  [[gnu::always_inline]] static void blocks(const mx::Segment& segment, const Panels& panels,
                                            const Prepared* rows, __m512 (*sums)[kRows]) {
    const uint8_t* tile = panels.tile;
    for (int64_t b = segment.first_block; b < segment.first_block + segment.blocks; ++b) {
#pragma GCC unroll 4
      for (int p = 0; p < kPanels; ++p) {
        fetch_ahead<kFormat.bits, kRows>(tile + p * panels.bytes);
        // Of few rows several sums: one product would wait for the one before.
        constexpr int kSums = kRows <= 2 ? 2 : 1;
        __m512 dots[kRows][kSums];
#pragma GCC unroll 8
        for (int m = 0; m < kRows; ++m) {
          for (int i = 0; i < kSums; ++i) dots[m][i] = _mm512_setzero_ps();
        }
        for_each_pair<kFormat>(
            tile + p * panels.bytes, [&](int pair, __m512i words) [[gnu::always_inline]] {
#pragma GCC unroll 8
              for (int m = 0; m < kRows; ++m) {
                const int32_t* const pairs =
                    reinterpret_cast<const int32_t*>(rows[m].elements + b * kElementBytes);
                dots[m][pair % kSums] =
                    _mm512_dpbf16_ps(dots[m][pair % kSums], reinterpret_cast<__m512bh>(words),
                                     reinterpret_cast<__m512bh>(_mm512_set1_epi32(pairs[pair])));
              }
            });
        const __m512i scale = _mm512_cvtepu8_epi32(panels.block_scales(p, b));
#pragma GCC unroll 8
        for (int m = 0; m < kRows; ++m) {
          const __m512 dot = kSums == 1 ? dots[m][0] : _mm512_add_ps(dots[m][0], dots[m][1]);
          sums[p][m] = scaled_sum<kWide>(sums[p][m], dot, scale, rows[m], b, 1.0f);
        }
      }
      tile += kFormat.bits * kLine;
    }
  }
};

}  // namespace

const LinearKernel kFewRowsAvx512Bf16 = FewRows<Bfloat16Pairs>::kernel("avx512_bf16");

}  // namespace micromix::cpu
