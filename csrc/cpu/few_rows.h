// The product for few rows, on AVX-512 with VBMI and VNNI: each tile of the weight is decoded to
// registers once and meets up to 8 rows; one row meets four panels at once, up to 4 rows two. It is
// also the product for many rows where there is no AVX512-BF16.
//
// E2M1 (x2) and E2M3 (x8) are small integers, so a block's dot product is an exact integer: weights
// are looked up as unsigned bytes value + offset, and the sum starts at -offset * (sum of the
// activations). Activations that are no small integers are numbers of three bytes. Weights of other
// formats, and what they meet, are `Floats`:
//   fetch_ahead<lines, rows>(tile)
//   kDigitRows        up to so many rows numbers of three bytes pay; of more rows it multiplies
//   them; exponent(format)  the power of two that its numbers of a weight format lack; store(...)
//   puts a block of activations down; blocks<...>(...)  adds the products of a segment.
//
// Included only by files that are compiled for AVX-512; everything is local to the file.
#pragma once

#include <climits>

#include "float_rows_avx512.h"
#include "integer_bytes.h"

namespace micromix::cpu::avx512 {
namespace {

constexpr int kMaxRows = 8;
constexpr int kNoLimit = INT_MAX;

// How the activations of a segment are prepared, which their weight decides.
struct Units {
  int digits = 0;     // the bytes of an integer; 0 for float32
  int exponent = 0;   // elements are multiplied by 2^exponent,
  float rest = 1.0f;  // and their products by this in return, beside the scales

  template <typename Floats>
  static Units of(const LinearTask& task, const mx::Segment& segment) {
    const mx::ElementFormat weight = task.layout.weight_format(segment);
    const bool are_digits = task.weight_only || !mx::is_small_integer(segment.format);
    if (!mx::is_small_integer(weight) || (are_digits && task.m > Floats::kDigitRows)) {
      return Units(Floats::exponent(weight));
    }
    return Units(task, segment, weight);
  }

 private:
  Units(int exponent) : exponent(exponent) {}

  Units(const LinearTask& task, const mx::Segment& segment, mx::ElementFormat weight) {
    if (task.weight_only) {
      // A float over its block's power of two is below 2, so 32 products fit into 31 bits. What
      // lies 2^14 (E2M3: 2^12) below the block's largest loses bits that a float32 sum would lose.
      digits = 3;
      exponent = weight == mx::E2M1 ? 21 : 19;
    } else if (mx::is_small_integer(segment.format)) {
      digits = 1;
      exponent = segment.format == mx::E2M1 ? 1 : 3;
    } else {
      digits = 3;
      exponent = 9;  // every element of E4M3 and E3M2 is whole
    }
    rest = 1.0f / static_cast<float>(mx::integer_factor(weight) << exponent);
  }
};

// Bytes 0 and 1, and byte 2, of each word of two vectors of 16.
constexpr Table<uint8_t> byte_of_words(int first) {
  Table<uint8_t> table{};
  for (int i = 0; i < 64; ++i) {
    const int word = i % 32;
    table.values[i] = static_cast<uint8_t>((word < 16 ? 4 * word : 64 + 4 * (word - 16)) + first +
                                           (first ? 0 : i / 32));
  }
  return table;
}
constexpr Table<uint8_t> kByteOfWords[2] = {byte_of_words(0), byte_of_words(2)};
constexpr Table<uint16_t> kE3m2Float16 = float16_table(mx::E3M2);

// A prepared row: per block a factor (its scale over the integer factors), an exponent (of the
// scale, for the exact path), and the start of the integer sum; then the elements of all blocks,
// 128 bytes a block: 32 signed bytes, once or, the lowest first, three times; or floats, with
// channels 1 and 2 of each four exchanged, the order in which pairs of words come out of a tile.
struct Prepared {
  float* factor;
  int32_t* start;
  uint8_t* scale;
  uint8_t* elements;

