// The product for many rows, on AVX512-BF16 without AMX: dot products of bfloat16 pairs, and of
// integers of 8 bits where both operands are MXFP4 or MXFP6 E2M3.
#include <utility>

#include "many_rows.h"

namespace micromix::cpu {
namespace {

using namespace avx512;

// So many rows of sums, of a pair of panels, are in registers while K passes.
constexpr int kRows = 8, kScaledRows = 4;

// Four bytes, in every lane.
[[gnu::always_inline]] inline __m512i word(const uint8_t* p) {
  int32_t value;
  std::memcpy(&value, p, sizeof value);
  return _mm512_set1_epi32(value);
}

// sums[row, panel] of `rows` slots of a row tile and a pair of panels, over `tiles`. `starts` are
// the rows' starts of sums of integers, or the sums of bfloat16 numbers so far; or null: zero.
template <bool kIntegers, int kCount>
void multiply_rows(const uint8_t* a, const uint8_t* b, int64_t tiles, const void* starts,
                   float* sums) {
  __m512i acc[kCount][2];
#pragma GCC unroll 8
  for (int r = 0; r < kCount; ++r) {
    for (int c = 0; c < 2; ++c) {
      acc[r][c] = _mm512_setzero_si512();
      if (kIntegers) {
        acc[r][c] = _mm512_set1_epi32(static_cast<const int32_t*>(starts)[r]);
      } else if (starts) {
        acc[r][c] = load(static_cast<const float*>(starts) + (c * kStripRows + r) * kTileRows);
      }
    }
  }
  for (const uint8_t* const end = a + tiles * kTileBytes; a < end; a += kTileBytes) {
#pragma GCC unroll 16
    for (int line = 0; line < kTileRows; ++line) {
      const __m512i b0 = load(b + line * kLine), b1 = load(b + kTileBytes + line * kLine);
#pragma GCC unroll 8
      for (int r = 0; r < kCount; ++r) {
        const __m512i x = word(a + r * kLine + line * 4);
        const auto add = [&](__m512i sum, __m512i w) __attribute__((always_inline)) {
          if constexpr (kIntegers) return _mm512_dpbusd_epi32(sum, w, x);
          return reinterpret_cast<__m512i>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(sum),
                                                            reinterpret_cast<__m512bh>(w),
                                                            reinterpret_cast<__m512bh>(x)));
        };
        acc[r][0] = add(acc[r][0], b0);
        acc[r][1] = add(acc[r][1], b1);
      }
    }
    b += 2 * kTileBytes;
  }
#pragma GCC unroll 8
  for (int r = 0; r < kCount; ++r) {
    for (int c = 0; c < 2; ++c) {
      _mm512_store_si512(sums + (c * kStripRows + r) * kTileRows, acc[r][c]);
    }
  }
}

