// Tiles of integers whose every block has its own scale, where both operands are E2M1 or E2M3: half
// the instructions of a tile of bfloat16 numbers, and some for the scales. They lie where those of
// bfloat16 numbers would, in as many bytes.
//
// A row of an activation's tile: 32 bytes, one a channel; its factor, a float; what its sums start
// at, an integer. A weight's tile: 8 lines of 4 channels x 16 rows, then a line of scales, floats.
//
// Included only by files that are compiled for AVX-512.
#pragma once

#include "integer_bytes.h"

namespace micromix::cpu::avx512 {
namespace {

constexpr int kScaledLines = 8;
constexpr int64_t kFactorByte = 32, kStartByte = 36;

// Whether a segment of packed activations is multiplied so, where it is not in bands of integers
// (integer_tiles.h).
inline bool is_scaled(const LinearTask& task, const mx::Segment& segment) {
  return mx::is_small_integer(segment.format) &&
         mx::is_small_integer(task.layout.weight_format(segment));
}

// The block after the last one that is: blocks of bands come before, all others after.
inline int64_t end_of_scaled(const LinearTask& task, int64_t band_blocks) {
  int64_t end = band_blocks;
  if (task.weight_only) return end;
  for (const mx::Segment& s : task.layout.segments()) {
    if (is_scaled(task, s) && s.first_block + s.blocks > end) end = s.first_block + s.blocks;
  }
  return end;
}

// Blocks of an activation row, kTileBytes apart. Returns what prepare_blocks returns.
template <int kBits>
[[gnu::always_inline]] inline bool prepare_scaled(const mx::Segment& segment,
                                                  mx::ElementFormat weight, const uint8_t* packed,
                                                  const uint8_t* scales, uint8_t* out) {
  const float rest =
      1.0f / static_cast<float>(mx::integer_factor(weight) * mx::integer_factor(segment.format));
  bool wide = false;
  for (int64_t b = segment.first_block; b < segment.first_block + segment.blocks; ++b) {
    const __m256i bytes = integer_bytes<kBits>(packed);
    const uint8_t scale = scales[b];
    const bool plain = scale >= kSmallestPlainScale && scale <= kLargestPlainScale;
    wide |= !plain && scale != mx::kNanScale && !_mm256_testz_si256(bytes, bytes);
    uint8_t* const row = out + b * kTileBytes;
    _mm256_store_si256(reinterpret_cast<__m256i*>(row), bytes);
    const float factor = mx::scale_value(scale) * rest;
    const int32_t start = integer_start(bytes, weight);
    std::memcpy(row + kFactorByte, &factor, sizeof factor);
    std::memcpy(row + kStartByte, &start, sizeof start);
    packed += kBits * 4;
  }
  return wide;
}

template <int kBits>
[[gnu::always_inline]] inline void decode_scaled(const uint8_t* tile, const uint8_t* scales,
                                                 uint8_t* out) {
  __m512i lines[kScaledLines];
  decode_bytes<kBits>(tile, lines);
#pragma GCC unroll 8
  for (int i = 0; i < kScaledLines; ++i) _mm512_store_si512(out + i * kLine, lines[i]);
  const __m128i bytes = _mm_load_si128(reinterpret_cast<const __m128i*>(scales));
  _mm512_store_si512(out + kScaledLines * kLine,
                     _mm512_slli_epi32(_mm512_cvtepu8_epi32(bytes), mx::kFloat32MantissaBits));
}

}  // namespace
}  // namespace micromix::cpu::avx512