  [[gnu::always_inline]] Prepared(uint8_t* row, int64_t blocks) {
    const int64_t padded = round_up(blocks, kLine / sizeof(float));
    factor = reinterpret_cast<float*>(row);
    start = reinterpret_cast<int32_t*>(row) + padded;
    scale = row + 2 * sizeof(float) * padded;
    elements = scale + round_up(blocks, kLine);
  }
};
constexpr int64_t kElementBytes = 128;

int64_t prepared_row_bytes(const mx::MixedLayout& layout) {
  const int64_t blocks = layout.blocks();
  return 2 * sizeof(float) * round_up(blocks, kLine / sizeof(float)) + round_up(blocks, kLine) +
         blocks * kElementBytes;
}

int64_t prepared_bytes(const LinearTask& task) { return task.m * prepared_row_bytes(task.layout); }

int64_t scratch_bytes(const LinearTask&) { return 0; }

template <int kBits>
[[gnu::always_inline]] inline void prepare_integer_blocks(const Prepared& row,
                                                          const mx::Segment& segment,
                                                          mx::ElementFormat weight,
                                                          const Units& units,
                                                          const uint8_t* packed) {
  for (int64_t b = segment.first_block; b < segment.first_block + segment.blocks; ++b) {
    const __m256i bytes = integer_bytes<kBits>(packed);
    _mm256_store_si256(reinterpret_cast<__m256i*>(row.elements + b * kElementBytes), bytes);
    row.start[b] = integer_start(bytes, weight);
    row.factor[b] = mx::scale_value(row.scale[b]) * units.rest;
    packed += kBits * 4;
  }
}

// Stores a block of floats whose scale byte is known, times 2^(units.exponent + exponent).
template <typename Floats>
[[gnu::always_inline]] inline void store_block(const Prepared& row, int64_t b, Block block,
                                               int exponent, mx::ElementFormat weight,
                                               const Units& units) {
  uint8_t* const elements = row.elements + b * kElementBytes;
  const __m512 power = _mm512_set1_ps(static_cast<float>(units.exponent + exponent));
  block = {_mm512_scalef_ps(block.low, power), _mm512_scalef_ps(block.high, power)};
  row.factor[b] = mx::scale_value(row.scale[b]) * units.rest;
  if (units.digits == 0) return Floats::store(block, elements);
  const __m512i low = _mm512_cvtps_epi32(block.low), high = _mm512_cvtps_epi32(block.high);
  // Unsigned: of a block of NaN they are anything, and the factor is NaN.
  const auto sum = static_cast<uint32_t>(_mm512_reduce_add_epi32(_mm512_add_epi32(low, high)));
  row.start[b] = static_cast<int32_t>(-static_cast<uint32_t>(integer_offset(weight)) * sum);
  // A number is the sum of 2^(8i) (byte i - 128) over the bytes of what it is with this added.
  const __m512i middle = _mm512_set1_epi32(0x808080);
  const __m512i bytes0 = _mm512_add_epi32(low, middle), bytes1 = _mm512_add_epi32(high, middle);
  const __m512i sign = _mm512_set1_epi8(INT8_MIN);
  const __m512i index0 = load(kByteOfWords[0].values), index2 = load(kByteOfWords[1].values);
  const __m512i first_two = _mm512_permutex2var_epi8(bytes0, index0, bytes1);
  const __m512i last = _mm512_permutex2var_epi8(bytes0, index2, bytes1);
  _mm512_store_si512(elements, _mm512_xor_si512(first_two, sign));
  _mm512_store_si512(elements + kLine, _mm512_xor_si512(last, sign));
}

template <typename Floats, int kBits>
[[gnu::always_inline]] inline void prepare_float_blocks(const Prepared& row,
                                                        const mx::Segment& segment,
                                                        mx::ElementFormat weight,
                                                        const Units& units, const uint8_t* packed) {
  for (int64_t b = segment.first_block; b < segment.first_block + segment.blocks; ++b) {
    const __m512i words = _mm512_cvtepu8_epi16(unpack<kBits>(packed));
    __m512i halves;
    if constexpr (kBits == 8) {
      halves = e4m3_to_float16(_mm512_slli_epi16(words, 8));
      const __mmask32 nan = _mm512_cmpeq_epi16_mask(
          _mm512_and_si512(words, _mm512_set1_epi16(0x7F)), _mm512_set1_epi16(0x7F));
      if (nan) row.scale[b] = mx::kNanScale;
    } else {
      halves = _mm512_permutex2var_epi16(load(kE3m2Float16.values), words,
                                         load(kE3m2Float16.values + 32));
    }
    const Block block = {_mm512_cvtph_ps(_mm512_castsi512_si256(halves)),
                         _mm512_cvtph_ps(_mm512_extracti64x4_epi64(halves, 1))};
    store_block<Floats>(row, b, block, kBits == 8 ? kE4m3Exponent : 0, weight, units);
    packed += kBits * 4;
  }
}

// sum + dot * 2^(weight scale + activation scale - 254), lane by lane. Plain: all weight scales are
// in the plain range, so dot times the first factor is exact. Wide: the power is applied in two
// halves, each normal or harmless, and NaN scales give NaN; `rest` is what the row's factor holds
// beside the scale.
template <bool kWide>
[[gnu::always_inline]] inline __m512 scaled_sum(__m512 sum, __m512 dot, __m512i weight_scale,
                                                const Prepared& row, int64_t block, float rest) {
  if constexpr (!kWide) {
    const __m512 scale = _mm512_castsi512_ps(_mm512_slli_epi32(weight_scale, 23));
    return _mm512_fmadd_ps(_mm512_mul_ps(dot, scale), _mm512_set1_ps(row.factor[block]), sum);
  }
  const int scale = row.scale[block];
  if (scale == mx::kNanScale) rest = mx::scale_value(mx::kNanScale);
  const __m512i power = _mm512_add_epi32(weight_scale, _mm512_set1_epi32(scale - 254));
  const __m512i half = _mm512_srai_epi32(power, 1);
  const auto power_of_two = [](__m512i e) {
    e = _mm512_add_epi32(e, _mm512_set1_epi32(127));
    e = _mm512_min_epi32(_mm512_max_epi32(e, _mm512_setzero_si512()), _mm512_set1_epi32(254));
    return _mm512_castsi512_ps(_mm512_slli_epi32(e, 23));
  };
  __m512 scaled = _mm512_mul_ps(_mm512_mul_ps(dot, _mm512_set1_ps(rest)), power_of_two(half));
  scaled = _mm512_mul_ps(scaled, power_of_two(_mm512_sub_epi32(power, half)));
  const __mmask16 nan = _mm512_cmpeq_epi32_mask(weight_scale, _mm512_set1_epi32(mx::kNanScale));
  scaled = _mm512_mask_blend_ps(nan, scaled, _mm512_set1_ps(mx::scale_value(mx::kNanScale)));
  return _mm512_add_ps(sum, scaled);
}

// Panels that are multiplied at once lie `bytes` apart; `scales` and `tile` are those of the first.
struct Panels {
  const uint8_t *scales, *tile;
  int64_t bytes;

