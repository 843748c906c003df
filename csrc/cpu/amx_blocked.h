// The AMX product of many rows: a strip of the activations, one step of K long, stays in L1 while
// it meets several pairs of panels, whose decoded tiles stay in L2, as do the sums of several
// strips. Included only by files that are compiled for AMX.
#pragma once

#include <algorithm>

#include "amx_products.h"

namespace micromix::cpu::avx512 {
namespace {

// Strips and pairs of panels at once. Every range of pairs reads all strips anew: where those are
// many, a longer range pays, though decoded tiles and sums then fill L2.
constexpr int64_t kMaxStrips = 64, kManyStrips = 32;
constexpr int64_t kMaxPairs = 20, kPairs = 16;
static_assert(kMaxPairs <= 32, "a bit each");
constexpr int64_t kPairColumns = 2 * kTileRows;

struct BlockedContext : Context {
  const Steps steps;
  const Arrangement arrangement;
  const float* row_factors;  // [strip, step of integers, slot]
  float* column_factors;     // [pair at once, column]
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

// A pair's blocks that are multiplied as bfloat16 numbers.
void decode_bfloat16(const BlockedContext& context, const Step& step, const Pair& pair,
                     uint8_t* out) {
  for_each_block(context.task.layout, context.sizes.scale_bytes, step.integers_end, step.last_block,
                 [&]<mx::ElementFormat kFormat>(int64_t b, int64_t tile) {
                   for (int c = 0; c < 2; ++c) {
                     pair.fetch<kFormat.bits>(c, tile);
                     fetch_to_write<kTileRows>(out + 2 * kTileBytes);
                     decode_tile<kFormat>(pair.panels[c] + tile, pair.panels[c] + b * kTileRows,
                                          out);
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
        std::memset(half, 0, kTileBytes / 2);
        continue;
      }
      pair.fetch<mx::E2M1.bits>(c, tile);
      fetch_to_write<kTileRows / 2>(half + 2 * kTileBytes);
      decode_integers(pair.panels[c] + tile, pair.panels[c] + b * kTileRows, own[c].largest, half);
    }
  }
}

// Decodes a band of the pairs of panels that have it; with the first, which all have, what is
// multiplied as bfloat16 numbers.
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
      decode_bands(context, step, panels, own, out,
                   context.column_factors + decoded.count * kPairColumns);
    }
    if (band == 0) {
      decode_bfloat16(context, step, panels, out + step.integer_tiles * 2 * kTileBytes);
    }
    decoded.pairs[decoded.count++] = static_cast<uint8_t>(pair);
  }
  return decoded;
}

// The products of a strip and a pair: `tiles` of a row tile, whose second is `bytes` on. Beside
// each of them a part of the next strip is fetched to L2 and, where not null, four lines of sums to
// L1, and some rows of the pair before are brought to their end. All addresses are in registers.
template <bool kIntegers, typename EndOfRows>
[[gnu::always_inline]] inline void multiply_tiles(const uint8_t* a, int64_t bytes, const uint8_t* b,
                                                  int64_t tiles, const uint8_t* next,
                                                  int64_t part_bytes, const uint8_t* sums,
                                                  int64_t end_rows, EndOfRows end_of_rows) {
  const uint8_t* const end = a + tiles * kTileBytes;
  for (int64_t row = 0; a < end; row += end_rows) {
    for (int64_t byte = 0; byte < part_bytes; byte += kLine) {
      _mm_prefetch(next + byte, _MM_HINT_T1);
    }
    next += part_bytes;
    if (sums) {
#pragma GCC unroll 4
      for (int line = 0; line < 4; ++line) _mm_prefetch(sums + line * kLine, _MM_HINT_T0);
      sums += 4 * kLine;
    }
    multiply<2, true, kIntegers>(a, bytes, b);
    end_of_rows(row, row + end_rows);
    a += kTileBytes;
    b += 2 * kTileBytes;
  }
}

