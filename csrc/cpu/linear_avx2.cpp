// The product on AVX2 with FMA and F16C: each tile of the weight is decoded to float32 once for up
// to 16 rows. Elements of every format become float16 numbers by moving their bits: the exponent's
// bias makes them a power of two too small, and subnormal elements subnormal numbers, which the
// conversion to float32 keeps.
#include "avx2.h"
#include "float_rows.h"

namespace micromix::cpu {
namespace {

using namespace avx2;

constexpr int kRows = 16;  // rows that share a decoded tile

// What an element's value is over that of its float16: 2^(15 - bias).
constexpr float float16_factor(mx::ElementFormat format) {
  return mx::scale_value(static_cast<uint8_t>(mx::kFloat32Bias + 15 - format.bias));
}

// Codes, one in each word, to float16.
template <mx::ElementFormat kFormat>
[[gnu::always_inline]] inline __m256i to_float16(__m256i codes) {
  constexpr int kSign = 1 << (kFormat.bits - 1);
  const __m256i sign = _mm256_and_si256(codes, _mm256_set1_epi16(kSign));
  const __m256i rest = _mm256_and_si256(codes, _mm256_set1_epi16(kSign - 1));
  return _mm256_or_si256(_mm256_slli_epi16(sign, 16 - kFormat.bits),
                         _mm256_slli_epi16(rest, 10 - kFormat.mantissa_bits));
}

// A prepared row: per block the value of its scale, and its scale byte; then the elements in
// float32, times the float16 factor of the weight, channels 1 and 2 of each four exchanged.
struct Prepared {
  float* factor;
  uint8_t* scale;
  float* elements;

  Prepared(uint8_t* row, int64_t blocks)
      : factor(reinterpret_cast<float*>(row)),
        scale(row + round_up(blocks, 16) * sizeof(float)),
        elements(reinterpret_cast<float*>(scale + round_up(blocks, kLine))) {}
};

int64_t prepared_row_bytes(const mx::MixedLayout& layout) {
  return round_up(layout.blocks(), 16) * sizeof(float) + round_up(layout.blocks(), kLine) +
         layout.channels() * sizeof(float);
}

int64_t prepared_bytes(const LinearTask& task) { return task.m * prepared_row_bytes(task.layout); }

// One decoded tile: 16 pairs of channels x 16 rows of the panel x 2 channels.
struct alignas(kLine) Decoded {
  float values[16][4][8];
};

int64_t scratch_bytes(const LinearTask&) { return sizeof(Decoded) + kRows * 4 * 8 * sizeof(float); }

// The place of a channel in its block.
constexpr int place_of(int k) { return k % 4 == 1 ? k + 1 : k % 4 == 2 ? k - 1 : k; }

void prepare_floats(const LinearTask& task, int64_t first_row, int64_t last_row,
                    uint8_t* prepared) {
  const mx::MixedLayout& layout = task.layout;
  for (int64_t r = first_row; r < last_row; ++r) {
    const Prepared row(prepared + r * prepared_row_bytes(layout), layout.blocks());
    for (const mx::Segment& segment : layout.segments()) {
      const float factor = float16_factor(layout.weight_format(segment));
      for (int64_t b = segment.first_block; b < segment.first_block + segment.blocks; ++b) {
        float values[mx::kBlock];
        load_block(task, r, b, segment.hadamard, values);
        row.scale[b] = normalise_block(values);
        row.factor[b] = mx::scale_value(row.scale[b]);
        for (int k = 0; k < mx::kBlock; ++k) {
          row.elements[b * mx::kBlock + place_of(k)] = values[k] * factor;
        }
      }
    }
  }
}

void prepare(const LinearTask& task, int64_t first_row, int64_t last_row, uint8_t* prepared) {
  if (task.weight_only) return prepare_floats(task, first_row, last_row, prepared);
  const mx::MixedLayout& layout = task.layout;
  for (int64_t r = first_row; r < last_row; ++r) {
    const Prepared row(prepared + r * prepared_row_bytes(layout), layout.blocks());
    const uint8_t* const scales = task.scales + r * layout.blocks();
    for (const mx::Segment& segment : layout.segments()) {
      const float factor = float16_factor(layout.weight_format(segment));
      float values[256];
      for (int code = 0; code < 1 << segment.format.bits; ++code) {
        values[code] = mx::decode(static_cast<uint8_t>(code), segment.format) * factor;
      }
      const uint8_t* packed = task.data + r * layout.row_bytes() + segment.byte_start;
      for (int64_t b = segment.first_block; b < segment.first_block + segment.blocks; ++b) {
        uint8_t codes[mx::kBlock];
        mx::unpack_block(packed, segment.format.bits, codes);
        uint8_t scale = scales[b];
        for (int k = 0; k < mx::kBlock; ++k) {
          row.elements[b * mx::kBlock + place_of(k)] = values[codes[k]];
          if (mx::is_nan(codes[k], segment.format)) scale = mx::kNanScale;
        }
        row.scale[b] = scale;
        row.factor[b] = mx::scale_value(scale);
        packed += mx::block_bytes(segment.format);
      }
    }
  }
}

// Words 2n + h of half a line of a tile are channel c + 2h of row n of the panel; four results.
[[gnu::always_inline]] inline void store_pair(float (*out)[8], int half, __m256i halves) {
  _mm256_store_ps(out[2 * half], _mm256_cvtph_ps(_mm256_castsi256_si128(halves)));
  _mm256_store_ps(out[2 * half + 1], _mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1)));
}

