// The AMX product of up to kStreamedRows rows, taken 64 at a time: sums stay in tiles over all of
// K. Each block of the weight is decoded a few blocks before it is used, so that the two overlap.
// Included only by files that are compiled for AMX.
#pragma once

#include <algorithm>

#include "amx_products.h"

namespace micromix::cpu::avx512 {
namespace {

constexpr int64_t kRowsAtOnce = 64;
constexpr int64_t kAhead = 4;
constexpr int64_t kRing = 8;

// The end of 3 or 4 row tiles x 1.
void finish_column(const LinearTask& task, const Sums& sums, int64_t first_row, int64_t panel) {
  const int64_t rows = task.m - first_row < kRowsAtOnce ? task.m - first_row : kRowsAtOnce;
  const __mmask16 columns = column_mask(task, panel);
  for (int64_t r = 0; r < rows; ++r) {
    const float* const row = sums.values[r / kTileRows][r % kTileRows];
    finish(task, first_row + r, panel, columns, _mm512_load_ps(row));
  }
}

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
      const int64_t last_row = std::min(first_row + kStripRows, task.m);
      const PairEnd end(task, *context.sums, nullptr, first_row, last_row, p, context.last_panel);
      end.run(task, 0, kStripRows);
    } else {
      finish_column(task, *context.sums, first_row, p);
    }
  }
}

inline void run_streamed(const Context& context, int64_t first_panel) {
  using Streamed = void (*)(const Context&, int64_t, int64_t);
  constexpr Streamed kStreamed[] = {run_streamed<1>, run_streamed<2>, run_streamed<3>,
                                    run_streamed<4>};
  for (int64_t r = 0; r < context.task.m; r += kRowsAtOnce) {
    const int64_t rows = std::min(context.task.m - r, kRowsAtOnce);
    kStreamed[(rows - 1) / kTileRows](context, r, first_panel);
  }
}

}  // namespace
}  // namespace micromix::cpu::avx512
