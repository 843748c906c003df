// The product for many rows, on AMX and on AVX512-BF16.
//
// Of a long MXFP4 segment integers are multiplied (integer_tiles.h), where there are rows enough.
// Otherwise both operands are decoded to bfloat16 with their scales applied: an MX element times
// its scale is a bfloat16 number, and no product or sum leaves the normal float32 range (both take
// subnormal numbers for zero), while scales are in the plain range. Panels of the weight and rows
// of activations with other scales are the AVX-512 kernel's, eight rows at a time.
//
// What multiplies is given as `Products`:
//   kOffset                        what it wants added to the integers of the weight;
//   kScales                        whether it multiplies integers with scales (scaled_tiles.h);
//   is_streamed(task)              whether there are so few rows that they go another way, without
//                                  integers: run_streamed(context, first_panel), which has
//                                  kStreamedBytes for decoded tiles;
//   kStrips, pairs(strips)         so many strips and pairs of panels are multiplied at once;
//   Guard                          lives while it multiplies;
//   multiply_range<kIntegers>(...) the products of blocked.h.
//
// Included only by files that are compiled for AVX-512 with AVX512-BF16.
#pragma once

#include "blocked.h"
#include "scaled_tiles.h"

namespace micromix::cpu::avx512 {
namespace {

// A row of float activations. One whose largest magnitude lies outside the plain range is wide.
bool prepare_floats(const LinearTask& task, int64_t row, uint8_t* out) {
  __m512i amax = _mm512_setzero_si512();
  for_each_float_block(task, row, [&](const mx::Segment&, int64_t b, Block block) {
    store_tile_row(block, out + b * kTileBytes);
    amax = _mm512_max_epu32(amax, magnitudes(block));
  });
  const uint32_t largest = _mm512_reduce_max_epu32(amax);
  const uint32_t exponent = largest >> mx::kFloat32MantissaBits;
  return largest != 0 && (exponent < kSmallestPlainScale || exponent > kLargestPlainScale);
}

// The blocks of a row that are multiplied as bfloat16 numbers, or as integers with their own
// scales. Returns whether one is wide.
template <bool kScales>
bool prepare_packed(const LinearTask& task, const Steps& steps, int64_t row, uint8_t* out) {
  const uint8_t* const data = task.data + row * task.layout.row_bytes();
  const uint8_t* const scales = task.scales + row * task.layout.blocks();
  out += steps.tiles_less_blocks() * kTileBytes;
  bool wide = false;
  for (const mx::Segment& s : task.layout.segments()) {
    const uint8_t* const packed = data + s.byte_start;
    if (s.format == mx::E2M1 && steps.integer_tiles() > 0) continue;
    const mx::ElementFormat weight = task.layout.weight_format(s);
    if (kScales && is_scaled(task, s)) {
      wide |= s.format == mx::E2M1 ? prepare_scaled<4>(s, weight, packed, scales, out)
                                   : prepare_scaled<6>(s, weight, packed, scales, out);
      continue;
    }
    if (s.format == mx::E2M1) wide |= prepare_blocks<mx::E2M1>(s, packed, scales, out);
    if (s.format == mx::E2M3) wide |= prepare_blocks<mx::E2M3>(s, packed, scales, out);
    if (s.format == mx::E3M2) wide |= prepare_blocks<mx::E3M2>(s, packed, scales, out);
    if (s.format == mx::E4M3) wide |= prepare_blocks<mx::E4M3>(s, packed, scales, out);
  }
  return wide;
}

// Whether some scale of a panel lies outside the plain range. What pads the scales is neutral.
bool is_wide(const LinearTask& task, const PlacedLayout& sizes, int64_t panel) {
  const uint8_t* const scales = task.weight + kLine + panel * sizes.panel_bytes;
  const __m512i least = _mm512_set1_epi8(kSmallestPlainScale);
  const __m512i range = _mm512_set1_epi8(kLargestPlainScale - kSmallestPlainScale);
  __mmask64 wide = 0;
  for (int64_t i = 0; i < sizes.scale_bytes; i += kLine) {
    wide |= _mm512_cmpgt_epu8_mask(_mm512_sub_epi8(load(scales + i), least), range);
  }
  return wide != 0;
}

// Calls f with the ranges of panels that are wide, or with those that are not.
template <typename F>
void for_each_range(const LinearTask& task, int64_t first_panel, int64_t last_panel, bool wide,
                    const F& f) {
  if (!reinterpret_cast<const PlacedHeader*>(task.weight)->has_wide_scales) {
    if (!wide) f(first_panel, last_panel);
    return;
  }
  const PlacedLayout sizes(task.layout, task.n);
  for (int64_t p = first_panel; p < last_panel;) {
    const int64_t first = p;
    while (p < last_panel && is_wide(task, sizes, p) == wide) ++p;
    if (p > first) f(first, p);
    while (p < last_panel && is_wide(task, sizes, p) != wide) ++p;
  }
}

constexpr int64_t kRowsAgain = 8;  // at once: so many meet a decoded tile of its

// Rows that AVX-512 multiplies. The bits of none depend on which are multiplied with it.
class RowsAgain {
 public:
  RowsAgain(const LinearTask& task, uint8_t* prepared) : task_(task), prepared_(prepared) {
    row_bytes_ = kLinearAvx512.prepared_bytes(task.of_row(0));
  }

