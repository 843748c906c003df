// The product of many rows: a strip of the activations, one step of K long, stays in L1 while it
// meets several pairs of panels, whose decoded tiles stay in L2, as do the sums of several strips.
// `Products` multiplies (many_rows.h). Included only by files that are compiled for AVX-512 with
// AVX512-BF16.
#pragma once

#include <algorithm>

#include "scaled_tiles.h"
#include "sums.h"

namespace micromix::cpu::avx512 {
namespace {

// The most pairs of panels at once that Products::pairs may ask for.
constexpr int64_t kMaxPairs = 20;
static_assert(kMaxPairs <= 32, "a bit each");
constexpr int64_t kPairColumns = 2 * kTileRows;

struct BlockedContext : Context {
  const Steps steps;
  const Arrangement arrangement;
  const float* row_factors;   // [strip, step of integers, slot]
  const int32_t* row_starts;  // the same, of the sums of integers, where Products has an offset
  float* column_factors;      // [pair at once, column]
  const int64_t scaled_end;   // end_of_scaled
};

// What is in the caches at once: panels [p0, p1), strips [s0, s1), a step of K.
struct Range {
  int64_t p0, p1, s0, s1, number;
  Step step;

  int64_t pairs() const { return (p1 - p0 + 1) / 2; }
  int64_t pair_bytes() const { return step.tiles * 2 * kTileBytes; }
};

// The pairs of panels whose tiles are decoded, each [tile][2 panels].
struct Decoded {
  int64_t count = 0;
  uint8_t pairs[kMaxPairs];
};

// A pair of panels, and the next pair, which no hardware would foresee: what is decoded of the one
// is fetched of the other. The two are decoded block by block in turns: memory gives more to who
// reads at two places, and what is written has no gaps.
struct Pair {
  const uint8_t *panels[2], *next[2];

  Pair(const BlockedContext& context, int64_t p)
      : panels{context.panel(p), context.panel(p + 1)},
        next{context.panel(p + 2), context.panel(p + 3)} {}

