// Which tile a product runs with, and into how many ranges K is cut.
#pragma once

#include "arguments.h"
#include "tiles.h"

namespace micromix::blackwell {

enum class TileId : int { k16, k32, k64, k128 };
inline constexpr int kTileCount = 4;

// Calls f with a value of the type of the tile.
template <typename F>
constexpr auto with_tile(TileId id, const F& f) {
  switch (id) {
    case TileId::k16:
      return f(Tile16{});
    case TileId::k32:
      return f(Tile32{});
    case TileId::k64:
      return f(Tile64{});
    default:
      return f(Tile128{});
  }
}

// The smallest tile that holds all rows, up to 128.
constexpr TileId choose_tile(int64_t m) {
  return m <= 16 ? TileId::k16 : m <= 32 ? TileId::k32 : m <= 64 ? TileId::k64 : TileId::k128;
}

// K is cut where the tiles alone leave at least half of the multiprocessors idle, as with few rows:
// into as many ranges as fill them once, each long enough to pay for its sums' way through memory.
constexpr int choose_splits(int64_t blocks, int stages, int multiprocessors) {
  constexpr int kLeastStages = 4;
  if (blocks == 0) return 1;
  int64_t splits = multiprocessors / blocks;
  if (splits > stages / kLeastStages) splits = stages / kLeastStages;
  if (splits > kMaxSplits) splits = kMaxSplits;
  return splits < 1 ? 1 : static_cast<int>(splits);
}

}  // namespace micromix::blackwell