  Panels from(int p) const { return {scales + p * bytes, tile + p * bytes, bytes}; }
  // The scale bytes of panel p in a block.
  [[gnu::always_inline]] __m128i block_scales(int p, int64_t block) const {
    return _mm_load_si128(reinterpret_cast<const __m128i*>(scales + p * bytes + block * kTileRows));
  }
};

template <typename Floats, int kBits, int kDigits, bool kWide, int kRows, int kPanels>
[[gnu::always_inline]] inline void integer_blocks(const mx::Segment& segment, float rest,
                                                  const Panels& panels, const Prepared* rows,
                                                  __m512 (*sums)[kRows]) {
  const uint8_t* tile = panels.tile;
  for (int64_t b = segment.first_block; b < segment.first_block + segment.blocks; ++b) {
#pragma GCC unroll 4
    for (int p = 0; p < kPanels; ++p) {
      __m512i w[8];
      Floats::template fetch_ahead<kBits, kRows>(tile + p * panels.bytes);
      decode_bytes<kBits>(tile + p * panels.bytes, w);
      const __m512i scale = _mm512_cvtepu8_epi32(panels.block_scales(p, b));
#pragma GCC unroll 8
      for (int m = 0; m < kRows; ++m) {
        const int32_t* const q =
            reinterpret_cast<const int32_t*>(rows[m].elements + b * kElementBytes);
        // Digits apart: one sum after the other would be as long as the processor looks ahead.
        __m512i dots[kDigits];
#pragma GCC unroll 3
        for (int d = 0; d < kDigits; ++d) {
          dots[d] = d == 0 ? _mm512_set1_epi32(rows[m].start[b]) : _mm512_setzero_si512();
#pragma GCC unroll 8
          for (int g = 0; g < 8; ++g) {
            dots[d] = _mm512_dpbusd_epi32(dots[d], w[g], _mm512_set1_epi32(q[8 * d + g]));
          }
        }
        __m512i dot = dots[0];
        if constexpr (kDigits == 3) {
          dot = _mm512_add_epi32(dot, _mm512_slli_epi32(dots[1], 8));
          dot = _mm512_add_epi32(dot, _mm512_slli_epi32(dots[2], 16));
        }
        sums[p][m] =
            scaled_sum<kWide>(sums[p][m], _mm512_cvtepi32_ps(dot), scale, rows[m], b, rest);
      }
    }
    tile += kBits * kLine;
  }
}

template <typename Floats>
struct FewRows {
  // Rows of float activations; each block is brought over a power of two, as in float_rows.h.
  static void prepare_rows(const LinearTask& task, int64_t first_row, int64_t last_row,
                           uint8_t* prepared) {
    const mx::MixedLayout& layout = task.layout;
    for (int64_t r = first_row; r < last_row; ++r) {
      const Prepared row(prepared + r * prepared_row_bytes(layout), layout.blocks());
      for_each_float_block(task, r, [&](const mx::Segment& segment, int64_t b, Block block) {
        const auto units = Units::of<Floats>(task, segment);
        const int scale = power_of_two_over(_mm512_reduce_max_epu32(magnitudes(block)));
        row.scale[b] = static_cast<uint8_t>(scale);
        store_block<Floats>(row, b, block, mx::kFloat32Bias - scale, layout.weight_format(segment),
                            units);
      });
    }
  }

