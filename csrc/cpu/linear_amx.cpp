// The product for many rows, on AMX: both operands are decoded to bfloat16 tiles with their scales
// applied, and summed in float32 over the whole K.
//
// An MX element times its scale is a bfloat16 number, and no product or sum leaves the normal
// float32 range (AMX takes subnormal numbers for zero), while scales are in the plain range. A
// weight with other scales never comes here; an activation row with other scales is done again by
// the AVX-512 kernel.
#include "avx512.h"

namespace micromix::cpu {
namespace {

using namespace avx512;

constexpr int64_t kTileBytes = 1024;           // 16 rows of 32 bfloat16
constexpr int64_t kMaxBlocks = 128;            // of K, decoded at once
constexpr int64_t kDecodedBytes = 1280 << 10;  // decoded weight that shares L2 with two row tiles
constexpr int64_t kStreamedRows = 32;          // up to these, sums stay in tiles over all of K
constexpr int64_t kStreamedBlocks = 8;

constexpr Table<uint16_t> kE2m1 = bfloat16_table(mx::E2M1);
constexpr Table<uint16_t> kE2m3 = bfloat16_table(mx::E2M3);
constexpr Table<uint16_t> kE3m2 = bfloat16_table(mx::E3M2);

// Subnormal E4M3 codes as bfloat16, by their mantissa, repeated.
constexpr Table<uint16_t> e4m3_subnormals() {
  Table<uint16_t> table{};
  for (int i = 0; i < 64; ++i) {
    table.values[i] = float_to_bfloat16(mx::decode(static_cast<uint8_t>(i & 7), mx::E4M3));
  }
  return table;
}
constexpr Table<uint16_t> kE4m3Subnormals = e4m3_subnormals();

// E4M3 codes, in the low bytes of words whose high bytes are anything, to bfloat16. `signs` has
// their sign bits on top of its words.
[[gnu::always_inline]] inline __m512i e4m3_to_bfloat16(__m512i codes, __m512i signs) {
  const __m512i magnitude = _mm512_and_si512(codes, _mm512_set1_epi16(0x7F));
  const __m512i normal = _mm512_add_epi16(_mm512_slli_epi16(magnitude, 4),
                                          _mm512_set1_epi16((mx::kFloat32Bias - 7) << 7));
  const __mmask32 small = _mm512_cmplt_epu16_mask(magnitude, _mm512_set1_epi16(8));
  const __m512i value = _mm512_mask_permutexvar_epi16(normal, small, codes, load(&kE4m3Subnormals));
  return _mm512_ternarylogic_epi64(value, signs, _mm512_set1_epi16(INT16_MIN), 0xF8);
}

// `words` times a power of two: adds to the exponents, of all but zeros.
[[gnu::always_inline]] inline __m512i scaled(__m512i words, __m512i exponent) {
  const __mmask32 nonzero = _mm512_test_epi16_mask(words, _mm512_set1_epi16(0x7FFF));
  return _mm512_mask_add_epi16(words, nonzero, words, exponent);
}

// A tile of the weight, as 16 pairs of channels x 16 rows: pair 2g holds channels 4g and 4g + 2,
// pair 2g + 1 channels 4g + 1 and 4g + 3.
template <mx::ElementFormat kFormat>
[[gnu::always_inline]] inline void decode_tile(const uint8_t* tile, const uint8_t* scales,
                                               uint8_t* out) {
  const __m128i scale = _mm_load_si128(reinterpret_cast<const __m128i*>(scales));
  const __m256i twice =
      _mm256_set_m128i(_mm_unpackhi_epi8(scale, scale), _mm_unpacklo_epi8(scale, scale));
  const __m512i exponent = _mm512_slli_epi16(
      _mm512_sub_epi16(_mm512_cvtepu8_epi16(twice), _mm512_set1_epi16(mx::kFloat32Bias)), 7);
  const auto put = [&](int pair, __m512i words) [[gnu::always_inline]] {
    _mm512_store_si512(out + pair * kLine, scaled(words, exponent));
  };
  if constexpr (kFormat == mx::E2M1) {
    const __m512i table = load(&kE2m1);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const __m512i line = load(tile + j * kLine);
#pragma GCC unroll 4
      for (int t = 0; t < 4; ++t) {
        put(4 * j + 2 * (t % 2) + t / 2,
            _mm512_permutexvar_epi16(_mm512_srli_epi16(line, 4 * t), table));
      }
    }
  } else if constexpr (kFormat == mx::E4M3) {
#pragma GCC unroll 8
    for (int g = 0; g < 8; ++g) {
      const __m512i line = load(tile + g * kLine);
      put(2 * g, e4m3_to_bfloat16(line, _mm512_slli_epi16(line, 8)));
      put(2 * g + 1, e4m3_to_bfloat16(_mm512_srli_epi16(line, 8), line));
    }
  } else {
    const uint16_t* const values = kFormat == mx::E2M3 ? kE2m3.values : kE3m2.values;
    const __m512i low_bits = _mm512_set1_epi8(0xF);
    const __m512i table0 = load(values), table1 = load(values + 32);
#pragma GCC unroll 8
    for (int g = 0; g < 8; ++g) {
      const int j = g / 2, shift = 4 * (j % 2) + 2 * (g % 2);
      const __m512i line = load(tile + j * kLine), high = load(tile + (4 + j / 2) * kLine);
      const __m512i low = g % 2 ? _mm512_srli_epi16(line, 4) : line;
      const __m512i moved =
          shift < 4 ? _mm512_slli_epi16(high, 4 - shift) : _mm512_srli_epi16(high, shift - 4);
      const __m512i codes = _mm512_ternarylogic_epi64(low_bits, low, moved, 0xCA);
      put(2 * g, _mm512_permutex2var_epi16(table0, codes, table1));
      put(2 * g + 1, _mm512_permutex2var_epi16(table0, _mm512_srli_epi16(codes, 8), table1));
    }
  }
}

// Decodes blocks [first, last) of a panel; tiles go to out, `stride` bytes apart.
void decode_panel(const mx::MixedLayout& layout, const uint8_t* panel, int64_t scale_bytes,
                  int64_t first, int64_t last, uint8_t* out, int64_t stride) {
  const uint8_t* tiles = panel + scale_bytes;
  for (const mx::Segment& segment : layout.segments()) {
    const mx::ElementFormat format = layout.weight_format(segment);
    const int64_t begin = first > segment.first_block ? first : segment.first_block;
    const int64_t segment_end = segment.first_block + segment.blocks;
    const int64_t end = last < segment_end ? last : segment_end;
    const auto decode = [&]<mx::ElementFormat kFormat>() [[gnu::always_inline]] {
      for (int64_t b = begin; b < end; ++b) {
        decode_tile<kFormat>(tiles + (b - segment.first_block) * tile_bytes(kFormat),
                             panel + b * kTileRows, out + (b - first) * stride);
      }
    };
    if (format == mx::E2M1) decode.template operator()<mx::E2M1>();
    if (format == mx::E2M3) decode.template operator()<mx::E2M3>();
    if (format == mx::E3M2) decode.template operator()<mx::E3M2>();
    if (format == mx::E4M3) decode.template operator()<mx::E4M3>();
    tiles += segment.blocks * tile_bytes(format);
  }
}

// Prepared activations: tiles of 16 rows x 32 channels, all blocks of 16 rows side by side, in the
// order of channels that the tiles of the weight have; then one byte per row that says whether some
// scale lies outside the plain range.
int64_t row_tiles(const LinearTask& task) { return (task.m + kTileRows - 1) / kTileRows; }

int64_t tiles_bytes(const LinearTask& task) {
  return row_tiles(task) * task.layout.blocks() * kTileBytes;
}

int64_t prepared_bytes(const LinearTask& task) { return tiles_bytes(task) + task.m; }

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
    __m512i values;
    bool nan = scale == mx::kNanScale;
    if constexpr (kFormat == mx::E4M3) {
      values = e4m3_to_bfloat16(words, _mm512_slli_epi16(words, 8));
      nan |= _mm512_cmpeq_epi16_mask(_mm512_and_si512(words, _mm512_set1_epi16(0x7F)),
                                     _mm512_set1_epi16(0x7F)) != 0;
    } else {
      const uint16_t* const table = kFormat == mx::E2M1   ? kE2m1.values
                                    : kFormat == mx::E2M3 ? kE2m3.values
                                                          : kE3m2.values;
      values = _mm512_permutex2var_epi16(load(table), words, load(table + 32));
    }
    if (nan) {
      values = _mm512_set1_epi16(0x7FC0);
    } else if (scale < kSmallestPlainScale || scale > kLargestPlainScale) {
      wide |= _mm512_test_epi16_mask(values, _mm512_set1_epi16(0x7FFF)) != 0;
    } else {
      values =
          scaled(values, _mm512_set1_epi16(static_cast<int16_t>((scale - mx::kFloat32Bias) * 128)));
    }
    _mm512_store_si512(out + b * kTileBytes, values);
    packed += kFormat.bits * 4;
  }
  return wide;
}