// The same of integers that have their own scales.
template <int kCount>
void multiply_scaled_rows(const uint8_t* a, const uint8_t* b, int64_t tiles, const float* starts,
                          float* sums) {
  __m512 acc[kCount][2];
#pragma GCC unroll 4
  for (int r = 0; r < kCount; ++r) {
    for (int c = 0; c < 2; ++c) {
      acc[r][c] =
          starts ? _mm512_load_ps(starts + (c * kStripRows + r) * kTileRows) : _mm512_setzero_ps();
    }
  }
  for (const uint8_t* const end = a + tiles * kTileBytes; a < end; a += kTileBytes) {
    __m512i dots[kCount][2];
#pragma GCC unroll 4
    for (int r = 0; r < kCount; ++r) dots[r][0] = dots[r][1] = word(a + r * kLine + kStartByte);
#pragma GCC unroll 8
    for (int line = 0; line < kScaledLines; ++line) {
      const __m512i b0 = load(b + line * kLine), b1 = load(b + kTileBytes + line * kLine);
#pragma GCC unroll 4
      for (int r = 0; r < kCount; ++r) {
        const __m512i x = word(a + r * kLine + line * 4);
        dots[r][0] = _mm512_dpbusd_epi32(dots[r][0], b0, x);
        dots[r][1] = _mm512_dpbusd_epi32(dots[r][1], b1, x);
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < kCount; ++r) {
      const __m512 factor = _mm512_castsi512_ps(word(a + r * kLine + kFactorByte));
      for (int c = 0; c < 2; ++c) {
        const __m512 scale = _mm512_castsi512_ps(load(b + c * kTileBytes + kScaledLines * kLine));
        const __m512 dot = _mm512_cvtepi32_ps(dots[r][c]);
        acc[r][c] = _mm512_fmadd_ps(_mm512_mul_ps(dot, scale), factor, acc[r][c]);
      }
    }
    b += 2 * kTileBytes;
  }
#pragma GCC unroll 4
  for (int r = 0; r < kCount; ++r) {
    for (int c = 0; c < 2; ++c) {
      _mm512_store_ps(sums + (c * kStripRows + r) * kTileRows, acc[r][c]);
    }
  }
}

// Calls f.template operator()<count>(slot) for groups of at most kMost of a strip's slots.
template <int kMost, typename F>
[[gnu::always_inline]] inline void for_each_group(int64_t slots, const F& f) {
  int64_t slot = 0;
  for (; slot + kMost <= slots; slot += kMost) f.template operator()<kMost>(slot);
  const auto rest = [&]<int... kLess>(std::integer_sequence<int, kLess...>) {
    (void)((slots - slot == kLess + 1 && (f.template operator()<kLess + 1>(slot), true)) || ...);
  };
  rest(std::make_integer_sequence<int, kMost - 1>());
}

// The same of a strip's first `slots`. The second row tile of `a` is `bytes` on.
enum class Kind { kIntegers, kScaledIntegers, kBfloat16 };
template <Kind kKind>
void multiply_strip(int64_t slots, const uint8_t* a, int64_t bytes, const uint8_t* b, int64_t tiles,
                    const void* starts, Sums& sums) {
  const auto group = [&]<int kCount>(int64_t slot) {
    const uint8_t* const rows = a + slot / kTileRows * bytes + slot % kTileRows * kLine;
    float* const out = sums.values[0][0] + slot * kTileRows;
    if constexpr (kKind == Kind::kIntegers) {
      multiply_rows<true, kCount>(rows, b, tiles, static_cast<const int32_t*>(starts) + slot, out);
    } else {
      const float* const own =
          starts ? static_cast<const float*>(starts) + slot * kTileRows : nullptr;
      if constexpr (kKind == Kind::kBfloat16) {
        multiply_rows<false, kCount>(rows, b, tiles, own, out);
      } else {
        multiply_scaled_rows<kCount>(rows, b, tiles, own, out);
      }
    }
  };
  for_each_group<kKind == Kind::kScaledIntegers ? kScaledRows : kRows>(slots, group);
}

struct VectorProducts {
  struct Guard {
    Guard() {}
  };
  static constexpr int kOffset = kLargestInteger;
  static constexpr bool kScales = true;
  static constexpr int64_t kStreamedBytes = 0;

  // Decoded tiles, strips and sums stay in L2, of 1 MB. Of few strips tiles are read again soon.
  static constexpr int64_t kStrips = 8;
  static int64_t pairs(int64_t strips) { return strips <= 2 ? 2 : 16; }

  static bool is_streamed(const LinearTask&) { return false; }
  static void run_streamed(const Context&, int64_t) {}

  // See the same in amx_blocked.h.
  template <bool kIntegers>
  static void multiply_range(const BlockedContext& context, const Range& range,
                             const Decoded& decoded, int64_t tiles, uint32_t begun, bool ends) {
    const int64_t bytes = context.steps.bytes(), pairs = range.pairs();
    const int64_t integer_tiles = kIntegers ? range.step.integer_tiles : 0;
    // Tiles of scaled integers come after those of bands.
    const int64_t scaled = context.scaled_end + context.steps.tiles_less_blocks();
    const int64_t scaled_end = std::clamp(scaled - range.step.first_tile, integer_tiles, tiles);
    Sums &integers = context.sums[0], &floats = context.sums[1], *const all = context.sums + 2;
    for (int64_t s = range.s0; s < range.s1; ++s) {
      const uint8_t* const a =
          context.prepared + s * 2 * bytes + range.step.first_tile * kTileBytes;
      const int64_t factor = kIntegers ? context.steps.factor(s * kStripRows, range.number) : 0;
      const int64_t first_row = context.arrangement.first_row(s);
      const int64_t last_row = context.arrangement.first_row(s + 1);
      const int64_t slots = context.arrangement.end(s) - s * kStripRows;
      for (int64_t i = 0; i < decoded.count; ++i) {
        const int64_t pair = decoded.pairs[i];
        Sums* const sums = all + (s - range.s0) * pairs + pair;
        const bool begins = !(begun >> pair & 1), mixed = kIntegers && integer_tiles < tiles;
        const uint8_t* const b = context.decoded + i * range.pair_bytes();
        if constexpr (kIntegers) {
          multiply_strip<Kind::kIntegers>(slots, a, bytes, b, integer_tiles,
                                          context.row_starts + factor, integers);
        }
        // Then integers with their own scales, then bfloat16 numbers.
        Sums& rest = kIntegers || ends ? floats : *sums;
        const void* starts = kIntegers || begins ? nullptr : sums;
        const auto multiply_rest = [&]<Kind kKind>(int64_t first, int64_t last) {
          if (first >= last) return;
          multiply_strip<kKind>(slots, a + first * kTileBytes, bytes, b + first * 2 * kTileBytes,
                                last - first, starts, rest);
          starts = &rest;
        };
        multiply_rest.template operator()<Kind::kScaledIntegers>(integer_tiles, scaled_end);
        multiply_rest.template operator()<Kind::kBfloat16>(scaled_end, tiles);
        if (!kIntegers && !ends) continue;
        PairEnd end(context.task, kIntegers ? *sums : floats, &context.arrangement, first_row,
                    last_row, range.p0 + 2 * pair, range.p1);
        if constexpr (kIntegers) {
          end.add(integers, context.row_factors + factor, context.column_factors + i * kPairColumns,
                  mixed ? &floats : nullptr, begins, ends);
        }
        end.visit(context.task, [](const auto& end_of_rows) { end_of_rows(0, kStripRows); });
      }
    }
  }
};

}  // namespace

const LinearKernel kLinearAvx512Bf16 = ManyRows<VectorProducts>::kernel("avx512_bf16");

}  // namespace micromix::cpu