  static void prepare(const LinearTask& task, int64_t first_row, int64_t last_row,
                      uint8_t* prepared) {
    if (task.weight_only) return prepare_rows(task, first_row, last_row, prepared);
    const mx::MixedLayout& layout = task.layout;
    const int64_t blocks = layout.blocks();
    for (int64_t r = first_row; r < last_row; ++r) {
      const Prepared row(prepared + r * prepared_row_bytes(layout), blocks);
      std::memcpy(row.scale, task.scales + r * blocks, blocks);
      for (const mx::Segment& segment : layout.segments()) {
        const mx::ElementFormat weight = layout.weight_format(segment);
        const uint8_t* const packed = task.data + r * layout.row_bytes() + segment.byte_start;
        const auto units = Units::of<Floats>(task, segment);
        if (segment.format == mx::E2M1) {
          prepare_integer_blocks<4>(row, segment, weight, units, packed);
        } else if (segment.format == mx::E2M3) {
          prepare_integer_blocks<6>(row, segment, weight, units, packed);
        } else if (segment.format == mx::E3M2) {
          prepare_float_blocks<Floats, 6>(row, segment, weight, units, packed);
        } else {
          prepare_float_blocks<Floats, 8>(row, segment, weight, units, packed);
        }
      }
    }
  }

  // Panels `first_panel` and, if they are two, `apart` panels on.
  template <bool kWide, int kRows, int kPanels>
  static void run_rows(const LinearTask& task, const uint8_t* prepared, int64_t first_panel,
                       int64_t apart, int64_t first_row) {
    const mx::MixedLayout& layout = task.layout;
    const PlacedLayout sizes(layout, task.n);
    const uint8_t* const scales = task.weight + kLine + first_panel * sizes.panel_bytes;
    Panels panels = {scales, scales + sizes.scale_bytes, apart * sizes.panel_bytes};
    const auto row = [&](int m) {
      return Prepared(const_cast<uint8_t*>(prepared) + (first_row + m) * prepared_row_bytes(layout),
                      layout.blocks());
    };
    Prepared rows[8] = {row(0), row(1), row(2), row(3), row(4), row(5), row(6), row(7)};
    __m512 sums[kPanels][kRows];
    for (int p = 0; p < kPanels; ++p) {
      for (int m = 0; m < kRows; ++m) sums[p][m] = _mm512_setzero_ps();
    }
    for (const mx::Segment& segment : layout.segments()) {
      if (segment.blocks == 0) continue;
      const mx::ElementFormat weight = layout.weight_format(segment);
      const auto units = Units::of<Floats>(task, segment);
      const auto integers = [&]<int kBits, int kDigits>() __attribute__((always_inline)) {
        integer_blocks<Floats, kBits, kDigits, kWide, kRows, kPanels>(segment, units.rest, panels,
                                                                      rows, sums);
      };
      if (weight == mx::E2M1 && units.digits == 1) integers.template operator()<4, 1>();
      if (weight == mx::E2M3 && units.digits == 1) integers.template operator()<6, 1>();
      if constexpr (kRows <= Floats::kDigitRows) {
        if (weight == mx::E2M1 && units.digits == 3) integers.template operator()<4, 3>();
        if (weight == mx::E2M3 && units.digits == 3) integers.template operator()<6, 3>();
      }
      // Floats of more rows and panels than these would not fit the registers.
      constexpr int kAtOnce = kRows <= 2 ? kPanels : 1;
      const auto floats = [&]<mx::ElementFormat kFormat>() __attribute__((always_inline)) {
        if (weight != kFormat || units.digits != 0) return;
        for (int p = 0; p < kPanels; p += kAtOnce) {
          Floats::template blocks<kFormat, kWide, kRows, kAtOnce>(segment, panels.from(p), rows,
                                                                  sums + p);
        }
      };
      floats.template operator()<mx::E3M2>();
      floats.template operator()<mx::E4M3>();
      if constexpr (Floats::kDigitRows < kNoLimit) {
        floats.template operator()<mx::E2M1>();
        floats.template operator()<mx::E2M3>();
      }
      panels.tile += segment.blocks * tile_bytes(weight);
    }
    for (int p = 0; p < kPanels; ++p) {
      const int64_t panel = first_panel + p * apart;
      const __mmask16 columns = column_mask(task, panel);
      for (int m = 0; m < kRows; ++m) finish(task, first_row + m, panel, columns, sums[p][m]);
    }
  }