template <mx::ElementFormat kFormat>
[[gnu::always_inline]] inline void decode_tile(const uint8_t* tile, Decoded& out) {
  const __m256i low_byte = _mm256_set1_epi16(0xFF);
  for (int g = 0; g < 8; ++g) {
    for (int half = 0; half < 2; ++half) {
      __m256i codes;
      if constexpr (kFormat.bits == 8) {
        codes = load(tile + g * kLine + half * 32);
      } else {
        const int j = g / 2;
        const __m256i line = load(tile + j * kLine + half * 32);
        const __m256i nibbles = g % 2 ? _mm256_srli_epi16(line, 4) : line;
        codes = _mm256_and_si256(nibbles, _mm256_set1_epi8(0xF));
        if constexpr (kFormat.bits == 6) {
          const int shift = 4 * (j % 2) + 2 * (g % 2);
          const __m256i high = load(tile + (4 + j / 2) * kLine + half * 32);
          const __m256i moved =
              shift < 4 ? _mm256_slli_epi16(high, 4 - shift) : _mm256_srli_epi16(high, shift - 4);
          codes = _mm256_or_si256(codes, _mm256_and_si256(moved, _mm256_set1_epi8(0x30)));
        }
      }
      store_pair(out.values[2 * g], half, to_float16<kFormat>(_mm256_and_si256(codes, low_byte)));
      store_pair(out.values[2 * g + 1], half, to_float16<kFormat>(_mm256_srli_epi16(codes, 8)));
    }
  }
}

// sum + dot * 2^(weight scale + activation scale - 254): see the same in linear_avx512.cpp.
template <bool kWide>
[[gnu::always_inline]] inline __m256 scaled_sum(__m256 sum, __m256 dot, __m256i weight_scale,
                                                float factor, int scale) {
  if constexpr (!kWide) {
    const __m256 power = _mm256_castsi256_ps(_mm256_slli_epi32(weight_scale, 23));
    return _mm256_fmadd_ps(_mm256_mul_ps(dot, power), _mm256_set1_ps(factor), sum);
  }
  const __m256i power = _mm256_add_epi32(weight_scale, _mm256_set1_epi32(scale - 254));
  const __m256i half = _mm256_srai_epi32(power, 1);
  const auto power_of_two = [](__m256i e) {
    e = _mm256_add_epi32(e, _mm256_set1_epi32(127));
    e = _mm256_min_epi32(_mm256_max_epi32(e, _mm256_setzero_si256()), _mm256_set1_epi32(254));
    return _mm256_castsi256_ps(_mm256_slli_epi32(e, 23));
  };
  __m256 scaled = _mm256_mul_ps(dot, power_of_two(half));
  scaled = _mm256_mul_ps(scaled, power_of_two(_mm256_sub_epi32(power, half)));
  const __m256i nan_scale = _mm256_set1_epi32(mx::kNanScale);
  __m256i nan = _mm256_cmpeq_epi32(weight_scale, nan_scale);
  nan = _mm256_or_si256(nan, _mm256_cmpeq_epi32(_mm256_set1_epi32(scale), nan_scale));
  scaled = _mm256_blendv_ps(scaled, _mm256_set1_ps(mx::scale_value(mx::kNanScale)),
                            _mm256_castsi256_ps(nan));
  return _mm256_add_ps(sum, scaled);
}

