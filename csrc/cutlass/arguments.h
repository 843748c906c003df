// What the linear kernel is given.
#pragma once

#include "../dtype.h"
#include "placed.h"

namespace micromix::blackwell {

inline constexpr int kMaxWeights = 8;  // in one launch
inline constexpr int kMaxSplits = 32;

// One segment of the rows of both operands.
struct SegmentArguments {
  int blocks;           // of 32 channels
  int first_block;      // in the row
  int64_t a;            // where its elements start in a row of activations
  int64_t b, b_scales;  // and in a panel of the weight
};

struct WeightArguments {
  const uint8_t* placed;
  const void* bias;  // [n], or null
  void* out;         // [m, n]
  Dtype bias_dtype;
  int n;
  int first_tile;    // of the grid's columns
  int first_column;  // in a row of partial sums, where every weight has a multiple of 8
};

struct LinearArguments {
  const uint8_t *data, *scales;  // [m, row_bytes], [m, row_blocks]
  int64_t row_bytes, row_blocks;
  int64_t panel_bytes;
  int m;
  bool aligned16;  // every row of every segment starts at a multiple of 16 bytes, not only of 8
  SegmentArguments segments[3];
  int weight_count;
  WeightArguments weights[kMaxWeights];
  Dtype out_dtype;
  // K is cut in `splits` ranges of stages; with more than one, their sums go to
  // partial[splits, m, columns] and are added up by add_partial_sums.
  int splits;
  float* partial;
  int64_t columns;
};

// Arguments of the layout; the rest is zero.
inline LinearArguments arguments_of(const mx::MixedLayout& layout) {
  const PlacedWeight placed(layout);
  LinearArguments arguments{};
  arguments.row_bytes = layout.row_bytes();
  arguments.row_blocks = layout.blocks();
  arguments.panel_bytes = placed.panel_bytes;
  // A block takes 16, 24 or 32 bytes, so only an odd number of MXFP6 blocks disturbs.
  arguments.aligned16 = layout.k6 % (2 * mx::kBlock) == 0;
  const auto segments = layout.segments();
  for (int s = 0; s < 3; ++s) {
    const PlacedSegment& own = placed.segments[s];
    arguments.segments[s] = {static_cast<int>(own.blocks), static_cast<int>(own.first_block),
                             segments[s].byte_start, own.data, own.scales};
  }
  return arguments;
}

// Stages that K takes.
constexpr int stages_of(const LinearArguments& arguments, int blocks4, int blocks8) {
  int stages = 0;
  for (int s = 0; s < 3; ++s) {
    const int in_stage = s == 0 ? blocks4 : blocks8;
    stages += (arguments.segments[s].blocks + in_stage - 1) / in_stage;
  }
  return stages;
}

}  // namespace micromix::blackwell