  // Few rows take as long as memory gives the weight, and it gives more to who reads at several
  // places: panel i of each part of the range at once.
  template <bool kWide, int kRows>
  static void run_few_rows(const LinearTask& task, const uint8_t* prepared, int64_t first,
                           int64_t last) {
    constexpr int kParts = kRows == 1 ? 4 : 2;
    const int64_t part = (last - first) / kParts;
    for (int64_t p = first; p < first + part; ++p) {
      run_rows<kWide, kRows, kParts>(task, prepared, p, part, 0);
    }
    for (int64_t p = first + kParts * part; p < last; ++p) {
      run_rows<kWide, kRows, 1>(task, prepared, p, 0, 0);
    }
  }

  template <bool kWide>
  static void run_panels(const LinearTask& task, const uint8_t* prepared, int64_t first,
                         int64_t last) {
    if (task.m == 1) return run_few_rows<kWide, 1>(task, prepared, first, last);
    if (task.m == 2) return run_few_rows<kWide, 2>(task, prepared, first, last);
    if (task.m == 3) return run_few_rows<kWide, 3>(task, prepared, first, last);
    if (task.m == 4) return run_few_rows<kWide, 4>(task, prepared, first, last);
    // Rows that stay in the second-level cache meet all panels, then the next do.
    constexpr int64_t kCached = 512 << 10;
    const int64_t row_bytes = prepared_row_bytes(task.layout);  // none without channels
    const int64_t groups = row_bytes > 0 ? kCached / row_bytes / kMaxRows : 1;
    const int64_t chunk = (groups > 0 ? groups : 1) * kMaxRows;
    for (int64_t start = 0; start < task.m; start += chunk) {
      const int64_t end = start + chunk < task.m ? start + chunk : task.m;
      for (int64_t p = first; p < last; ++p) {
        int64_t m = start;
        for (; m + 8 <= end; m += 8) run_rows<kWide, 8, 1>(task, prepared, p, 0, m);
        for (; m + 4 <= end; m += 4) run_rows<kWide, 4, 1>(task, prepared, p, 0, m);
        for (; m + 3 <= end; m += 3) run_rows<kWide, 3, 1>(task, prepared, p, 0, m);
        for (; m + 2 <= end; m += 2) run_rows<kWide, 2, 1>(task, prepared, p, 0, m);
        for (; m < end; ++m) run_rows<kWide, 1, 1>(task, prepared, p, 0, m);
      }
    }
  }

  static void run(const LinearTask& task, const uint8_t* prepared, int64_t first_panel,
                  int64_t last_panel, void*) {
    if (reinterpret_cast<const PlacedHeader*>(task.weight)->has_wide_scales) {
      run_panels<true>(task, prepared, first_panel, last_panel);
    } else {
      run_panels<false>(task, prepared, first_panel, last_panel);
    }
  }

  static constexpr LinearKernel kernel(const char* name) {
    return {name, 1 << 15, 1 << 19, prepared_bytes, scratch_bytes, prepare, run};
  }
};

}  // namespace
}  // namespace micromix::cpu::avx512
