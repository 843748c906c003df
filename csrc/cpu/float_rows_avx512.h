// float_rows.h on AVX-512: a block as two vectors, channels 0 to 15 and 16 to 31.
#pragma once

#include "../mx/hadamard.h"
#include "avx512.h"

namespace micromix::cpu::avx512 {
namespace {

struct Block {
  __m512 low, high;
};

// mx::hadamard.
[[gnu::always_inline]] inline Block rotate(Block block) {
  const auto in_lanes = [](__m512 x) __attribute__((always_inline)) {
    x = butterfly(x, _mm512_permute_ps(x, 0b10110001), 0xAAAA);
    x = butterfly(x, _mm512_permute_ps(x, 0b01001110), 0xCCCC);
    x = butterfly(x, _mm512_shuffle_f32x4(x, x, 0b10110001), 0xF0F0);
    return butterfly(x, _mm512_shuffle_f32x4(x, x, 0b01001110), 0xFF00);
  };
  const __m512 low = in_lanes(block.low), high = in_lanes(block.high);
  const __m512 norm = _mm512_set1_ps(mx::kHadamardNorm);
  return {_mm512_mul_ps(_mm512_add_ps(low, high), norm),
          _mm512_mul_ps(_mm512_sub_ps(low, high), norm)};
}

// 16 elements of a row of k, from channel `first` on; those beyond the row are zero.
template <Dtype kDtype>
[[gnu::always_inline]] inline __m512 load_channels(const void* row, int64_t first, int64_t k) {
  const int64_t left = k - first;
  const __mmask16 mask = left >= 16  ? 0xFFFF
                         : left <= 0 ? 0
                                     : static_cast<__mmask16>((1u << left) - 1);
  return load_floats(row, kDtype, first, mask);
}

// The elements that 16 positions of an order name; -1 names none and gives zero.
template <Dtype kDtype>
[[gnu::always_inline]] inline __m512 gather_channels(const void* row, const int32_t* order,
                                                     int64_t k) {
  const __m512i channels = _mm512_loadu_si512(order);
  const __mmask16 real = _mm512_cmpge_epi32_mask(channels, _mm512_setzero_si512());
  if constexpr (kDtype == Dtype::kFloat32) {
    return _mm512_mask_i32gather_ps(_mm512_setzero_ps(), real, channels, row, sizeof(float));
  }
  if (k == 0) return _mm512_setzero_ps();  // there is nothing at `row`
  if (k == 1) return _mm512_maskz_broadcastss_ps(real, _mm_set_ss(load_float(row, kDtype, 0)));
  // Two elements at a time, none of them outside of the row: the channel is the second, or, where
  // it is channel 0, the first.
  const __m512i before =
      _mm512_max_epi32(_mm512_sub_epi32(channels, _mm512_set1_epi32(1)), _mm512_setzero_si512());
  __m512i pairs =
      _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), real, before, row, sizeof(uint16_t));
  const __mmask16 first = _mm512_cmpeq_epi32_mask(channels, _mm512_setzero_si512());
  pairs = _mm512_mask_slli_epi32(pairs, first, pairs, 16);
  if constexpr (kDtype == Dtype::kFloat16) {
    return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(pairs, 16)));
  }
  return _mm512_castsi512_ps(
      _mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int32_t>(0xFFFF0000))));
}

// to_bfloat16, as float32.
[[gnu::always_inline]] inline __m512 round_to_bfloat16(__m512 x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i sum = _mm512_add_epi32(_mm512_add_epi32(bits, odd), _mm512_set1_epi32(0x7FFF));
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  const __m512i kept = _mm512_set1_epi32(static_cast<int32_t>(0xFFFF0000));
  return _mm512_castsi512_ps(
      _mm512_mask_blend_epi32(nan, _mm512_and_si512(sum, kept), _mm512_set1_epi32(0x7FC00000)));
}

template <Dtype kDtype, bool kOrdered, typename F>
[[gnu::always_inline]] inline void for_each_float_block(const LinearTask& task, int64_t r,
                                                        const F& f) {
  constexpr int64_t kElement = kDtype == Dtype::kFloat32 ? sizeof(float) : sizeof(uint16_t);
  const void* const row = static_cast<const uint8_t*>(task.x) + r * task.k * kElement;
  for (const mx::Segment& segment : task.layout.segments()) {
    for (int64_t b = segment.first_block; b < segment.first_block + segment.blocks; ++b) {
      const int64_t first = b * mx::kBlock;
      Block block;
      if constexpr (kOrdered) {
        block = {gather_channels<kDtype>(row, task.order + first, task.k),
                 gather_channels<kDtype>(row, task.order + first + 16, task.k)};
      } else {
        block = {load_channels<kDtype>(row, first, task.k),
                 load_channels<kDtype>(row, first + 16, task.k)};
      }
      if (segment.hadamard) block = rotate(block);
      if (segment.hadamard || kDtype != Dtype::kBFloat16) {
        block = {round_to_bfloat16(block.low), round_to_bfloat16(block.high)};
      }
      f(segment, b, block);
    }
  }
}

// Calls f(segment, block's number, block) for the blocks of row r: float_rows.h's load_block.
template <typename F>
void for_each_float_block(const LinearTask& task, int64_t r, const F& f) {
  const auto run = [&]<Dtype kDtype>() {
    if (task.order) {
      for_each_float_block<kDtype, true>(task, r, f);
    } else {
      for_each_float_block<kDtype, false>(task, r, f);
    }
  };
  if (task.x_dtype == Dtype::kBFloat16) run.template operator()<Dtype::kBFloat16>();
  if (task.x_dtype == Dtype::kFloat16) run.template operator()<Dtype::kFloat16>();
  if (task.x_dtype == Dtype::kFloat32) run.template operator()<Dtype::kFloat32>();
}

// The bits of the larger magnitude, lane by lane.
[[gnu::always_inline]] inline __m512i magnitudes(Block block) {
  const __m512i magnitude = _mm512_set1_epi32(mx::kFloat32Magnitude);
  return _mm512_max_epu32(_mm512_and_si512(_mm512_castps_si512(block.low), magnitude),
                          _mm512_and_si512(_mm512_castps_si512(block.high), magnitude));
}

}  // namespace
}  // namespace micromix::cpu::avx512
