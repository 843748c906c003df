// Products of AMX tiles. Included only by files that are compiled for AMX.
#pragma once

#include "amx.h"
#include "sums.h"

namespace micromix::cpu::avx512 {
namespace {

// Tiles 0-3 hold sums: of up to 2 row tiles the first column tile's in 0 and 1, the second's in 2
// and 3; or of 3 or 4 row tiles x 1. Tiles 4 and 5 take activations, 6 and 7 the weight.
void clear_sums() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

template <int kRowTiles>
constexpr int kColumnTiles = kRowTiles <= 2 ? 2 : 1;

#define MICROMIX_PRODUCT(sums, a, b) /* tiles are named by constants */ \
  if constexpr (kIntegers) {                                            \
    _tile_dpbssd(sums, a, b);                                           \
  } else {                                                              \
    _tile_dpbf16ps(sums, a, b);                                         \
  }

// One tile of K: `rows` apart are those of activations, side by side those of the weight. The
// latter leave the activations in L1 alone where kPassing, as they are not soon used again.
template <int kRowTiles, bool kPassing, bool kIntegers = false>
[[gnu::always_inline]] inline void multiply(const uint8_t* a, int64_t rows, const uint8_t* b) {
  if constexpr (kPassing) {
    _tile_stream_loadd(6, b, kLine);
  } else {
    _tile_loadd(6, b, kLine);
  }
  const auto load_second = [b] __attribute__((always_inline)) {
    if constexpr (kPassing) {
      _tile_stream_loadd(7, b + kTileBytes, kLine);
    } else {
      _tile_loadd(7, b + kTileBytes, kLine);
    }
  };
  if constexpr (kRowTiles == 2) {  // four products take long enough to load all of the next before
    load_second();
    _tile_loadd(4, a, kLine);
    _tile_loadd(5, a + rows, kLine);
    MICROMIX_PRODUCT(0, 4, 6);
    MICROMIX_PRODUCT(2, 4, 7);
    MICROMIX_PRODUCT(1, 5, 6);
    MICROMIX_PRODUCT(3, 5, 7);
    return;
  }
  _tile_loadd(4, a, kLine);
  MICROMIX_PRODUCT(0, 4, 6);
  if constexpr (kRowTiles == 1) {
    load_second();
    MICROMIX_PRODUCT(2, 4, 7);
  } else {
    _tile_loadd(5, a + rows, kLine);
    MICROMIX_PRODUCT(1, 5, 6);
    _tile_loadd(4, a + 2 * rows, kLine);
    MICROMIX_PRODUCT(2, 4, 6);
  }
  if constexpr (kRowTiles == 4) {
    _tile_loadd(5, a + 3 * rows, kLine);
    MICROMIX_PRODUCT(3, 5, 6);
  }
}
#undef MICROMIX_PRODUCT

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

// Stores sums and loads, or clears, the next ones, tile by tile, in the order of their products:
// products on the tiles that are loaded run while others are stored.
[[gnu::always_inline]] inline void exchange_sums(Sums& to, const Sums* from) {
  if (!from) {
    _tile_stored(0, to.values[0], kLine);
    _tile_zero(0);
    _tile_stored(2, to.values[2], kLine);
    _tile_zero(2);
    _tile_stored(1, to.values[1], kLine);
    _tile_zero(1);
    _tile_stored(3, to.values[3], kLine);
    _tile_zero(3);
    return;
  }
  _tile_stored(0, to.values[0], kLine);
  _tile_loadd(0, from->values[0], kLine);
  _tile_stored(2, to.values[2], kLine);
  _tile_loadd(2, from->values[2], kLine);
  _tile_stored(1, to.values[1], kLine);
  _tile_loadd(1, from->values[1], kLine);
  _tile_stored(3, to.values[3], kLine);
  _tile_loadd(3, from->values[3], kLine);
}

}  // namespace
}  // namespace micromix::cpu::avx512
