// The product for many rows, on AMX: both operands are decoded to bfloat16 tiles with their scales
// applied, and summed in float32 over the whole K.
//
// An MX element times its scale is a bfloat16 number, and no product or sum leaves the normal
// float32 range (AMX takes subnormal numbers for zero), while scales are in the plain range. A
// weight with other scales never comes here; an activation row with other scales is done again by
// the AVX-512 kernel.
#include "amx.h"
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
// of panels, whose decoded blocks stay in L2, as do the sums of kMaxRowTiles. Where K has no more
// blocks no sums need room, and more pairs spare the activations ways from L3.
constexpr int64_t kMaxBlocks = 18;
constexpr int64_t kMaxPairs = 9;
constexpr int64_t kMaxPairsAlone = 16;
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

// Rows of float activations. A row whose largest magnitude lies outside the plain range is wide.
void prepare_floats(const LinearTask& task, int64_t first_row, int64_t last_row,
                    uint8_t* prepared) {
  const mx::MixedLayout& layout = task.layout;
  for (int64_t r = first_row; r < last_row; ++r) {
    uint8_t* const out =
        prepared + r / kTileRows * layout.blocks() * kTileBytes + r % kTileRows * kLine;
    __m512i amax = _mm512_setzero_si512();
    for_each_float_block(task, r, [&](const mx::Segment&, int64_t b, Block block) {
      store_tile_row(block, out + b * kTileBytes);
      amax = _mm512_max_epu32(amax, magnitudes(block));
    });
    const uint32_t largest = _mm512_reduce_max_epu32(amax);
    const uint32_t exponent = largest >> mx::kFloat32MantissaBits;
    prepared[tiles_bytes(task) + r] =
        largest != 0 && (exponent < kSmallestPlainScale || exponent > kLargestPlainScale);
  }
}

void prepare(const LinearTask& task, int64_t first_row, int64_t last_row, uint8_t* prepared) {
  if (task.weight_only) return prepare_floats(task, first_row, last_row, prepared);
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

// Stores sums and loads, or clears, the next ones, tile by tile: products on the tiles that are
// loaded run while others are stored.
void exchange_sums(Sums& to, const Sums* from) {
  if (!from) {
    store_sums(to);
    return clear_sums();
  }
  _tile_stored(0, to.values[0], kLine);
  _tile_loadd(0, from->values[0], kLine);
  _tile_stored(1, to.values[1], kLine);
  _tile_loadd(1, from->values[1], kLine);
  _tile_stored(2, to.values[2], kLine);
  _tile_loadd(2, from->values[2], kLine);
  _tile_stored(3, to.values[3], kLine);
  _tile_loadd(3, from->values[3], kLine);
}

// The end of 2 x 2 tiles whose sums are in memory: bias, one rounding, store. A second panel that
// does not exist is left out.
class PairEnd {
 public:
  PairEnd() = default;
  PairEnd(const LinearTask& task, const Sums& sums, int64_t first_row, int64_t panel,
          int64_t last_panel)
      : sums_(&sums), first_row_(first_row), panel_(panel), last_panel_(last_panel) {
    rows_ = task.m - first_row < 2 * kTileRows ? task.m - first_row : 2 * kTileRows;
    whole_ = panel + 2 <= last_panel && task.n >= (panel + 2) * kTileRows &&
             task.out_dtype == Dtype::kBFloat16;
  }

  // Brings the lines of rows [first, last) to L2: a store that waits for L3 holds up all others.
  [[gnu::always_inline]] void fetch(const LinearTask& task, int64_t first, int64_t last) const {
    last = last < rows_ ? last : rows_;
    if (!whole_) return;
    const uint16_t* out = at(task, first);
    for (int64_t r = first; r < last; ++r, out += task.n) _mm_prefetch(out, _MM_HINT_T1);
  }

  // Rows [first, last) of the pair, those of them that exist.
  [[gnu::always_inline]] void run(const LinearTask& task, int64_t first, int64_t last) const {
    last = last < rows_ ? last : rows_;
    if (!whole_) return run_slow(task, first, last);
    const auto bias = [&](int c) {
      const int64_t n = (panel_ + c) * kTileRows;
      return task.bias ? load_floats(task.bias, task.bias_dtype, n, 0xFFFF) : _mm512_setzero_ps();
    };
    const __m512 bias0 = bias(0), bias1 = bias(1);
    uint16_t* out = at(task, first);
    for (int64_t r = first; r < last; ++r, out += task.n) {
      const auto* const tiles = sums_->values + r / kTileRows * 2;
      const __m512 low = _mm512_add_ps(_mm512_load_ps(tiles[0][r % kTileRows]), bias0);
      const __m512 high = _mm512_add_ps(_mm512_load_ps(tiles[1][r % kTileRows]), bias1);
      _mm512_storeu_si512(out, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low)));
    }
  }

 private:
  uint16_t* at(const LinearTask& task, int64_t row) const {
    return static_cast<uint16_t*>(task.out) + (first_row_ + row) * task.n + panel_ * kTileRows;
  }

  void run_slow(const LinearTask& task, int64_t first, int64_t last) const {
    for (int c = 0; c < 2 && panel_ + c < last_panel_; ++c) {
      const __mmask16 columns = column_mask(task, panel_ + c);
      for (int64_t r = first; r < last; ++r) {
        const float* const row = sums_->values[r / kTileRows * 2 + c][r % kTileRows];
        finish(task, first_row_ + r, panel_ + c, columns, _mm512_load_ps(row));
      }
    }
  }

  const Sums* sums_ = nullptr;
  int64_t first_row_ = 0, panel_ = 0, last_panel_ = 0, rows_ = 0;
  bool whole_ = false;
};

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
      PairEnd(task, *context.sums, first_row, p, context.last_panel).run(task, 0, 2 * kTileRows);
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

