// The tiles of AMX: eight, each 16 rows of 64 bytes. Included only by files that are compiled for
// AMX.
#pragma once

#include <immintrin.h>

#include "placed.h"

namespace micromix::cpu {
namespace {

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// The calling thread's tiles, for as long as this lives.
class Tiles {
 public:
  Tiles() {
    TileConfig config;
    for (int i = 0; i < 8; ++i) {
      config.row_bytes[i] = kLine;
      config.rows[i] = kTileRows;
    }
    asm volatile("" : : : "memory");  // gcc 12 does not see that the next line reads all of it
    _tile_loadconfig(&config);
  }
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

}  // namespace
}  // namespace micromix::cpu
