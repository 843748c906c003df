// How the product of many rows takes its operands: steps of K, and strips of rows.
//
// K is taken in steps. The MXFP4 segment is multiplied as integers (integer_tiles.h), where it is
// long enough to pay for it, all else as bfloat16 numbers.
//
// A strip is two row tiles: 32 slots. A row has one slot, and more where it has more bands in some
// step: all in one strip, which the end of its sums adds up. So a result depends on its own row
// only. bfloat16 numbers are in the row's first slot.
#pragma once

#include <algorithm>
#include <bit>

#include "integer_tiles.h"

namespace micromix::cpu::avx512 {
namespace {

constexpr int kStripRows = 2 * kTileRows;

// Tiles of a row tile that one step takes: these of 32 rows stay in L1.
constexpr int64_t kMaxTiles = 18;
static_assert(2 * kMaxTiles <= 64, "row_scales takes no more blocks");
static_assert(2 * kMaxTiles * mx::kBlock * kLargestInteger * kLargestInteger <= 1 << 24,
              "float32 holds a step's sums of integers");
// Blocks of MXFP4 that pay for sums of integers, which are brought to float32 at the end of a step.
constexpr int64_t kLeastIntegerBlocks = 8;
inline bool has_integers(const LinearTask& task) {
  return !task.weight_only && task.layout.k4 / mx::kBlock >= kLeastIntegerBlocks;
}

// A row with more bands is done again by the AVX-512 kernel.
constexpr int kMostBands = 8;

// One step of K: `tiles` of a row tile from first_tile on, of which the first `integer_tiles` are
// of integers; blocks [first_block, integers_end) as integers, [integers_end, last_block) as
// bfloat16.
struct Step {
  int64_t first_tile, integer_tiles, tiles, first_block, integers_end, last_block;
};

class Steps {
 public:
  Steps(const LinearTask& task, bool with_integers)
      : blocks_(task.layout.blocks()),
        integer_blocks_(with_integers && has_integers(task) ? task.layout.k4 / mx::kBlock : 0) {}

  // Of a row tile.
  int64_t tiles() const { return integer_tiles() + blocks_ - integer_blocks_; }
  int64_t bytes() const { return tiles() * kTileBytes; }
  // Two blocks each.
  int64_t integer_tiles() const { return (integer_blocks_ + 1) / 2; }
  int64_t integer_blocks() const { return integer_blocks_; }
  // Where the tile of a block of bfloat16 numbers is, less the block.
  int64_t tiles_less_blocks() const { return integer_tiles() - integer_blocks_; }

  // One step has all of K or, where that is too long, bfloat16 numbers or integers alone: a step of
  // both stores twice as many sums. Integers come last: their sums reach the end without being
  // stored once more.
  int64_t count() const { return tiles() <= kMaxTiles ? 1 : other_count() + integer_count(); }
  int64_t integer_count() const { return (integer_tiles() + kMaxTiles - 1) / kMaxTiles; }
  int64_t first_integers() const { return count() - integer_count(); }

  // Where the factor of a slot in step i, of integers, is among those of all strips.
  int64_t factor(int64_t slot, int64_t i) const {
    const int64_t of_strip = slot / kStripRows * integer_count() + i - first_integers();
    return of_strip * kStripRows + slot % kStripRows;
  }

  Step operator[](int64_t i) const {
    int64_t first = 0, last = tiles();
    if (count() > 1 && i >= first_integers()) {
      const int64_t step = i - first_integers();
      first = integer_tiles() * step / integer_count();
      last = integer_tiles() * (step + 1) / integer_count();
    } else if (count() > 1) {
      const int64_t others = tiles() - integer_tiles();
      first = integer_tiles() + others * i / other_count();
      last = integer_tiles() + others * (i + 1) / other_count();
    }
    const auto block = [this](int64_t tile) {
      return tile < integer_tiles() ? 2 * tile : tile - tiles_less_blocks();
    };
    const int64_t end = std::clamp(integer_tiles(), first, last);
    return {first, end - first, last - first, block(first), block(end), block(last)};
  }