void prepare(const LinearTask& task, int64_t first_row, int64_t last_row, uint8_t* prepared) {
  const mx::MixedLayout& layout = task.layout;
  for (int64_t r = first_row; r < last_row; ++r) {
    uint8_t* const out =
        prepared + r / kTileRows * layout.blocks() * kTileBytes + r % kTileRows * kLine;
    const uint8_t* const data = task.data + r * layout.row_bytes();
    const uint8_t* const scales = task.scales + r * layout.blocks();
    bool wide = false;
    for (const mx::Segment& s : layout.segments()) {
      const uint8_t* const packed = data + s.byte_start;
      if (s.format == mx::E2M1) wide |= prepare_blocks<mx::E2M1>(s, packed, scales, out);
      if (s.format == mx::E2M3) wide |= prepare_blocks<mx::E2M3>(s, packed, scales, out);
      if (s.format == mx::E3M2) wide |= prepare_blocks<mx::E3M2>(s, packed, scales, out);
      if (s.format == mx::E4M3) wide |= prepare_blocks<mx::E4M3>(s, packed, scales, out);
    }
    prepared[tiles_bytes(task) + r] = wide;
  }
}

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

void configure_tiles() {
  TileConfig config;
  for (int i = 0; i < 8; ++i) {
    config.row_bytes[i] = kLine;
    config.rows[i] = kTileRows;
  }
  asm volatile("" : : : "memory");  // gcc 12 does not see that the next line reads all of `config`
  _tile_loadconfig(&config);
}