  // Adds a row. `run` is called with panels once there are enough, and by `finish`.
  template <typename F>
  void add(int64_t row, const F& for_panels) {
    kLinearAvx512.prepare(task_.of_row(row), 0, 1, prepared_ + count_ * row_bytes_);
    rows_[count_++] = row;
    if (count_ == kRowsAgain) finish(for_panels);
  }

  template <typename F>
  void finish(const F& for_panels) {
    if (count_ == 0) return;
    LinearTask some = task_;
    some.m = count_;
    some.out_rows = rows_;
    for_panels([&](int64_t first_panel, int64_t last_panel) {
      kLinearAvx512.run(some, prepared_, first_panel, last_panel, nullptr);
    });
    count_ = 0;
  }

 private:
  const LinearTask& task_;
  uint8_t* const prepared_;
  int64_t row_bytes_, count_ = 0, rows_[kRowsAgain];
};

template <typename Products>
struct ManyRows {
  static Steps steps_of(const LinearTask& task) { return {task, !Products::is_streamed(task)}; }

  static int64_t arranged_bytes(const LinearTask& task) {
    return Products::is_streamed(task) ? 0 : Arrangement::bytes(task.m);
  }

  static void arrange(const LinearTask& task, uint8_t* arranged) {
    if (Products::is_streamed(task)) return;
    const Steps steps = steps_of(task);
    Arrangement(arranged, task.m).fill([&](int64_t r) { return bands_of_row(task, steps, r); });
  }

  // Prepared activations: row tiles, each with the tiles of all steps side by side; the factors of
  // integers, [strip, step of integers, slot], and where there is an offset their starts; one byte
  // per row that says whether it is to be done again. Slots that no row has may hold anything.
  struct Prepared {
    Steps steps;
    int64_t tiles_bytes, factors_bytes, bytes;

    explicit Prepared(const LinearTask& task) : steps(steps_of(task)) {
      const bool streamed = Products::is_streamed(task);
      const int64_t strips = streamed ? 0 : Arrangement(task.arranged, task.m).strips();
      const int64_t row_tiles = streamed ? (task.m + kTileRows - 1) / kTileRows : 2 * strips;
      tiles_bytes = row_tiles * steps.bytes();
      factors_bytes = strips * steps.integer_count() * kStripRows * int64_t{sizeof(float)};
      bytes = done_again() + task.m;
    }

    // Where things are.
    int64_t slot(int64_t slot) const {
      return slot / kTileRows * steps.bytes() + slot % kTileRows * kLine;
    }
    int64_t factors() const { return tiles_bytes; }
    int64_t starts() const { return factors() + factors_bytes; }
    int64_t done_again() const { return starts() + (Products::kOffset ? factors_bytes : 0); }
  };

  static int64_t prepared_bytes(const LinearTask& task) { return Prepared(task).bytes; }

  // The MXFP4 segment of a row as integers, a band a slot.
  static void prepare_bands(const LinearTask& task, const Prepared& sizes, int64_t row,
                            int64_t first_slot, int slots, uint8_t* prepared) {
    const uint8_t* const data = task.data + row * task.layout.row_bytes();
    const uint8_t* const scales = task.scales + row * task.layout.blocks();
    auto* const factors = reinterpret_cast<float*>(prepared + sizes.factors());
    auto* const starts = reinterpret_cast<int32_t*>(prepared + sizes.starts());
    for (int64_t i = sizes.steps.first_integers(); i < sizes.steps.count(); ++i) {
      const Step step = sizes.steps[i];
      const int64_t blocks = step.integers_end - step.first_block;
      const __m512i bytes = row_scales(scales + step.first_block, blocks);
      __mmask64 left = _mm512_test_epi8_mask(bytes, bytes);
      for (int64_t slot = first_slot; slot < first_slot + slots; ++slot) {
        const RowBand band = next_band(bytes, left);
        factors[sizes.steps.factor(slot, i)] = band_factor(band.largest);
        const int32_t start = prepare_integers<Products::kOffset>(
            data + step.first_block * mx::kBlock / 2, bytes, blocks, band,
            prepared + sizes.slot(slot) + step.first_tile * kTileBytes);
        if constexpr (Products::kOffset != 0) starts[sizes.steps.factor(slot, i)] = start;
      }
    }
    // Their other numbers are the first slot's.
    for (int64_t slot = first_slot + 1; slot < first_slot + slots; ++slot) {
      for (int64_t tile = sizes.steps.integer_tiles(); tile < sizes.steps.tiles(); ++tile) {
        _mm512_store_si512(prepared + sizes.slot(slot) + tile * kTileBytes, _mm512_setzero_si512());
      }
    }
  }