// Pairs of panels that it takes at once.
int64_t pairs_at_once(int64_t blocks) { return blocks <= kMaxBlocks ? kMaxPairsAlone : kMaxPairs; }

// What run_blocked has in the caches at once: panels [p0, p1), row tiles [t0, t1), blocks [b0, b1).
struct Range {
  int64_t p0, p1, t0, t1, b0, b1;

  int64_t blocks() const { return b1 - b0; }
  int64_t pair_bytes() const { return blocks() * 2 * kTileBytes; }
};

// Decodes the weight of the range: pairs of panels, each [block][2 tiles].
void decode_range(const Context& context, const Range& range) {
  for (int64_t p = range.p0; p < range.p1 || (p - range.p0) % 2; ++p) {
    const uint8_t *const panel = context.panel(p), *const next = context.panel(p + 1);
    const int64_t of_pair = (p - range.p0) % 2 * kTileBytes;
    uint8_t* out = context.decoded + (p - range.p0) / 2 * range.pair_bytes() + of_pair;
    for_each_block(context.task.layout, context.sizes.scale_bytes, range.b0, range.b1,
                   [&]<mx::ElementFormat kFormat>(int64_t b, int64_t tile) {
                     // The same block of the next panel, which no hardware would foresee, and the
                     // place of the block after the next one.
                     for (int line = 0; line < kFormat.bits; ++line) {
                       _mm_prefetch(next + tile + line * kLine, _MM_HINT_T0);
                     }
                     for (int line = 0; line < kTileRows; ++line) {
                       __builtin_prefetch(out + 4 * kTileBytes + line * kLine, 1);
                     }
                     decode_tile<kFormat>(panel + tile, panel + b * kTileRows, out);
                     out += 2 * kTileBytes;
                   });
  }
}