// Tiles 0-3 hold the sums of 2 x 2 tiles, 4 and 5 the activations, 6 and 7 the weight.
void clear_sums() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

template <int kRowTiles, int kColumnTiles>
[[gnu::always_inline]] inline void multiply(const uint8_t* a0, const uint8_t* a1, const uint8_t* b,
                                            int64_t blocks) {
  asm volatile("" : : : "memory");  // nor that _tile_loadd reads memory
  for (int64_t i = 0; i < blocks; ++i) {
    _tile_loadd(6, b + i * kColumnTiles * kTileBytes, kLine);
    _tile_loadd(4, a0 + i * kTileBytes, kLine);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (kColumnTiles == 2) {
      _tile_loadd(7, b + (i * kColumnTiles + 1) * kTileBytes, kLine);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (kRowTiles == 2) {
      _tile_loadd(5, a1 + i * kTileBytes, kLine);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (kColumnTiles == 2) _tile_dpbf16ps(3, 5, 7);
    }
  }
}

// The sums of up to 32 x 32 outputs in memory, as the tiles are: [row tile][column tile].
struct alignas(64) Sums {
  float values[2][2][kTileRows][kTileRows];
};

void store_sums(Sums& sums) {
  _tile_stored(0, sums.values[0][0], kLine);
  _tile_stored(1, sums.values[0][1], kLine);
  _tile_stored(2, sums.values[1][0], kLine);
  _tile_stored(3, sums.values[1][1], kLine);
}

void load_sums(const Sums& sums) {
  asm volatile("" : : : "memory");
  _tile_loadd(0, sums.values[0][0], kLine);
  _tile_loadd(1, sums.values[0][1], kLine);
  _tile_loadd(2, sums.values[1][0], kLine);
  _tile_loadd(3, sums.values[1][1], kLine);
}

void finish_sums(const LinearTask& task, const Sums& sums, int64_t first_row, int64_t panel,
                 int column_tiles) {
  const int64_t rows = task.m - first_row < 2 * kTileRows ? task.m - first_row : 2 * kTileRows;
  for (int c = 0; c < column_tiles; ++c) {
    const __mmask16 columns = column_mask(task, panel + c);
    for (int64_t r = 0; r < rows; ++r) {
      const float* const row = sums.values[r / kTileRows][c][r % kTileRows];
      finish(task, first_row + r, panel + c, columns, _mm512_load_ps(row));
    }
  }
}

void multiply_tiles(int row_tiles, int column_tiles, const uint8_t* a0, const uint8_t* a1,
                    const uint8_t* b, int64_t blocks) {
  if (row_tiles == 2) {
    if (column_tiles == 2) {
      multiply<2, 2>(a0, a1, b, blocks);
    } else {
      multiply<2, 1>(a0, a1, b, blocks);
    }
  } else if (column_tiles == 2) {
    multiply<1, 2>(a0, a1, b, blocks);
  } else {
    multiply<1, 1>(a0, a1, b, blocks);
  }
}

// One call's panels, and where things are.
struct Context {
  const LinearTask& task;
  const PlacedLayout sizes;
  const uint8_t* prepared;
  uint8_t* decoded;
  int64_t blocks;

  const uint8_t* panel(int64_t p) const { return task.weight + kLine + p * sizes.panel_bytes; }
  // Blocks of the 16 rows from 16 * tile on; a tile beyond the last stands in for it.
  const uint8_t* rows(int64_t tile, int64_t block) const {
    const int64_t last = row_tiles(task) - 1;
    return prepared + ((tile < last ? tile : last) * blocks + block) * kTileBytes;
  }
  void decode(int64_t p, int column_tiles, int64_t first, int64_t last, uint8_t* out) const {
    for (int c = 0; c < column_tiles; ++c) {
      decode_panel(task.layout, panel(p + c), sizes.scale_bytes, first, last, out + c * kTileBytes,
                   column_tiles * kTileBytes);
    }
  }
};

// Up to 32 rows: a few blocks are decoded and used at once, the sums stay in tiles.
void run_streamed(const Context& context, int64_t first_panel, int64_t last_panel) {
  const int tiles = static_cast<int>(row_tiles(context.task));
  for (int64_t p = first_panel; p < last_panel; p += 2) {
    const int column_tiles = last_panel - p >= 2 ? 2 : 1;
    clear_sums();
    for (int64_t b = 0; b < context.blocks; b += kStreamedBlocks) {
      const int64_t end =
          b + kStreamedBlocks < context.blocks ? b + kStreamedBlocks : context.blocks;
      // Two buffers in turn, so that stores do not wait for the loads before them.
      uint8_t* const decoded =
          context.decoded + b / kStreamedBlocks % 2 * kStreamedBlocks * 2 * kTileBytes;
      context.decode(p, column_tiles, b, end, decoded);
      multiply_tiles(tiles, column_tiles, context.rows(0, b), context.rows(1, b), decoded, end - b);
    }
    Sums sums;
    store_sums(sums);
    finish_sums(context.task, sums, 0, p, column_tiles);
  }
}

// Many rows: as much of the weight as fits L2 is decoded, and all rows pass by it.
void run_blocked(const Context& context, int64_t first_panel, int64_t last_panel, Sums* partial) {
  const LinearTask& task = context.task;
  const int64_t step = context.blocks < kMaxBlocks ? context.blocks : kMaxBlocks;
  const int64_t fitting = kDecodedBytes / (step * kTileBytes) / 2 * 2;
  const int64_t pairs = (fitting < 2 ? 2 : fitting) / 2;
  for (int64_t p0 = first_panel; p0 < last_panel; p0 += 2 * pairs) {
    const int64_t p1 = p0 + 2 * pairs < last_panel ? p0 + 2 * pairs : last_panel;
    for (int64_t b = 0; b < context.blocks; b += step) {
      const int64_t end = b + step < context.blocks ? b + step : context.blocks;
      const int64_t pair_bytes = 2 * (end - b) * kTileBytes;
      for (int64_t p = p0; p < p1; p += 2) {
        context.decode(p, p1 - p >= 2 ? 2 : 1, b, end, context.decoded + (p - p0) / 2 * pair_bytes);
      }
      Sums* sums = partial;
      for (int64_t t = 0; t < row_tiles(task); t += 2) {
        for (int64_t p = p0; p < p1; p += 2, ++sums) {
          const int column_tiles = p1 - p >= 2 ? 2 : 1;
          const int tiles = row_tiles(task) - t >= 2 ? 2 : 1;
          if (b == 0) {
            clear_sums();
          } else {
            load_sums(*sums);
          }
          multiply_tiles(tiles, column_tiles, context.rows(t, b), context.rows(t + 1, b),
                         context.decoded + (p - p0) / 2 * pair_bytes, end - b);
          Sums local;
          Sums& target = end < context.blocks ? *sums : local;
          store_sums(target);
          if (end == context.blocks) finish_sums(task, target, t * kTileRows, p, column_tiles);
        }
      }
    }
  }
}

// Scratch: the decoded weight, partial sums where K takes several steps, one row for AVX-512.
struct Scratch {
  int64_t decoded, partial, row;

  explicit Scratch(const LinearTask& task) {
    const int64_t blocks = task.layout.blocks();
    const int64_t step = blocks < kMaxBlocks ? blocks : kMaxBlocks;
    const int64_t pair = 2 * (step > kStreamedBlocks * 2 ? step : kStreamedBlocks * 2) * kTileBytes;
    decoded = kDecodedBytes > pair ? kDecodedBytes : pair;
    const int64_t pairs = kDecodedBytes / pair > 1 ? kDecodedBytes / pair : 1;
    partial = blocks > kMaxBlocks ? pairs * ((row_tiles(task) + 1) / 2) * sizeof(Sums) : 0;
    LinearTask one = task;
    one.m = 1;
    row = kLinearAvx512.prepared_bytes(one);
  }
};

int64_t scratch_bytes(const LinearTask& task) {
  const Scratch scratch(task);
  return scratch.decoded + scratch.partial + scratch.row;
}

void run(const LinearTask& task, const uint8_t* prepared, int64_t first_panel, int64_t last_panel,
         void* scratch) {
  const Scratch sizes(task);
  uint8_t* const decoded = static_cast<uint8_t*>(scratch);
  const Context context{task, PlacedLayout(task.layout, task.n), prepared, decoded,
                        task.layout.blocks()};
  configure_tiles();
  if (task.m <= kStreamedRows) {
    run_streamed(context, first_panel, last_panel);
  } else {
    run_blocked(context, first_panel, last_panel, reinterpret_cast<Sums*>(decoded + sizes.decoded));
  }
  _tile_release();

  const uint8_t* const wide = prepared + tiles_bytes(task);
  for (int64_t r = 0; r < task.m; ++r) {
    if (!wide[r]) continue;
    LinearTask one = task;
    one.m = 1;
    one.data += r * task.layout.row_bytes();
    one.scales += r * task.layout.blocks();
    one.out = static_cast<uint8_t*>(one.out) +
              r * task.n * (task.out_dtype == Dtype::kFloat32 ? sizeof(float) : sizeof(uint16_t));
    uint8_t* const row = decoded + sizes.decoded + sizes.partial;
    kLinearAvx512.prepare(one, 0, 1, row);
    kLinearAvx512.run(one, row, first_panel, last_panel, nullptr);
  }
}

}  // namespace

const LinearKernel kLinearAmx = {"amx",         1 << 15, 1 << 21, prepared_bytes,
                                 scratch_bytes, prepare, run};

}  // namespace micromix::cpu
