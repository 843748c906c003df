// Placing a weight: from device-neutral rows into the panels that the kernels read.
#include <cstring>

#include "kernels.h"

namespace micromix::cpu {
namespace {

// Writes the codes of one row's block into its tile, which starts as zeros. Returns the scale byte
// that the block gets.
uint8_t place_block(const uint8_t* packed, uint8_t scale, mx::ElementFormat format, int row,
                    uint8_t* tile) {
  uint8_t codes[mx::kBlock];
  mx::unpack_block(packed, format.bits, codes);
  const uint8_t magnitude_mask = static_cast<uint8_t>((1 << (format.bits - 1)) - 1);
  uint8_t any = 0;
  bool nan = false;
  for (int k = 0; k < mx::kBlock; ++k) {
    any |= codes[k];
    nan |= mx::is_nan(codes[k], format);
    const TilePosition at = tile_position(format.bits, row, k);
    if (format.bits == 8) {
      tile[at.low] = codes[k];
    } else {
      tile[at.low] |= (codes[k] & 0xF) << at.low_shift;
      if (format.bits == 6) tile[at.high] |= (codes[k] >> 4) << at.high_shift;
    }
  }
  if (nan || scale == mx::kNanScale) return mx::kNanScale;
  return any & magnitude_mask ? scale : kNeutralScale;
}

}  // namespace

bool place_panels(const mx::MixedLayout& layout, int64_t n, const uint8_t* data,
                  const uint8_t* scales, uint8_t* placed, int64_t first_panel, int64_t last_panel) {
  const mx::MixedLayout own = layout.weight();
  const PlacedLayout sizes(layout, n);
  bool wide = false;
  for (int64_t p = first_panel; p < last_panel; ++p) {
    uint8_t* const panel = placed + kLine + p * sizes.panel_bytes;
    std::memset(panel, 0, sizes.panel_bytes);
    std::memset(panel, kNeutralScale, sizes.scale_bytes);  // rows beyond N
    for (int row = 0; row < kTileRows && p * kTileRows + row < n; ++row) {
      const int64_t source = p * kTileRows + row;
      for (const mx::Segment& segment : own.segments()) {
        const int64_t bytes = mx::block_bytes(segment.format);
        for (int64_t b = 0; b < segment.blocks; ++b) {
          const int64_t block = segment.first_block + b;
          const int64_t at = segment.byte_start + b * bytes;
          const uint8_t scale = place_block(data + source * own.row_bytes() + at,
                                            scales[source * own.blocks() + block], segment.format,
                                            row, panel + sizes.scale_bytes + kTileRows * at);
          panel[block * kTileRows + row] = scale;
          wide |= scale < kSmallestPlainScale || scale > kLargestPlainScale;
        }
      }
    }
  }
  return wide;
}

}  // namespace micromix::cpu