  static void prepare(const LinearTask& task, int64_t first_row, int64_t last_row,
                      uint8_t* prepared) {
    const Prepared sizes(task);
    const bool streamed = Products::is_streamed(task);
    const Arrangement arrangement(task.arranged, task.m);
    for (int64_t r = first_row; r < last_row; ++r) {
      const int64_t slot = streamed ? r : arrangement.place(r);
      uint8_t* const out = prepared + sizes.slot(slot);
      bool again = !streamed && arrangement.is_done_again(r);
      again |= task.weight_only ? prepare_floats(task, r, out)
                                : prepare_packed<Products::kScales>(task, sizes.steps, r, out);
      if (!streamed) prepare_bands(task, sizes, r, slot, arrangement.slots(r), prepared);
      prepared[sizes.done_again() + r] = again;
    }
  }

  // Scratch: the decoded weight, the factors of its columns, the sums, rows for AVX-512.
  struct Scratch {
    int64_t decoded, factors, sums, rows;

    explicit Scratch(const LinearTask& task) {
      LinearTask some = task;
      some.m = task.m < kRowsAgain ? task.m : kRowsAgain;
      rows = kLinearAvx512.prepared_bytes(some);
      if (Products::is_streamed(task)) {
        decoded = Products::kStreamedBytes;
        factors = 0;
        sums = sizeof(Sums);
      } else {
        const Steps steps = steps_of(task);
        const int64_t strips = Arrangement(task.arranged, task.m).strips();
        const int64_t pairs = Products::pairs(strips);
        decoded = pairs * kMaxTiles * 2 * kTileBytes;
        factors = pairs * kPairColumns * int64_t{sizeof(float)};
        sums = kept_sums(steps, std::min(strips, Products::kStrips), pairs) * int64_t{sizeof(Sums)};
      }
    }
  };

  static int64_t scratch_bytes(const LinearTask& task) {
    const Scratch scratch(task);
    return scratch.decoded + scratch.factors + scratch.sums + scratch.rows;
  }

  static void run(const LinearTask& task, const uint8_t* prepared, int64_t first_panel,
                  int64_t last_panel, void* scratch) {
    const Scratch parts(task);
    const Prepared sizes(task);
    uint8_t* const decoded = static_cast<uint8_t*>(scratch);
    uint8_t* const factors = decoded + parts.decoded;
    uint8_t* const sums = factors + parts.factors;
    for_each_range(task, first_panel, last_panel, false, [&](int64_t first, int64_t last) {
      const Context context{task,    PlacedLayout(task.layout, task.n), prepared,
                            decoded, reinterpret_cast<Sums*>(sums),     last};
      const typename Products::Guard guard;
      if (Products::is_streamed(task)) {
        Products::run_streamed(context, first);
      } else {
        run_blocked<Products>(
            {context, sizes.steps, Arrangement(task.arranged, task.m),
             reinterpret_cast<const float*>(prepared + sizes.factors()),
             reinterpret_cast<const int32_t*>(prepared + sizes.starts()),
             reinterpret_cast<float*>(factors), end_of_scaled(task, sizes.steps.integer_blocks())},
            first);
      }
    });

    // Rows with wide scales meet all panels, the others the wide ones.
    const uint8_t* const done_again = prepared + sizes.done_again();
    const auto all = [&](const auto& f) { f(first_panel, last_panel); };
    const auto wide = [&](const auto& f) {
      for_each_range(task, first_panel, last_panel, true, f);
    };
    bool has_wide = false;
    wide([&](int64_t, int64_t) { has_wide = true; });
    const auto run_rows = [&](bool again, const auto& panels) {
      RowsAgain rows(task, sums + parts.sums);
      for (int64_t r = 0; r < task.m; ++r) {
        if (static_cast<bool>(done_again[r]) == again) rows.add(r, panels);
      }
      rows.finish(panels);
    };
    run_rows(true, all);
    if (has_wide) run_rows(false, wide);
  }

  static constexpr LinearKernel kernel(const char* name) {
    return {name,    1 << 15, 1 << 21,        prepared_bytes, scratch_bytes,
            prepare, run,     arranged_bytes, arrange};
  }
};

}  // namespace
}  // namespace micromix::cpu::avx512
