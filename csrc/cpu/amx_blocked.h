// The AMX product of many rows: the part of blocked.h that multiplies. Included only by files that
// are compiled for AMX.
#pragma once

#include "amx_products.h"
#include "blocked.h"

namespace micromix::cpu::avx512 {
namespace {

// Every range of pairs reads all strips anew: where those are many, a longer range pays, though
// decoded tiles and sums then fill L2.
constexpr int64_t kManyStrips = 32, kPairs = 16;

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

}  // namespace
}  // namespace micromix::cpu::avx512
