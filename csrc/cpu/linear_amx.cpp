// The product for many rows, on AMX: both operands are decoded to bfloat16 tiles with their scales
// applied, and summed in float32 over the whole K.
//
// An MX element times its scale is a bfloat16 number, and no product or sum leaves the normal
// float32 range (AMX takes subnormal numbers for zero), while scales are in the plain range. A
// weight with other scales never comes here; an activation row with other scales is done again by
// the AVX-512 kernel.
#include "bfloat16_tiles.h"

namespace micromix::cpu {
namespace {

using namespace avx512;

// Up to these rows, taken 64 at a time, sums stay in tiles over all of K. Each block of the weight
// is decoded a few blocks before it is used, so that the two overlap.
constexpr int64_t kStreamedRows = 128;
constexpr int64_t kRowsAtOnce = 64;
constexpr int64_t kAhead = 4;
constexpr int64_t kRing = 8;

// For more rows: 32 rows x kMaxBlocks of the activations stay in L1 while they meet kMaxPairs pairs
// of panels, whose decoded blocks stay in L2, as do the sums of kMaxRowTiles.
constexpr int64_t kMaxBlocks = 18;
constexpr int64_t kMaxPairs = 8;
constexpr int64_t kMaxRowTiles = 32;

// Prepared activations: tiles of 16 rows x 32 channels, all blocks of 16 rows side by side, in the
// order of channels that the tiles of the weight have; then one byte per row that says whether some
// scale lies outside the plain range.
// Row tiles come in pairs beyond kStreamedRows; the second of the last pair may hold anything.
int64_t row_tiles(const LinearTask& task) {
  const int64_t tiles = (task.m + kTileRows - 1) / kTileRows;
  return task.m <= kStreamedRows ? tiles : round_up(tiles, 2);
}

int64_t tiles_bytes(const LinearTask& task) {
  return row_tiles(task) * task.layout.blocks() * kTileBytes;
}

int64_t prepared_bytes(const LinearTask& task) { return tiles_bytes(task) + task.m; }

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

// Tiles 0-3 hold sums: of 2 row tiles x 2 column tiles, or of 3 or 4 row tiles x 1. Tiles 4 and 5
// take activations, 6 and 7 the weight.
void clear_sums() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

template <int kRowTiles>
constexpr int kColumnTiles = kRowTiles <= 2 ? 2 : 1;

// One block: `rows` apart are the tiles of activations, side by side those of the weight. The
// latter leave the activations in L1 alone where kPassing, as they are not soon used again.
template <int kRowTiles, bool kPassing>
[[gnu::always_inline]] inline void multiply(const uint8_t* a, int64_t rows, const uint8_t* b) {
  if constexpr (kPassing) {
    _tile_stream_loadd(6, b, kLine);
  } else {
    _tile_loadd(6, b, kLine);
  }
  _tile_loadd(4, a, kLine);
  _tile_dpbf16ps(0, 4, 6);
  if constexpr (kColumnTiles<kRowTiles> == 2) {
    if constexpr (kPassing) {
      _tile_stream_loadd(7, b + kTileBytes, kLine);
    } else {
      _tile_loadd(7, b + kTileBytes, kLine);
    }
    _tile_dpbf16ps(1, 4, 7);
  }
  if constexpr (kRowTiles == 2) {
    _tile_loadd(5, a + rows, kLine);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  if constexpr (kRowTiles > 2) {
    _tile_loadd(5, a + rows, kLine);
    _tile_dpbf16ps(1, 5, 6);
    _tile_loadd(4, a + 2 * rows, kLine);
    _tile_dpbf16ps(2, 4, 6);
  }
  if constexpr (kRowTiles == 4) {
    _tile_loadd(5, a + 3 * rows, kLine);
    _tile_dpbf16ps(3, 5, 6);
  }
}

// The sums of the four tiles in memory.
struct alignas(64) Sums {
  float values[4][kTileRows][kTileRows];
};

void store_sums(Sums& sums) {
  _tile_stored(0, sums.values[0], kLine);
  _tile_stored(1, sums.values[1], kLine);
  _tile_stored(2, sums.values[2], kLine);
  _tile_stored(3, sums.values[3], kLine);
}

void load_sums(const Sums& sums) {
  _tile_loadd(0, sums.values[0], kLine);
  _tile_loadd(1, sums.values[1], kLine);
  _tile_loadd(2, sums.values[2], kLine);
  _tile_loadd(3, sums.values[3], kLine);
}

// Whether bfloat16 results are written past the caches: whole lines of a result that L2 would not
// keep. To read each line first, as a store does, costs an eighth of the product's time.
bool passes_caches(const LinearTask& task) {
  constexpr int64_t kKept = 1 << 20;
  return task.m * task.n * 2 > kKept && task.n * 2 % kLine == 0 &&
         reinterpret_cast<uintptr_t>(task.out) % kLine == 0;
}

// The end of 2 x 2 tiles: bias, one rounding, store. A second panel that does not exist is left
// out.
void finish_pair(const LinearTask& task, const Sums& sums, int64_t first_row, int64_t panel,
                 int64_t last_panel) {
  const int64_t rows = task.m - first_row < 2 * kTileRows ? task.m - first_row : 2 * kTileRows;
  const bool whole = panel + 2 <= last_panel && task.n >= (panel + 2) * kTileRows;
  if (whole && task.out_dtype == Dtype::kBFloat16) {
    const auto bias = [&](int c) {
      const int64_t n = (panel + c) * kTileRows;
      return task.bias ? load_floats(task.bias, task.bias_dtype, n, 0xFFFF) : _mm512_setzero_ps();
    };
    const __m512 bias0 = bias(0), bias1 = bias(1);
    uint16_t* out = static_cast<uint16_t*>(task.out) + first_row * task.n + panel * kTileRows;
    const auto each_row = [&](auto store) [[gnu::always_inline]] {
      for (int64_t r = 0; r < rows; ++r, out += task.n) {
        const auto* const tiles = sums.values + r / kTileRows * 2;
        const __m512 low = _mm512_add_ps(_mm512_load_ps(tiles[0][r % kTileRows]), bias0);
        const __m512 high = _mm512_add_ps(_mm512_load_ps(tiles[1][r % kTileRows]), bias1);
        store(out, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low)));
      }
    };
    // A pair that begins at an odd panel, where a thread's share does, begins in the middle of a
    // line.
    if (passes_caches(task) && panel % 2 == 0) {
      each_row([](uint16_t* to, __m512i line) {
        _mm512_stream_si512(reinterpret_cast<__m512i*>(to), line);
      });
    } else {
      each_row([](uint16_t* to, __m512i line) { _mm512_storeu_si512(to, line); });
    }
    return;
  }
  for (int c = 0; c < 2 && panel + c < last_panel; ++c) {
    const __mmask16 columns = column_mask(task, panel + c);
    for (int64_t r = 0; r < rows; ++r) {
      const float* const row = sums.values[r / kTileRows * 2 + c][r % kTileRows];
      finish(task, first_row + r, panel + c, columns, _mm512_load_ps(row));
    }
  }
}

// The end of 3 or 4 row tiles x 1.
void finish_column(const LinearTask& task, const Sums& sums, int64_t first_row, int64_t panel) {
  const int64_t rows = task.m - first_row < kRowsAtOnce ? task.m - first_row : kRowsAtOnce;
  const __mmask16 columns = column_mask(task, panel);
  for (int64_t r = 0; r < rows; ++r) {
    const float* const row = sums.values[r / kTileRows][r % kTileRows];
    finish(task, first_row + r, panel, columns, _mm512_load_ps(row));
  }
}

// One call's panels, and where things are.
struct Context {
  const LinearTask& task;
  const PlacedLayout sizes;
  const uint8_t* prepared;
  uint8_t* decoded;
  Sums* sums;
  int64_t last_panel;

