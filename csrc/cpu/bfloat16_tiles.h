// Both operands of an AMX product as bfloat16, their scales applied: tiles of a placed weight, and
// blocks of packed activations. Included only by files that are compiled for AVX-512.
#pragma once

#include "float_rows_avx512.h"

namespace micromix::cpu::avx512 {
namespace {

// Decoded elements are looked up with the largest plain scale applied, and brought to the block's
// own scale by taking from their exponents, with unsigned saturation: zeros stay zeros, as all
// zeros in a table are positive, and the exponents of other elements are large enough.
constexpr Table<uint16_t> scaled_table(mx::ElementFormat format, int codes) {
  Table<uint16_t> table{};
  for (int i = 0; i < 64; ++i) {
    const float value = mx::decode(static_cast<uint8_t>(i % codes), format);
    const float largest = mx::scale_value(kLargestPlainScale);
    table.values[i] = value == 0.0f ? uint16_t{0} : float_to_bfloat16(value * largest);
  }
  return table;
}
constexpr Table<uint16_t> kE2m1 = scaled_table(mx::E2M1, 16);
constexpr Table<uint16_t> kE2m3 = scaled_table(mx::E2M3, 64);
constexpr Table<uint16_t> kE3m2 = scaled_table(mx::E3M2, 64);
constexpr Table<uint16_t> kE4m3Subnormals = scaled_table(mx::E4M3, 8);

template <mx::ElementFormat kFormat>
constexpr const uint16_t* table_of() {
  return kFormat == mx::E2M1 ? kE2m1.values : kFormat == mx::E2M3 ? kE2m3.values : kE3m2.values;
}

// What scale bytes, one a word, take from exponents.
[[gnu::always_inline]] inline __m512i decrement(__m512i scales) {
  return _mm512_slli_epi16(_mm512_sub_epi16(_mm512_set1_epi16(kLargestPlainScale), scales), 7);
}

// E4M3 codes, in the low bytes of words whose high bytes are anything, to bfloat16 under their
// scales. `signs` has their sign bits on top of its words.
[[gnu::always_inline]] inline __m512i e4m3_to_bfloat16(__m512i codes, __m512i signs,
                                                       __m512i decrement) {
  constexpr int kExponent = mx::kFloat32Bias - mx::E4M3.bias + kLargestPlainScale - kNeutralScale;
  const __m512i magnitude = _mm512_and_si512(codes, _mm512_set1_epi16(0x7F));
  const __m512i normal =
      _mm512_add_epi16(_mm512_slli_epi16(magnitude, 4), _mm512_set1_epi16(kExponent << 7));
  const __mmask32 small = _mm512_cmplt_epu16_mask(magnitude, _mm512_set1_epi16(8));
  const __m512i value = _mm512_mask_permutexvar_epi16(normal, small, codes, load(&kE4m3Subnormals));
  return _mm512_ternarylogic_epi64(_mm512_subs_epu16(value, decrement), signs,
                                   _mm512_set1_epi16(INT16_MIN), 0xF8);
}

// A tile of the weight, as 16 pairs of channels x 16 rows: see for_each_pair.
template <mx::ElementFormat kFormat>
[[gnu::always_inline]] inline void decode_tile(const uint8_t* tile, const uint8_t* scales,
                                               uint8_t* out) {
  const __m128i scale = _mm_load_si128(reinterpret_cast<const __m128i*>(scales));
  const __m256i twice =
      _mm256_set_m128i(_mm_unpackhi_epi8(scale, scale), _mm_unpacklo_epi8(scale, scale));
  const __m512i lower = decrement(_mm512_cvtepu8_epi16(twice));
  const auto put = [&](int pair, __m512i words)
                       [[gnu::always_inline]] { _mm512_store_si512(out + pair * kLine, words); };
  if constexpr (kFormat == mx::E4M3) {
#pragma GCC unroll 8
    for (int g = 0; g < 8; ++g) {
      const __m512i line = load(tile + g * kLine);
      put(2 * g, e4m3_to_bfloat16(line, _mm512_slli_epi16(line, 8), lower));
      put(2 * g + 1, e4m3_to_bfloat16(_mm512_srli_epi16(line, 8), line, lower));
    }
  } else {
    for_each_pair<kFormat.bits>(tile, table_of<kFormat>(),
                                [&](int pair, __m512i words) [[gnu::always_inline]] {
                                  put(pair, _mm512_subs_epu16(words, lower));
                                });
  }
}

// Calls f.template operator()<format>(block, tile's place in the panel) for blocks [first, last).
template <typename F>
[[gnu::always_inline]] inline void for_each_block(const mx::MixedLayout& layout,
                                                  int64_t scale_bytes, int64_t first, int64_t last,
                                                  const F& f) {
  int64_t tiles = scale_bytes;
  for (const mx::Segment& segment : layout.segments()) {
    const mx::ElementFormat format = layout.weight_format(segment);
    const int64_t begin = first > segment.first_block ? first : segment.first_block;
    const int64_t segment_end = segment.first_block + segment.blocks;
    const int64_t end = last < segment_end ? last : segment_end;
    const auto run = [&]<mx::ElementFormat kFormat>() [[gnu::always_inline]] {
      for (int64_t b = begin; b < end; ++b) {
        const int64_t tile = tiles + (b - segment.first_block) * tile_bytes(kFormat);
        f.template operator()<kFormat>(b, tile);
      }
    };
    if (format == mx::E2M1) run.template operator()<mx::E2M1>();
    if (format == mx::E2M3) run.template operator()<mx::E2M3>();
    if (format == mx::E3M2) run.template operator()<mx::E3M2>();
    if (format == mx::E4M3) run.template operator()<mx::E4M3>();
    tiles += segment.blocks * tile_bytes(format);
  }
}

// Blocks of an activation row, kTileBytes apart, in the order of channels that the tiles of a
// weight have. Returns whether the scale of a block that is neither zero nor NaN lies outside the
// plain range: what is written of such a block is of no use.
template <mx::ElementFormat kFormat>
[[gnu::always_inline]] inline bool prepare_blocks(const mx::Segment& segment, const uint8_t* packed,
                                                  const uint8_t* scales, uint8_t* out) {
  const __m256i order = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15));
  bool wide = false;
  for (int64_t b = segment.first_block; b < segment.first_block + segment.blocks; ++b) {
    const __m256i codes = _mm256_shuffle_epi8(unpack<kFormat.bits>(packed), order);
    const __m512i words = _mm512_cvtepu8_epi16(codes);
    const uint8_t scale = scales[b];
    const bool plain = scale >= kSmallestPlainScale && scale <= kLargestPlainScale;
    const __m512i lower = decrement(_mm512_set1_epi16(plain ? scale : kNeutralScale));
    __m512i values;
    bool nan = scale == mx::kNanScale;
    if constexpr (kFormat == mx::E4M3) {
      values = e4m3_to_bfloat16(words, _mm512_slli_epi16(words, 8), lower);
      const __m512i largest = _mm512_set1_epi16(0x7F);
      nan |= _mm512_cmpeq_epi16_mask(_mm512_and_si512(words, largest), largest) != 0;
    } else {
      const uint16_t* const table = table_of<kFormat>();
      values =
          _mm512_subs_epu16(_mm512_permutex2var_epi16(load(table), words, load(table + 32)), lower);
    }
    wide |= !plain && !nan && _mm512_test_epi16_mask(values, _mm512_set1_epi16(0x7FFF)) != 0;
    if (nan) values = _mm512_set1_epi16(0x7FC0);
    __builtin_prefetch(out + b * kTileBytes + kLine, 1);  // the next row's
    _mm512_store_si512(out + b * kTileBytes, values);
    packed += kFormat.bits * 4;
  }
  return wide;
}

// A block of bfloat16 numbers, as a row of a tile in the same order of channels.
[[gnu::always_inline]] inline void store_tile_row(Block block, uint8_t* out) {
  const auto words = [](__m512 x) __attribute__((always_inline)) {
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(x), 16));
  };
  const __m512i both =
      _mm512_inserti64x4(_mm512_castsi256_si512(words(block.low)), words(block.high), 1);
  const __m512i order =
      _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15));
  _mm512_store_si512(out, _mm512_shuffle_epi8(both, order));
}

}  // namespace
}  // namespace micromix::cpu::avx512