// Adds the products of the range to the sums; at the end of K, brings those to their end.
void multiply_range(const Context& context, const Range& range) {
  const LinearTask& task = context.task;
  const int64_t rows = task.layout.blocks() * kTileBytes;
  const bool begins = range.b0 == 0, ends = range.b1 == task.layout.blocks();
  // The last sums of a pair stay in L1, and are brought to their end beside the next pair's
  // products.
  Sums& ended = context.sums[kMaxPairs * ((range.t1 - range.t0) / 2)];
  PairEnd end;
  const int64_t end_rows = (2 * kTileRows + range.blocks() - 1) / range.blocks();
  Sums* sums = context.sums;
  if (begins) {
    clear_sums();
  } else {
    load_sums(*sums);
  }
  for (int64_t t = range.t0; t < range.t1; t += 2) {
    const uint8_t* const a = context.prepared + t * rows + range.b0 * kTileBytes;
    for (int64_t p = range.p0; p < range.p1; p += 2, ++sums) {
      const uint8_t* const b = context.decoded + (p - range.p0) / 2 * range.pair_bytes();
      // Each pair of panels fetches the next pair's sums to L1, which lie on another page; each of
      // the first eight fetches a quarter of one of the next two row tiles to L2.
      const int64_t pair = (p - range.p0) / 2, quarter = range.blocks() * kTileBytes / 4;
      const uint8_t* const next = a + (2 + pair / 4) * rows + pair % 4 * quarter;
      const bool fetches = pair < 8;
      const uint8_t* const next_sums = reinterpret_cast<const uint8_t*>(sums + 1);
      const PairEnd next_end = ends ? PairEnd(task, ended, t * kTileRows, p, range.p1) : PairEnd();
      for (int64_t i = 0; i < range.blocks(); ++i) {
#pragma GCC unroll 4
        for (int line = 0; line < 4; ++line) {
          if (fetches) _mm_prefetch(next + i * kTileBytes / 4 + line * kLine, _MM_HINT_T1);
        }
        if (!begins || !ends) {
#pragma GCC unroll 4
          for (int line = 0; line < 4; ++line) {
            _mm_prefetch(next_sums + (4 * i + line) * kLine, _MM_HINT_T0);
          }
        }
        next_end.fetch(task, i * end_rows, (i + 1) * end_rows);
        multiply<2, true>(a + i * kTileBytes, rows, b + i * 2 * kTileBytes);
        end.run(task, i * end_rows, (i + 1) * end_rows);
      }
      exchange_sums(ends ? ended : *sums, begins ? nullptr : sums + 1);
      end = next_end;
    }
  }
  end.run(task, 0, 2 * kTileRows);
}

// Many rows.
void run_blocked(const Context& context, int64_t first_panel) {
  const int64_t blocks = context.task.layout.blocks(), tiles = row_tiles(context.task);
  const int64_t step = blocks_at_once(blocks);
  const auto at_most = [](int64_t value, int64_t limit) { return value < limit ? value : limit; };
  // Equal numbers of pairs at once: few pairs alone would wait for the activations.
  const int64_t pairs = (context.last_panel - first_panel + 1) / 2, most = pairs_at_once(blocks);
  const int64_t ranges = (pairs + most - 1) / most;
  for (int64_t i = 0; i < ranges; ++i) {
    const int64_t p0 = first_panel + pairs * i / ranges * 2;
    const int64_t p1 = at_most(first_panel + pairs * (i + 1) / ranges * 2, context.last_panel);
    for (int64_t t = 0; t < tiles; t += kMaxRowTiles) {
      for (int64_t b = 0; b < blocks; b += step) {
        const Range range{
            p0, p1, t, at_most(t + kMaxRowTiles, tiles), b, at_most(b + step, blocks)};
        // With all of K in one step the weight of the rows before serves these.
        if (t == 0 || step < blocks) decode_range(context, range);
        asm volatile("" : : : "memory");  // gcc 12: _tile_loadd reads memory
        multiply_range(context, range);
      }
    }
  }
}

// Scratch: the decoded weight, the sums, one row for AVX-512.
struct Scratch {
  int64_t decoded, sums, row;

  explicit Scratch(const LinearTask& task) {
    const bool streamed = task.m <= kStreamedRows;
    const int64_t tiles = row_tiles(task) < kMaxRowTiles ? row_tiles(task) : kMaxRowTiles;
    decoded =
        (streamed ? kRing : pairs_at_once(task.layout.blocks()) * kMaxBlocks) * 2 * kTileBytes;
    sums = (streamed ? 1 : kMaxPairs * ((tiles + 1) / 2) + 1) * sizeof(Sums);
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
  {
    const Tiles tiles;
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
  }

  const uint8_t* const wide = prepared + tiles_bytes(task);
  for (int64_t r = 0; r < task.m; ++r) {
    if (!wide[r]) continue;
    const LinearTask one = task.of_row(r);
    uint8_t* const row = decoded + sizes.decoded + sizes.sums;
    kLinearAvx512.prepare(one, 0, 1, row);
    kLinearAvx512.run(one, row, first_panel, last_panel, nullptr);
  }
}

}  // namespace

const LinearKernel kLinearAmx = {"amx",         1 << 15, 1 << 21, prepared_bytes,
                                 scratch_bytes, prepare, run};

}  // namespace micromix::cpu
