// The sums of the product of many rows, and what is done with them at their end. Included only by
// files that are compiled for AVX-512 with AVX512-BF16.
#pragma once

#include "arrangement.h"
#include "bfloat16_tiles.h"

namespace micromix::cpu::avx512 {
namespace {

// The sums of the four tiles in memory: float32, or integers of 32 bits. Of 2 row tiles x 2 the
// rows follow each other, those of the second column tile after all of the first.
struct alignas(64) Sums {
  float values[4][kTileRows][kTileRows];
};

// One call's panels, and where things are.
struct Context {
  const LinearTask& task;
  const PlacedLayout sizes;
  const uint8_t* prepared;
  uint8_t* decoded;
  Sums* sums;
  int64_t last_panel;

  // The panel; the last one stands in for those beyond it.
  const uint8_t* panel(int64_t p) const {
    return task.weight + kLine + (p < last_panel ? p : last_panel - 1) * sizes.panel_bytes;
  }
};

// The end of a step for a strip and a pair of panels, whose sums are in memory: sums of integers
// get their factors and are added to those of the steps before; at the end of K a row's slots are
// added up, with the bias, and rounded once. A second panel that does not exist is left out.
class PairEnd {
 public:
  PairEnd() = default;

  // Sums that are complete. Without an arrangement each row has one slot.
  PairEnd(const LinearTask& task, Sums& sums, const Arrangement* arrangement, int64_t first_row,
          int64_t last_row, int64_t panel, int64_t last_panel)
      : sums_(&sums),
        arrangement_(arrangement),
        first_row_(first_row),
        rows_(last_row - first_row),
        panel_(panel),
        last_panel_(last_panel),
        ends_(true) {
    whole_ = panel + 2 <= last_panel && task.n >= (panel + 2) * kTileRows &&
             task.out_dtype == Dtype::kBFloat16;
    if (arrangement && rows_ > 0) {
      first_slot_ = arrangement->place(first_row);
      const int64_t last = last_row - 1;
      plain_ = arrangement->place(last) + arrangement->slots(last) - first_slot_ == rows_;
    }
  }

  // Sums of integers and, where not null, of bfloat16 numbers, yet to be added to `sums` or, where
  // `begins`, to become them. Factors: of the strip's slots, and of the pair's columns. Not `ends`:
  // there are more steps.
  void add(const Sums& integers, const float* row_factors, const float* column_factors,
           const Sums* floats, bool begins, bool ends) {
    integers_ = &integers;
    floats_ = floats;
    row_factors_ = row_factors;
    column_factors_ = column_factors;
    begins_ = begins;
    ends_ = ends;
  }

  // Calls f with a function that does slots or, at the end of K, rows [first, last) of the strip,
  // those of them that exist. f is compiled for each kind of end: a loop in it makes no choices.
  template <typename F>
  [[gnu::always_inline]] void visit(const LinearTask& task, const F& f) const {
    if (!sums_) return f(kNothing);
    if (!integers_) return visit_as<kSums>(task, f);
    if (floats_) {
      return begins_ ? visit_as<kIntegers | kFloats>(task, f)
                     : visit_as<kIntegers | kFloats | kSums>(task, f);
    }
    return begins_ ? visit_as<kIntegers>(task, f) : visit_as<kIntegers | kSums>(task, f);
  }
  static constexpr auto kNothing = [](int64_t, int64_t) {};

 private:
  static constexpr int kSums = 1, kIntegers = 2, kFloats = 4;

  uint16_t* at(const LinearTask& task, int64_t row) const {
    return static_cast<uint16_t*>(task.out) + (first_row_ + row) * task.n + panel_ * kTileRows;
  }

  // What values are made of: copies, so that a loop keeps them in registers. A tile's load that
  // waits for its address waits behind other loads.
  template <int kTerms>
  struct Values {
    const float *sums, *integers, *floats, *row_factors;
    __m512 column_factors[2];

    // Of one slot and one of the two panels.
    [[gnu::always_inline]] __m512 operator()(int64_t slot, int panel) const {
      const int64_t at = slot * kTileRows + panel * kStripRows * kTileRows;
      if constexpr (kTerms == kSums) return _mm512_load_ps(sums + at);
      const __m512 sum = _mm512_cvtepi32_ps(_mm512_load_si512(integers + at));
      const __m512 scaled = _mm512_mul_ps(sum, column_factors[panel]);
      const __m512 factor = _mm512_set1_ps(row_factors[slot]);
      if constexpr (kTerms == kIntegers) return _mm512_mul_ps(scaled, factor);
      __m512 rest = _mm512_load_ps((kTerms & kSums ? sums : floats) + at);
      if constexpr ((kTerms & kSums) && (kTerms & kFloats)) {
        rest = _mm512_add_ps(rest, _mm512_load_ps(floats + at));
      }
      return _mm512_fmadd_ps(scaled, factor, rest);
    }
  };