  template <int kLines>
  [[gnu::always_inline]] void fetch(int c, int64_t tile) const {
#pragma GCC unroll 8
    for (int line = 0; line < kLines; ++line) {
      _mm_prefetch(next[c] + tile + line * kLine, _MM_HINT_T1);
    }
  }
};

// Lines that are written soon.
template <int kLines>
[[gnu::always_inline]] inline void fetch_to_write(const uint8_t* out) {
#pragma GCC unroll 16
  for (int line = 0; line < kLines; ++line) __builtin_prefetch(out + line * kLine, 1);
}

// A pair's blocks that are multiplied as bfloat16 numbers, or as integers with their own scales.
template <bool kScales>
void decode_blocks(const BlockedContext& context, const Step& step, const Pair& pair,
                   uint8_t* out) {
  for_each_block(context.task.layout, context.sizes.scale_bytes, step.integers_end, step.last_block,
                 [&]<mx::ElementFormat kFormat>(int64_t b, int64_t tile) {
                   for (int c = 0; c < 2; ++c) {
                     pair.fetch<kFormat.bits>(c, tile);
                     fetch_to_write<kTileRows>(out + 2 * kTileBytes);
                     const uint8_t* const scales = pair.panels[c] + b * kTileRows;
                     constexpr bool kCanScale = kScales && mx::is_small_integer(kFormat);
                     if (kCanScale && b < context.scaled_end) {
                       decode_scaled<kFormat.bits>(pair.panels[c] + tile, scales, out);
                     } else {
                       decode_tile<kFormat>(pair.panels[c] + tile, scales, out);
                     }
                     out += kTileBytes;
                   }
                 });
}

// The bands of a pair of panels in a step: how many, and the first of each panel.
struct PairBands {
  int count = 1;
  PanelBand first[2];
};

// A band of a panel in a step, after the first.
PanelBand later_band(const BlockedContext& context, const Step& step, int64_t p, PanelBand band,
                     int number) {
  for (; number > 0; --number) {
    band =
        panel_band(context.panel(p), step.first_block, step.integers_end, below_band(band.largest));
  }
  return band;
}

PairBands bands_of_pair(const BlockedContext& context, const Step& step, int64_t p) {
  PairBands bands;
  for (int c = 0; c < 2; ++c) {
    // The scales of the pair after the next one, which will be decoded with them.
    for (int64_t b = step.first_block; b < step.integers_end; b += kLine / kTileRows) {
      _mm_prefetch(context.panel(p + 4 + c) + b * kTileRows, _MM_HINT_T0);
    }
    PanelBand band =
        panel_band(context.panel(p + c), step.first_block, step.integers_end, _mm_set1_epi8(-1));
    bands.first[c] = band;
    for (int count = 1; !band.last; bands.count = std::max(bands.count, ++count)) {
      band = later_band(context, step, p + c, band, 1);
    }
  }
  return bands;
}

// Bands of a pair's blocks that are multiplied as integers, and the factors of its rows.
template <int kOffset>
void decode_bands(const BlockedContext& context, const Step& step, const Pair& pair,
                  const PanelBand* own, uint8_t* out, float* factors) {
  for (int c = 0; c < 2; ++c) {
    alignas(16) uint8_t largest[kTileRows];
    _mm_store_si128(reinterpret_cast<__m128i*>(largest), own[c].largest);
    for (int n = 0; n < kTileRows; ++n) factors[c * kTileRows + n] = band_factor(largest[n]);
  }
  for (int64_t i = 0; i < 2 * step.integer_tiles; ++i) {
    const int64_t b = step.first_block + i;
    const int64_t tile = context.sizes.scale_bytes + b * tile_bytes(mx::E2M1);
    for (int c = 0; c < 2; ++c) {
      uint8_t* const half = out + (i / 2 * 2 + c) * kTileBytes + i % 2 * (kTileBytes / 2);
      if (b == step.integers_end) {  // half a tile is left
        std::memset(half, kOffset, kTileBytes / 2);
        continue;
      }
      pair.fetch<mx::E2M1.bits>(c, tile);
      fetch_to_write<kTileRows / 2>(half + 2 * kTileBytes);
      decode_integers<kOffset>(pair.panels[c] + tile, pair.panels[c] + b * kTileRows,
                               own[c].largest, half);
    }
  }
}

// Decodes a band of the pairs of panels that have it; with the first, which all have, what is
// multiplied as bfloat16 numbers.
template <typename Products>
Decoded decode(const BlockedContext& context, const Range& range, const PairBands* bands,
               int band) {
  const Step& step = range.step;
  Decoded decoded;
  for (int64_t pair = 0; pair < range.pairs(); ++pair) {
    if (bands[pair].count <= band) continue;
    const int64_t p = range.p0 + 2 * pair;
    const Pair panels(context, p);
    uint8_t* const out = context.decoded + decoded.count * range.pair_bytes();
    if (step.integer_tiles > 0) {
      const PanelBand own[2] = {later_band(context, step, p, bands[pair].first[0], band),
                                later_band(context, step, p + 1, bands[pair].first[1], band)};
      decode_bands<Products::kOffset>(context, step, panels, own, out,
                                      context.column_factors + decoded.count * kPairColumns);
    }
    if (band == 0) {
      decode_blocks<Products::kScales>(context, step, panels,
                                       out + step.integer_tiles * 2 * kTileBytes);
    }
    decoded.pairs[decoded.count++] = static_cast<uint8_t>(pair);
  }
  return decoded;
}

// One step of K. What `decoded` has of the strips before serves these too.
template <typename Products>
void run_step(const BlockedContext& context, const Range& range, Decoded& decoded) {
  const Step& step = range.step;
  const bool ends = range.number + 1 == context.steps.count();
  uint32_t begun = range.number == 0 ? 0 : ~0u;
  PairBands bands[kMaxPairs];
  int most = 1;
  for (int64_t pair = 0; pair < range.pairs() && step.integer_tiles > 0; ++pair) {
    bands[pair] = bands_of_pair(context, step, range.p0 + 2 * pair);
    most = std::max(most, bands[pair].count);
  }
  for (int band = most - 1; band >= 0; --band) {  // all pairs have the first
    if (decoded.count == 0) decoded = decode<Products>(context, range, bands, band);
    asm volatile("" : : : "memory");  // gcc 12: _tile_loadd reads memory
    const auto multiply_all = step.integer_tiles > 0 ? Products::template multiply_range<true>
                                                     : Products::template multiply_range<false>;
    multiply_all(context, range, decoded, band == 0 ? step.tiles : step.integer_tiles, begun,
                 ends && band == 0);
    for (int64_t i = 0; i < decoded.count; ++i) begun |= 1u << decoded.pairs[i];
    if (most > 1 || context.steps.count() > 1) decoded.count = 0;
  }
}

// The sums that are kept between steps, of the strips at once, and what multiply_range needs beside
// them.
int64_t kept_sums(const Steps& steps, int64_t strips, int64_t pairs) {
  const bool none = steps.count() == 1 && steps.integer_count() == 0;
  return 3 + (none ? 0 : pairs * strips);
}

template <typename Products>
void run_blocked(const BlockedContext& context, int64_t first_panel) {
  const int64_t strips = context.arrangement.strips();
  // Equal numbers of pairs at once: few pairs alone would wait for the activations.
  const int64_t pairs = (context.last_panel - first_panel + 1) / 2;
  const int64_t most = Products::pairs(strips);
  const int64_t ranges = (pairs + most - 1) / most;
  for (int64_t i = 0; i < ranges; ++i) {
    const int64_t p0 = first_panel + pairs * i / ranges * 2;
    const int64_t p1 = std::min(first_panel + pairs * (i + 1) / ranges * 2, context.last_panel);
    Decoded decoded;
    for (int64_t s = 0; s < strips; s += Products::kStrips) {
      for (int64_t number = 0; number < context.steps.count(); ++number) {
        const Range range{
            p0, p1, s, std::min(s + Products::kStrips, strips), number, context.steps[number]};
        run_step<Products>(context, range, decoded);
      }
    }
  }
}

}  // namespace
}  // namespace micromix::cpu::avx512
