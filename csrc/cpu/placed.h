// A weight as the CPU kernels read it, for every instruction set: a header, then one panel per 16
// output rows. A panel holds the scale bytes of its blocks, 16 a block (one per row), padded to 64
// bytes, then one tile of 16 rows x 32 channels per block. All tiles are whole cache lines.
//
// Within a tile, byte 4n + i of cache line j belongs to row n, so that a line is a vector of 16
// rows with 4 channels each, the operand shape of a 4-way integer dot product:
//   4 bits: 4 lines; the low nibbles hold channels 8j + i, the high nibbles channels 8j + 4 + i.
//   6 bits: the low 4 bits of all codes as above, then 2 lines with the high 2 bits: line j / 2,
//           bits 4 (j % 2) for channel 8j + i and 4 (j % 2) + 2 for channel 8j + 4 + i.
//   8 bits: 8 lines; line j holds channels 4j + i.
//
// Placing makes two things true that kernels rely on. The scale byte of a block of zeros is 127 (a
// neutral factor), unless it is NaN. A block that holds a NaN element has scale byte NaN: every
// product that reads the block is NaN either way.
#pragma once

#include "../mx/layout.h"

namespace micromix::cpu {

inline constexpr int kTileRows = 16;
inline constexpr int64_t kLine = 64;
// A tile of a matrix product, decoded: 16 rows of 64 bytes.
inline constexpr int64_t kTileBytes = kTileRows * kLine;
inline constexpr uint64_t kPlacedMagic = 0x31584D4F5243494D;  // "MICROMX1"
inline constexpr uint8_t kNeutralScale = 127;

// Scales of nonzero blocks in this range, on both operands, cannot bring a product or a sum
// out of the normal float32 range. Kernels take a slower, exact path for the others.
inline constexpr uint8_t kSmallestPlainScale = 79;
inline constexpr uint8_t kLargestPlainScale = 175;

struct alignas(kLine) PlacedHeader {
  uint64_t magic;
  int64_t n, k4, k6, k8;
  int32_t weight_code;       // the bits of the format code that the placed form depends on
  uint32_t has_wide_scales;  // some scale lies outside the plain range, or is NaN
  uint64_t unused[2];        // zero, so that equal weights are equal bytes
};
static_assert(sizeof(PlacedHeader) == kLine);

constexpr int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

constexpr int32_t weight_code(const mx::MixedLayout& layout) {
  return layout.code & (mx::MixedLayout::kFormat6Bit | mx::MixedLayout::kWeightIsMxfp4Bit);
}

MX_HOST_DEVICE constexpr int64_t tile_bytes(mx::ElementFormat format) {
  return kTileRows * mx::block_bytes(format);
}

// Sizes of the parts of a placed weight; `layout` is that of the activations.
struct PlacedLayout {
  int64_t panels;
  int64_t scale_bytes;  // of one panel
  int64_t panel_bytes;

  PlacedLayout(const mx::MixedLayout& layout, int64_t n)
      : panels((n + kTileRows - 1) / kTileRows),
        scale_bytes(round_up(layout.blocks() * kTileRows, kLine)),
        panel_bytes(scale_bytes + kTileRows * layout.weight().row_bytes()) {}

  int64_t bytes() const { return kLine + panels * panel_bytes; }
};

// Where a code sits in its tile: its low bits in byte `low` from `low_shift`; of a 6-bit code the
// high 2 bits in byte `high` from `high_shift`.
struct TilePosition {
  int low, low_shift, high, high_shift;
};

MX_HOST_DEVICE constexpr TilePosition tile_position(int bits, int row, int channel) {
  const int i = 4 * row + channel % 4;
  if (bits == 8) return {channel / 4 * 64 + i, 0, 0, 0};
  const int j = channel / 8, half = channel / 4 % 2;
  return {j * 64 + i, 4 * half, 256 + j / 2 * 64 + i, 4 * (j % 2) + 2 * half};
}

MX_HOST_DEVICE constexpr uint8_t tile_code(const uint8_t* tile, int bits, int row, int channel) {
  const TilePosition at = tile_position(bits, row, channel);
  if (bits == 8) return tile[at.low];
  const int low = (tile[at.low] >> at.low_shift) & 0xF;
  if (bits == 4) return static_cast<uint8_t>(low);
  return static_cast<uint8_t>(low | ((tile[at.high] >> at.high_shift) & 0x3) << 4);
}

// Fetches the lines of a tile some tiles on: the hardware's own prefetching, which begins anew at
// every 4 KB, leaves an eighth of the memory's speed unused, and more on some processors. To L1
// (locality 3) or L2 (2).
template <int kLines, int kLocality = 3, int64_t kDistance = 2048>
[[gnu::always_inline]] inline void fetch_ahead(const uint8_t* tile) {
#pragma GCC unroll 8
  for (int line = 0; line < kLines; ++line) {
    __builtin_prefetch(tile + kDistance + line * kLine, 0, kLocality);
  }
}

}  // namespace micromix::cpu