  template <int kTerms>
  [[gnu::always_inline]] Values<kTerms> values() const {
    const auto first = [](const Sums* sums) { return sums ? sums->values[0][0] : nullptr; };
    Values<kTerms> values = {first(sums_), first(integers_), first(floats_), row_factors_, {}};
    if constexpr (kTerms != kSums) {
      values.column_factors[0] = _mm512_load_ps(column_factors_);
      values.column_factors[1] = _mm512_load_ps(column_factors_ + kTileRows);
    }
    return values;
  }

  // Of one row, by its number in the strip.
  template <int kTerms>
  [[gnu::always_inline]] __m512 value_of_row(int64_t r, int panel,
                                             const Values<kTerms>& value) const {
    if (!arrangement_) return value(r, panel);
    const int64_t row = first_row_ + r, slot = arrangement_->place(row) - first_slot_;
    __m512 sum = value(slot, panel);
    for (int i = 1; i < arrangement_->slots(row); ++i) {
      sum = _mm512_add_ps(sum, value(slot + i, panel));
    }
    return sum;
  }

  template <int kTerms, typename F>
  [[gnu::always_inline]] void visit_as(const LinearTask& task, const F& f) const {
    const Values<kTerms> value = values<kTerms>();
    if (!ends_) {
      f([value, sums = sums_->values[0][0]](int64_t first, int64_t last)
            __attribute__((always_inline)) {
              if constexpr (kTerms != kSums) add_up<kTerms>(value, sums, first, last);
            });
    } else if (whole_ && plain_) {
      const auto bias = [&](int panel) {
        const int64_t n = (panel_ + panel) * kTileRows;
        return task.bias ? load_floats(task.bias, task.bias_dtype, n, 0xFFFF) : _mm512_setzero_ps();
      };
      f([value, low = bias(0), high = bias(1), out = at(task, 0), n = task.n, rows = rows_](
            int64_t first, int64_t last) __attribute__((always_inline)) {
        last = last < rows ? last : rows;
        for (int64_t r = first; r < last; ++r) {
          uint16_t* const line = out + r * n;
          fetch_next(line);
          store_pair(line, _mm512_add_ps(value(r, 0), low), _mm512_add_ps(value(r, 1), high));
        }
      });
    } else {
      f([this, &task](int64_t first, int64_t last)
            __attribute__((always_inline)) { finish_rows<kTerms>(task, first, last); });
    }
  }

  template <int kTerms>
  [[gnu::always_inline]] static void add_up(const Values<kTerms>& value, float* sums, int64_t first,
                                            int64_t last) {
    last = last < kStripRows ? last : kStripRows;
    for (int64_t slot = first; slot < last; ++slot) {
      const __m512 low = value(slot, 0), high = value(slot, 1);
      _mm512_store_ps(sums + slot * kTileRows, low);
      _mm512_store_ps(sums + (kStripRows + slot) * kTileRows, high);
    }
  }

  // A store that waits for L3 holds up all others: the next pair's line comes to L2 before.
  [[gnu::always_inline]] static void fetch_next(const uint16_t* line) {
    _mm_prefetch(line + kStripRows, _MM_HINT_T1);
  }

  [[gnu::always_inline]] static void store_pair(uint16_t* out, __m512 low, __m512 high) {
    _mm512_storeu_si512(out, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low)));
  }

  // avx512::finish, but rounded as store_pair rounds: how threads share panels out decides which of
  // them has one.
  [[gnu::always_inline]] static void finish_one(const LinearTask& task, int64_t row, int64_t panel,
                                                __mmask16 columns, __m512 sums) {
    if (task.out_dtype != Dtype::kBFloat16) return finish(task, row, panel, columns, sums);
    const int64_t n = panel * kTileRows;
    if (task.bias) sums = _mm512_add_ps(sums, load_floats(task.bias, task.bias_dtype, n, columns));
    _mm256_mask_storeu_epi16(static_cast<uint16_t*>(task.out) + row * task.n + n, columns,
                             reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(sums)));
  }

  // Rows of several slots, or results that are no whole lines of bfloat16.
  template <int kTerms>
  [[gnu::noinline]] void finish_rows(const LinearTask& task, int64_t first, int64_t last) const {
    const Values<kTerms> value = values<kTerms>();
    last = last < rows_ ? last : rows_;
    for (int64_t r = first; r < last && whole_; ++r) fetch_next(at(task, r));
    for (int c = 0; c < 2 && panel_ + c < last_panel_; ++c) {
      const __mmask16 columns = column_mask(task, panel_ + c);
      for (int64_t r = first; r < last; ++r) {
        finish_one(task, first_row_ + r, panel_ + c, columns, value_of_row<kTerms>(r, c, value));
      }
    }
  }

  Sums* sums_ = nullptr;
  const Sums *integers_ = nullptr, *floats_ = nullptr;
  const Arrangement* arrangement_ = nullptr;
  const float *row_factors_ = nullptr, *column_factors_ = nullptr;
  int64_t first_row_ = 0, rows_ = 0, first_slot_ = 0, panel_ = 0, last_panel_ = 0;
  bool whole_ = false, begins_ = false, ends_ = false, plain_ = true;
};

}  // namespace
}  // namespace micromix::cpu::avx512