// Adds the products with the decoded pairs to the sums, or makes them the sums, where `begun` does
// not have the pair; where `ends`, brings those to their end. A step without integers goes on with
// the sums in tiles; one with them begins anew and leaves the addition to PairEnd. `tiles` of the
// step are multiplied, all or its integers alone.
template <bool kIntegers>
void multiply_range(const BlockedContext& context, const Range& range, const Decoded& decoded,
                    int64_t tiles, uint32_t begun, bool ends) {
  const LinearTask& task = context.task;
  const int64_t bytes = context.steps.bytes(), pairs = range.pairs();
  const int64_t integer_tiles = kIntegers ? range.step.integer_tiles : 0;
  // What a pair leaves in the tiles stays in L1, and is brought to its end beside the next pair's
  // products: those of the longer of the two parts, which comes first, so that it has been when the
  // shorter is stored.
  Sums &integers = context.sums[0], &floats = context.sums[1], *const all_sums = context.sums + 2;
  const bool integers_first = 2 * integer_tiles >= tiles,
             mixed = kIntegers && integer_tiles < tiles;
  const int64_t longer = integers_first ? integer_tiles : tiles - integer_tiles;
  const int64_t end_rows = (kStripRows + longer - 1) / longer;
  PairEnd end;
  if (kIntegers || !begun) {
    clear_sums();
  } else {
    load_sums(*all_sums);
  }
  for (int64_t s = range.s0; s < range.s1; ++s) {
    const uint8_t* const a = context.prepared + s * 2 * bytes + range.step.first_tile * kTileBytes;
    const float* const row_factors =
        kIntegers ? context.row_factors + context.steps.factor(s * kStripRows, range.number)
                  : nullptr;
    const int64_t first_row = context.arrangement.first_row(s);
    const int64_t last_row = context.arrangement.first_row(s + 1);
    for (int64_t slot = 0; slot < decoded.count; ++slot) {
      const int64_t pair = decoded.pairs[slot];
      Sums* const sums = all_sums + (s - range.s0) * pairs + pair;
      const bool begins = !(begun >> pair & 1);
      const uint8_t* const b = context.decoded + slot * range.pair_bytes();
      // The next strip is fetched to L2 in parts, one beside each of the first pairs; where the
      // next sums go to tiles, which wait for them, they are fetched to L1.
      const int64_t parts = decoded.count < kPairs ? kPairs / 4 : kPairs / 2;
      const int64_t part_bytes = slot < 2 * parts ? kTileBytes / parts : 0;
      const uint8_t* const next =
          a + (2 + slot / parts) * bytes + slot % parts * tiles * part_bytes;
      const bool fetches_sums = !kIntegers && !(begins && ends);
      const uint8_t* const next_sums = reinterpret_cast<const uint8_t*>(sums + 1);
      PairEnd next_end;
      if (kIntegers || ends) {
        next_end = PairEnd(task, kIntegers ? *sums : floats, &context.arrangement, first_row,
                           last_row, range.p0 + 2 * pair, range.p1);
      }
      if constexpr (kIntegers) {
        next_end.add(integers, row_factors, context.column_factors + slot * kPairColumns,
                     mixed ? &floats : nullptr, begins, ends);
      }
      const auto multiply_part =
          [&]<bool kPartIsIntegers>(int64_t first, int64_t last, const auto& end_of_rows)
              __attribute__((always_inline)) {
                multiply_tiles<kPartIsIntegers>(
                    a + first * kTileBytes, bytes, b + first * 2 * kTileBytes, last - first,
                    next + first * part_bytes, part_bytes,
                    fetches_sums ? next_sums + 4 * first * kLine : nullptr, end_rows, end_of_rows);
              };
      const auto multiply_first = [&]<bool kPartIsIntegers>(int64_t first, int64_t last) {
        end.visit(task, [&](const auto& end_of_rows) __attribute__((always_inline)) {
          multiply_part.template operator()<kPartIsIntegers>(first, last, end_of_rows);
        });
      };
      if constexpr (kIntegers) {
        if (!integers_first) {
          multiply_first.template operator()<false>(integer_tiles, tiles);
          exchange_sums(floats, nullptr);
          multiply_part.template operator()<true>(0, integer_tiles, PairEnd::kNothing);
        } else {
          multiply_first.template operator()<true>(0, integer_tiles);
        }
        exchange_sums(integers, nullptr);
        if (mixed && integers_first) {
          multiply_part.template operator()<false>(integer_tiles, tiles, PairEnd::kNothing);
          exchange_sums(floats, nullptr);
        }
      } else {
        multiply_first.template operator()<false>(0, tiles);
        exchange_sums(ends ? floats : *sums, begins ? nullptr : sums + 1);
      }
      end = next_end;
    }
  }
  end.visit(task, [](const auto& end_of_rows) { end_of_rows(0, kStripRows); });
}

// One step of K. What `decoded` has of the strips before serves these too.
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
    if (decoded.count == 0) decoded = decode(context, range, bands, band);
    asm volatile("" : : : "memory");  // gcc 12: _tile_loadd reads memory
    const auto multiply_all = step.integer_tiles > 0 ? multiply_range<true> : multiply_range<false>;
    multiply_all(context, range, decoded, band == 0 ? step.tiles : step.integer_tiles, begun,
                 ends && band == 0);
    for (int64_t i = 0; i < decoded.count; ++i) begun |= 1u << decoded.pairs[i];
    if (most > 1 || context.steps.count() > 1) decoded.count = 0;
  }
}

// The sums that are kept between steps, of the strips at once, and what multiply_range needs beside
// them.
int64_t kept_sums(const Steps& steps, int64_t strips) {
  const bool none = steps.count() == 1 && steps.integer_count() == 0;
  return 3 + (none ? 0 : kMaxPairs * std::min(strips, kMaxStrips));
}

void run_blocked(const BlockedContext& context, int64_t first_panel) {
  const int64_t strips = context.arrangement.strips();
  // Equal numbers of pairs at once: few pairs alone would wait for the activations.
  const int64_t pairs = (context.last_panel - first_panel + 1) / 2;
  const int64_t most = strips > kManyStrips ? kMaxPairs : kPairs;
  const int64_t ranges = (pairs + most - 1) / most;
  for (int64_t i = 0; i < ranges; ++i) {
    const int64_t p0 = first_panel + pairs * i / ranges * 2;
    const int64_t p1 = std::min(first_panel + pairs * (i + 1) / ranges * 2, context.last_panel);
    Decoded decoded;
    for (int64_t s = 0; s < strips; s += kMaxStrips) {
      for (int64_t number = 0; number < context.steps.count(); ++number) {
        const Range range{
            p0, p1, s, std::min(s + kMaxStrips, strips), number, context.steps[number]};
        run_step(context, range, decoded);
      }
    }
  }
}

}  // namespace
}  // namespace micromix::cpu::avx512