// Adds a block's products of one or two rows to their sums, [row][4][8].
template <bool kWide, int kCount>
[[gnu::always_inline]] inline void add_block(const Decoded& tile, const uint8_t* scales,
                                             const Prepared* rows, int64_t block, float* sums) {
  __m256 dot[kCount][4];
  for (int m = 0; m < kCount; ++m) {
    for (int q = 0; q < 4; ++q) dot[m][q] = _mm256_setzero_ps();
  }
  for (int pair = 0; pair < 16; ++pair) {
#pragma GCC unroll 2
    for (int m = 0; m < kCount; ++m) {
      const double* const pairs =
          reinterpret_cast<const double*>(rows[m].elements + block * mx::kBlock);
      const __m256 x = _mm256_castpd_ps(_mm256_broadcast_sd(pairs + pair));
#pragma GCC unroll 4
      for (int q = 0; q < 4; ++q) {
        dot[m][q] = _mm256_fmadd_ps(_mm256_load_ps(tile.values[pair][q]), x, dot[m][q]);
      }
    }
  }
  const __m128i scale = _mm_loadu_si128(reinterpret_cast<const __m128i*>(scales));
  const __m128i low = _mm_unpacklo_epi8(scale, scale), high = _mm_unpackhi_epi8(scale, scale);
  const __m256i twice[4] = {_mm256_cvtepu8_epi32(low), _mm256_cvtepu8_epi32(_mm_srli_si128(low, 8)),
                            _mm256_cvtepu8_epi32(high),
                            _mm256_cvtepu8_epi32(_mm_srli_si128(high, 8))};
  for (int m = 0; m < kCount; ++m) {
    for (int q = 0; q < 4; ++q) {
      float* const sum = sums + (4 * m + q) * 8;
      _mm256_store_ps(sum, scaled_sum<kWide>(_mm256_load_ps(sum), dot[m][q], twice[q],
                                             rows[m].factor[block], rows[m].scale[block]));
    }
  }
}

template <bool kWide>
void run_rows(const LinearTask& task, const uint8_t* prepared, const uint8_t* panel,
              int64_t scale_bytes, int64_t first_row, int rows, Decoded& decoded, float* sums) {
  const mx::MixedLayout& layout = task.layout;
  const auto row = [&](int64_t m) {
    return Prepared(const_cast<uint8_t*>(prepared) + (first_row + m) * prepared_row_bytes(layout),
                    layout.blocks());
  };
  const uint8_t* tile = panel + scale_bytes;
  for (const mx::Segment& segment : layout.segments()) {
    const mx::ElementFormat format = layout.weight_format(segment);
    for (int64_t b = segment.first_block; b < segment.first_block + segment.blocks; ++b) {
      if (format == mx::E2M1) decode_tile<mx::E2M1>(tile, decoded);
      if (format == mx::E2M3) decode_tile<mx::E2M3>(tile, decoded);
      if (format == mx::E3M2) decode_tile<mx::E3M2>(tile, decoded);
      if (format == mx::E4M3) decode_tile<mx::E4M3>(tile, decoded);
      int m = 0;
      for (; m + 2 <= rows; m += 2) {
        const Prepared two[2] = {row(m), row(m + 1)};
        add_block<kWide, 2>(decoded, panel + b * kTileRows, two, b, sums + m * 32);
      }
      if (m < rows) {
        const Prepared one = row(m);
        add_block<kWide, 1>(decoded, panel + b * kTileRows, &one, b, sums + m * 32);
      }
      tile += tile_bytes(format);
    }
  }
}

void run(const LinearTask& task, const uint8_t* prepared, int64_t first_panel, int64_t last_panel,
         void* scratch) {
  const PlacedLayout sizes(task.layout, task.n);
  const bool wide = reinterpret_cast<const PlacedHeader*>(task.weight)->has_wide_scales;
  Decoded& decoded = *static_cast<Decoded*>(scratch);
  float* const sums = reinterpret_cast<float*>(&decoded + 1);
  for (int64_t p = first_panel; p < last_panel; ++p) {
    const uint8_t* const panel = task.weight + kLine + p * sizes.panel_bytes;
    const int64_t left = task.n - p * kTileRows;
    const int columns = static_cast<int>(left < kTileRows ? left : kTileRows);
    for (int64_t m0 = 0; m0 < task.m; m0 += kRows) {
      const int rows = static_cast<int>(task.m - m0 < kRows ? task.m - m0 : kRows);
      std::memset(sums, 0, rows * 32 * sizeof(float));
      const auto f = wide ? run_rows<true> : run_rows<false>;
      f(task, prepared, panel, sizes.scale_bytes, m0, rows, decoded, sums);
      for (int m = 0; m < rows; ++m) {
        for (int c = 0; c < columns; ++c) {
          const int64_t n = p * kTileRows + c;
          const float bias = task.bias ? load_float(task.bias, task.bias_dtype, n) : 0.0f;
          const float* const pair = sums + m * 32 + 2 * c;
          store_float(task.out, task.out_dtype, (m0 + m) * task.n + n, pair[0] + pair[1] + bias);
        }
      }
    }
  }
}

}  // namespace

const LinearKernel kLinearAvx2 = {"avx2",        1 << 13, 1 << 18, prepared_bytes,
                                  scratch_bytes, prepare, run};

}  // namespace micromix::cpu
