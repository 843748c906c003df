// The AMX product of up to 64 rows, whose sums stay in tiles over all of K. Each block of the
// weight is decoded a few blocks before it is used, so that the two overlap. Included only by files
// that are compiled for AMX.
#pragma once

#include "amx_products.h"

namespace micromix::cpu::avx512 {
namespace {

constexpr int64_t kAhead = 4;
constexpr int64_t kRing = 8;

// The end of 3 or 4 row tiles x 1.
void finish_column(const LinearTask& task, const Sums& sums, int64_t panel) {
  const __mmask16 columns = column_mask(task, panel);
  for (int64_t r = 0; r < task.m; ++r) {
    const float* const row = sums.values[r / kTileRows][r % kTileRows];
    finish(task, r, panel, columns, _mm512_load_ps(row));
  }
}

template <int kRowTiles>
void run_row_tiles(const Context& context, int64_t first_panel) {
  constexpr int kColumns = kColumnTiles<kRowTiles>;
  const LinearTask& task = context.task;
  const int64_t blocks = task.layout.blocks(), rows = blocks * kTileBytes;
  const uint8_t* const a = context.prepared;
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
      PairEnd(task, *context.sums, nullptr, 0, task.m, p, context.last_panel)
          .visit(task, [&](const auto& finish_rows) { finish_rows(0, task.m); });
    } else {
      finish_column(task, *context.sums, p);
    }
  }
}

void run_streamed(const Context& context, int64_t first_panel) {
  using RunRowTiles = void (*)(const Context&, int64_t);
  constexpr RunRowTiles kRunRowTiles[] = {run_row_tiles<1>, run_row_tiles<2>, run_row_tiles<3>,
                                          run_row_tiles<4>};
  kRunRowTiles[(context.task.m - 1) / kTileRows](context, first_panel);
}

}  // namespace
}  // namespace micromix::cpu::avx512
