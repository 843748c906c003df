// Placing a weight, from device-neutral rows into the panels that the kernels read, and back.
#include <cstring>

#include "kernels.h"

namespace micromix::cpu {
namespace {

// Four codes, one a byte, of a packed half-word or of three packed bytes, little-endian.
uint32_t spread4(uint32_t packed) {
  packed = (packed | packed << 8) & 0x00FF00FF;
  return (packed | packed << 4) & 0x0F0F0F0F;
}
uint32_t spread6(uint32_t packed) {
  packed = (packed & 0xFFF) | (packed & 0xFFF000) << 4;
  return (packed & 0x003F003F) | (packed & 0x0FC00FC0) << 2;
}

// Writes four codes, one a byte, of channels 4 * quad and on: tile_position, four at a time. A tile
// starts as zeros.
void place_codes(uint32_t codes, int bits, int row, int quad, uint8_t* tile) {
  const auto merge = [](uint8_t* bytes, uint32_t more) {
    uint32_t word;
    std::memcpy(&word, bytes, sizeof(word));
    word |= more;
    std::memcpy(bytes, &word, sizeof(word));
  };
  const TilePosition at = tile_position(bits, row, 4 * quad);
  if (bits == 8) return merge(tile + at.low, codes);
  merge(tile + at.low, (codes & 0x0F0F0F0F) << at.low_shift);
  if (bits == 6) merge(tile + at.high, (codes >> 4 & 0x03030303) << at.high_shift);
}

// Writes one row's block into its tile. Returns the scale byte that the block gets.
template <int kBits>
uint8_t place_block(const uint8_t* packed, uint8_t scale, int row, uint8_t* tile) {
  constexpr uint32_t kMagnitude = 0x01010101u * ((1 << (kBits - 1)) - 1);
  uint32_t any = 0, nan = 0;
  for (int quad = 0; quad < mx::kBlock / 4; ++quad) {
    uint32_t codes = 0;
    for (int i = 0; i < kBits / 2; ++i) {
      codes |= static_cast<uint32_t>(packed[quad * kBits / 2 + i]) << (8 * i);
    }
    if (kBits == 4) codes = spread4(codes);
    if (kBits == 6) codes = spread6(codes);
    any |= codes & kMagnitude;
    if (kBits == 8) nan |= ((codes & kMagnitude) + 0x01010101) & 0x80808080;  // a byte was 0x7F
    place_codes(codes, kBits, row, quad, tile);
  }
  if (nan || scale == mx::kNanScale) return mx::kNanScale;
  return any ? scale : kNeutralScale;
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
    const int64_t first_row = p * kTileRows;
    const int rows = static_cast<int>(n - first_row < kTileRows ? n - first_row : kTileRows);
    for (const mx::Segment& segment : own.segments()) {
      const int64_t bytes = mx::block_bytes(segment.format);
      const auto place = segment.format.bits == 4   ? place_block<4>
                         : segment.format.bits == 6 ? place_block<6>
                                                    : place_block<8>;
      for (int64_t b = 0; b < segment.blocks; ++b) {
        const int64_t block = segment.first_block + b, at = segment.byte_start + b * bytes;
        for (int row = 0; row < rows; ++row) {
          const int64_t source = first_row + row;
          const uint8_t scale =
              place(data + source * own.row_bytes() + at, scales[source * own.blocks() + block],
                    row, panel + sizes.scale_bytes + kTileRows * at);
          panel[block * kTileRows + row] = scale;
          wide |= scale < kSmallestPlainScale || scale > kLargestPlainScale;
        }
      }
    }
  }
  return wide;
}

void unplace_panels(const mx::MixedLayout& layout, int64_t n, const uint8_t* placed, uint8_t* data,
                    uint8_t* scales, int64_t first_panel, int64_t last_panel) {
  const mx::MixedLayout own = layout.weight();
  const PlacedLayout sizes(layout, n);
  for (int64_t p = first_panel; p < last_panel; ++p) {
    const uint8_t* const panel = placed + kLine + p * sizes.panel_bytes;
    const int64_t first_row = p * kTileRows;
    const int rows = static_cast<int>(n - first_row < kTileRows ? n - first_row : kTileRows);
    for (const mx::Segment& segment : own.segments()) {
      const int bits = segment.format.bits;
      const int64_t bytes = mx::block_bytes(segment.format);
      for (int64_t b = 0; b < segment.blocks; ++b) {
        const int64_t block = segment.first_block + b, at = segment.byte_start + b * bytes;
        const uint8_t* const tile = panel + sizes.scale_bytes + kTileRows * at;
        for (int row = 0; row < rows; ++row) {
          uint8_t codes[mx::kBlock], any = 0;
          for (int i = 0; i < mx::kBlock; ++i) {
            codes[i] = tile_code(tile, bits, row, i);
            any |= codes[i] & ((1 << (bits - 1)) - 1);
          }
          const int64_t target = first_row + row;
          mx::pack_block(codes, bits, data + target * own.row_bytes() + at);
          const uint8_t scale = panel[block * kTileRows + row];
          scales[target * own.blocks() + block] = any || scale == mx::kNanScale ? scale : 0;
        }
      }
    }
  }
}

}  // namespace micromix::cpu
