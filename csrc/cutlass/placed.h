// The placed weight of the Blackwell kernel: panels of 8 output rows. A panel is the blocks of its
// MXFP4 segment, then those of its MXFP6 and MXFP8 segments, then scales. A block holds the 8 rows'
// bytes for 32 channels, one row after the other, so that a copy of 16 bytes never crosses a row
// and a warp's copies are contiguous. An MXFP6 block splits the 12 bytes of 16 codes: first the
// leading 8 of every half block, then the trailing 4, since asynchronous copies are of 4, 8 or 16
// bytes. Scales: for each segment, words of 4 blocks (the last one padded with 0) by 8 rows.
#pragma once

#include "../mx/layout.h"

namespace micromix::blackwell {

inline constexpr int kPanelRows = 8;
inline constexpr int kScaleWord = 4;  // blocks, and bytes

struct PlacedSegment {
  int bits;              // of the weight's elements
  int64_t blocks;        // of 32 channels
  int64_t first_block;   // in the row
  int64_t source;        // where the segment starts in a device-neutral row of the weight
  int64_t data, scales;  // where it starts in a panel
};

struct PlacedWeight {
  PlacedSegment segments[3];
  int64_t panel_bytes;

  MX_HOST_DEVICE constexpr explicit PlacedWeight(const mx::MixedLayout& layout)
      : segments{}, panel_bytes(0) {
    const bool mxfp4 = layout.code & mx::MixedLayout::kWeightIsMxfp4Bit;
    const int64_t blocks[3] = {layout.k4 / mx::kBlock, layout.k6 / mx::kBlock,
                               layout.k8 / mx::kBlock};
    int64_t first_block = 0, source = 0;
    for (int s = 0; s < 3; ++s) {
      const int bits = mxfp4 ? 4 : 4 + 2 * s;
      segments[s] = {bits, blocks[s], first_block, source, panel_bytes, 0};
      first_block += blocks[s];
      source += blocks[s] * mx::kBlock * bits / 8;
      panel_bytes += blocks[s] * mx::kBlock * bits / 8 * kPanelRows;
    }
    for (PlacedSegment& segment : segments) {
      segment.scales = panel_bytes;
      panel_bytes += (segment.blocks + kScaleWord - 1) / kScaleWord * kScaleWord * kPanelRows;
    }
  }

  MX_HOST_DEVICE static constexpr int64_t panels(int64_t n) {
    return (n + kPanelRows - 1) / kPanelRows;
  }
  MX_HOST_DEVICE constexpr int64_t bytes(int64_t n) const { return panels(n) * panel_bytes; }
};

// Where byte `byte` of row `row`'s block lies within the placed block.
MX_HOST_DEVICE constexpr int placed_byte(int bits, int row, int byte) {
  if (bits != 6) return row * (4 * bits) + byte;
  const int half = byte / 12, in_half = byte % 12;
  return in_half < 8 ? row * 16 + half * 8 + in_half
                     : kPanelRows * 16 + row * 8 + half * 4 + in_half - 8;
}

// Places block `block` (counted over the row) of weight row `n`, codes and scale; the rest of the
// buffer is zero.
MX_HOST_DEVICE inline void place_block(const PlacedWeight& layout, int64_t row_bytes,
                                       int64_t row_blocks, const uint8_t* data,
                                       const uint8_t* scales, uint8_t* placed, int64_t n,
                                       int64_t block) {
  int s = 0;
  while (block >= layout.segments[s].first_block + layout.segments[s].blocks) ++s;
  const PlacedSegment& segment = layout.segments[s];
  const int64_t own = block - segment.first_block;
  const int row = static_cast<int>(n % kPanelRows), bytes = mx::kBlock * segment.bits / 8;
  const uint8_t* const from = data + n * row_bytes + segment.source + own * bytes;
  uint8_t* const panel = placed + n / kPanelRows * layout.panel_bytes;
  uint8_t* const to = panel + segment.data + own * bytes * kPanelRows;
  for (int i = 0; i < bytes; ++i) to[placed_byte(segment.bits, row, i)] = from[i];
  panel[segment.scales + own / kScaleWord * kScaleWord * kPanelRows + row * kScaleWord +
        own % kScaleWord] = scales[n * row_blocks + block];
}

}  // namespace micromix::blackwell