  // The panel; the last one stands in for those beyond it.
  const uint8_t* panel(int64_t p) const {
    return task.weight + kLine + (p < last_panel ? p : last_panel - 1) * sizes.panel_bytes;
  }
};

// Up to 64 rows, from first_row on.
template <int kRowTiles>
void run_streamed(const Context& context, int64_t first_row, int64_t first_panel) {
  constexpr int kColumns = kColumnTiles<kRowTiles>;
  const LinearTask& task = context.task;
  const int64_t blocks = task.layout.blocks(), rows = blocks * kTileBytes;
  const uint8_t* const a = context.prepared + first_row / kTileRows * rows;
  const auto ring = [&](int64_t b) { return context.decoded + b % kRing * kColumns * kTileBytes; };
  for (int64_t p = first_panel; p < context.last_panel; p += kColumns) {
    const uint8_t* const panels[2] = {context.panel(p), context.panel(p + 1)};
    clear_sums();
    for_each_block(task.layout, context.sizes.scale_bytes, 0, blocks,
                   [&]<mx::ElementFormat kFormat>(int64_t b, int64_t tile) [[gnu::always_inline]] {
                     for (int c = 0; c < kColumns; ++c) {
                       fetch_ahead<kFormat.bits>(panels[c] + tile);
                       decode_tile<kFormat>(panels[c] + tile, panels[c] + b * kTileRows,
                                            ring(b) + c * kTileBytes);
                     }
                     asm volatile("" : : : "memory");  // gcc 12: _tile_loadd reads memory
                     if (b < kAhead) return;
                     multiply<kRowTiles, false>(a + (b - kAhead) * kTileBytes, rows,
                                                ring(b - kAhead));
                   });
    for (int64_t b = blocks > kAhead ? blocks - kAhead : 0; b < blocks; ++b) {
      multiply<kRowTiles, false>(a + b * kTileBytes, rows, ring(b));
    }
    store_sums(*context.sums);
    if constexpr (kColumns == 2) {
      finish_pair(task, *context.sums, first_row, p, context.last_panel);
    } else {
      finish_column(task, *context.sums, first_row, p);
    }
  }
}

// Blocks of K that run_blocked takes at once.
int64_t blocks_at_once(int64_t blocks) {
  const int64_t steps = (blocks + kMaxBlocks - 1) / kMaxBlocks;
  return (blocks + steps - 1) / steps;
}

// Many rows.
void run_blocked(const Context& context, int64_t first_panel) {
  const LinearTask& task = context.task;
  const int64_t last_panel = context.last_panel, blocks = task.layout.blocks();
  const int64_t step = blocks_at_once(blocks), rows = blocks * kTileBytes;
  for (int64_t p0 = first_panel; p0 < last_panel; p0 += 2 * kMaxPairs) {
    const int64_t p1 = p0 + 2 * kMaxPairs < last_panel ? p0 + 2 * kMaxPairs : last_panel;
    for (int64_t t0 = 0; t0 < row_tiles(task); t0 += kMaxRowTiles) {
      const int64_t t1 = t0 + kMaxRowTiles < row_tiles(task) ? t0 + kMaxRowTiles : row_tiles(task);
      for (int64_t first = 0; first < blocks; first += step) {
        const int64_t last = first + step < blocks ? first + step : blocks;
        // Pairs of panels, each [block][2 tiles].
        const int64_t pair_bytes = (last - first) * 2 * kTileBytes;
        for (int64_t p = p0; p < p1 || (p - p0) % 2; ++p) {
          const uint8_t *const panel = context.panel(p), *const next = context.panel(p + 1);
          uint8_t* const out =
              context.decoded + (p - p0) / 2 * pair_bytes + (p - p0) % 2 * kTileBytes;
          for_each_block(task.layout, context.sizes.scale_bytes, first, last,
                         [&]<mx::ElementFormat kFormat>(int64_t b, int64_t tile) {
                           // The same block of the next panel, which no hardware would foresee.
                           for (int line = 0; line < kFormat.bits; ++line) {
                             _mm_prefetch(next + tile + line * kLine, _MM_HINT_T0);
                           }
                           decode_tile<kFormat>(panel + tile, panel + b * kTileRows,
                                                out + (b - first) * 2 * kTileBytes);
                         });
        }
        asm volatile("" : : : "memory");  // gcc 12: _tile_loadd reads memory
        Sums* sums = context.sums;
        for (int64_t t = t0; t < t1; t += 2) {
          const uint8_t* const a = context.prepared + t * rows + first * kTileBytes;
          for (int64_t p = p0; p < p1; p += 2, ++sums) {
            const uint8_t* const b = context.decoded + (p - p0) / 2 * pair_bytes;
            if (first == 0) {
              clear_sums();
            } else {
              load_sums(*sums);
            }
            // Each pair of panels fetches the next pair's sums to L1, which lie on another page,
            // and a quarter of one of the next two row tiles to L2.
            const int64_t pair = (p - p0) / 2, quarter = (last - first) * kTileBytes / 4;
            const uint8_t* const next = a + (2 + pair / 4) * rows + pair % 4 * quarter;
            for (int64_t i = 0; i < last - first; ++i) {
#pragma GCC unroll 4
              for (int line = 0; line < 4; ++line) {
                _mm_prefetch(next + i * kTileBytes / 4 + line * kLine, _MM_HINT_T1);
              }
              const char* const next_sums = reinterpret_cast<const char*>(sums + 1);
#pragma GCC unroll 4
              for (int line = 0; line < 4; ++line) {
                _mm_prefetch(next_sums + (4 * i + line) * kLine, _MM_HINT_T0);
              }
              multiply<2, true>(a + i * kTileBytes, rows, b + i * 2 * kTileBytes);
            }
            store_sums(*sums);
            if (last == blocks) finish_pair(task, *sums, t * kTileRows, p, p1);
          }
        }
      }
    }
  }
  _mm_sfence();  // after stores that pass the caches
}

// Scratch: the decoded weight, the sums, one row for AVX-512.
struct Scratch {
  int64_t decoded, sums, row;