 private:
  int64_t other_count() const { return (tiles() - integer_tiles() + kMaxTiles - 1) / kMaxTiles; }

  int64_t blocks_, integer_blocks_;
};

// Which slots the rows of a product have.
class Arrangement {
 public:
  static int64_t bytes(int64_t rows) { return (1 + (rows + 1) + rows) * sizeof(int32_t) + rows; }

  Arrangement(const uint8_t* memory, int64_t rows)
      : rows_(rows),
        strips_(reinterpret_cast<int32_t*>(const_cast<uint8_t*>(memory))),
        first_rows_(strips_ + 1),
        places_(first_rows_ + rows + 1),
        slots_(reinterpret_cast<uint8_t*>(places_ + rows)) {}

  // Gives each row its slots: `slots(r)`, or 0 for a row that is to be done again.
  template <typename Slots>
  void fill(const Slots& slots) {
    int32_t strips = 0, place = 0;
    for (int64_t r = 0; r < rows_; ++r) {
      slots_[r] = static_cast<uint8_t>(slots(r));
      const int32_t own = slots_[r] ? slots_[r] : 1;
      if (place % kStripRows + own > kStripRows) place = strips * kStripRows;
      if (place % kStripRows == 0) first_rows_[strips++] = static_cast<int32_t>(r);
      places_[r] = place;
      place += own;
    }
    first_rows_[strips] = static_cast<int32_t>(rows_);
    *strips_ = strips;
  }

  int64_t strips() const { return *strips_; }
  int64_t first_row(int64_t strip) const { return first_rows_[strip]; }
  // The slot after the last that a row of a strip has.
  int64_t end(int64_t strip) const {
    const int64_t last = first_rows_[strip + 1] - 1;
    return places_[last] + slots(last);
  }
  // The first slot of a row.
  int64_t place(int64_t row) const { return places_[row]; }
  bool is_done_again(int64_t row) const { return slots_[row] == 0; }
  int slots(int64_t row) const { return slots_[row] ? slots_[row] : 1; }

 private:
  int64_t rows_;
  int32_t* strips_;
  int32_t* first_rows_;
  int32_t* places_;
  uint8_t* slots_;
};

// The most bands that a row has in a step, or 0 where the AVX-512 kernel is to do it.
inline int bands_of_row(const LinearTask& task, const Steps& steps, int64_t row) {
  const uint8_t* const scales = task.scales + row * task.layout.blocks();
  const uint8_t* const data = task.data + row * task.layout.row_bytes();
  int most = 1;
  for (int64_t i = steps.first_integers(); i < steps.count(); ++i) {
    const Step step = steps[i];
    const int64_t blocks = step.integers_end - step.first_block;
    const __m512i bytes = row_scales(scales + step.first_block, blocks);
    __mmask64 left = _mm512_test_epi8_mask(bytes, bytes);
    const __m512i above = _mm512_sub_epi8(bytes, _mm512_set1_epi8(kSmallestPlainScale));
    constexpr int kPlain = kLargestPlainScale - kSmallestPlainScale;
    if (_mm512_mask_cmpgt_epu8_mask(left, above, _mm512_set1_epi8(kPlain))) return 0;
    // Blocks of scale byte 0 are of zeros, or of numbers near 2^-127.
    for (uint64_t rest = ~left & blocks_mask(blocks); rest; rest &= rest - 1) {
      const int64_t block = step.first_block + std::countr_zero(rest);
      const __m128i codes =
          _mm_loadu_si128(reinterpret_cast<const __m128i*>(data + block * mx::kBlock / 2));
      if (_mm_test_epi8_mask(codes, _mm_set1_epi8(0x77))) return 0;
    }
    int bands = 0;
    do {
      next_band(bytes, left);
      ++bands;
    } while (left);
    if (bands > kMostBands) return 0;
    most = bands > most ? bands : most;
  }
  return most;
}

}  // namespace
}  // namespace micromix::cpu::avx512