  explicit Scratch(const LinearTask& task) {
    const bool streamed = task.m <= kStreamedRows;
    const int64_t tiles = row_tiles(task) < kMaxRowTiles ? row_tiles(task) : kMaxRowTiles;
    decoded = (streamed ? kRing : kMaxPairs * kMaxBlocks) * 2 * kTileBytes;
    sums = (streamed ? 1 : kMaxPairs * ((tiles + 1) / 2)) * sizeof(Sums);
    LinearTask one = task;
    one.m = 1;
    row = kLinearAvx512.prepared_bytes(one);
  }
};

int64_t scratch_bytes(const LinearTask& task) {
  const Scratch scratch(task);
  return scratch.decoded + scratch.sums + scratch.row;
}

void run(const LinearTask& task, const uint8_t* prepared, int64_t first_panel, int64_t last_panel,
         void* scratch) {
  const Scratch sizes(task);
  uint8_t* const decoded = static_cast<uint8_t*>(scratch);
  const Context context{task,
                        PlacedLayout(task.layout, task.n),
                        prepared,
                        decoded,
                        reinterpret_cast<Sums*>(decoded + sizes.decoded),
                        last_panel};
  configure_tiles();
  if (task.m > kStreamedRows) {
    run_blocked(context, first_panel);
  } else {
    using Streamed = void (*)(const Context&, int64_t, int64_t);
    constexpr Streamed kStreamed[] = {run_streamed<1>, run_streamed<2>, run_streamed<3>,
                                      run_streamed<4>};
    for (int64_t r = 0; r < task.m; r += kRowsAtOnce) {
      const int64_t rows = task.m - r < kRowsAtOnce ? task.m - r : kRowsAtOnce;
      kStreamed[(rows - 1) / kTileRows](context, r, first_panel);
    }
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
    uint8_t* const row = decoded + sizes.decoded + sizes.sums;
    kLinearAvx512.prepare(one, 0, 1, row);
    kLinearAvx512.run(one, row, first_panel, last_panel, nullptr);
  }
}

}  // namespace

const LinearKernel kLinearAmx = {"amx",         1 << 15, 1 << 21, prepared_bytes,
                                 scratch_bytes, prepare, run};

}  // namespace micromix::cpu
