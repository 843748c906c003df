// A weight as the products that decode it have it placed (few_rows.cu, many_rows.cu, decode.cu).
//
// Panels are 16 rows, steps four blocks of a segment; what a panel has of a step is a chunk. Rows
// and blocks that are not there are zeros. In a matrix instruction of 16 rows a lane has two of
// them, eight apart, and shares them with three others: a chunk has a block of the first row for
// each lane, then one of the second. Where blocks are longer than 16 bytes, their first 16 come
// first, of all lanes. In a block codes lie as arranged_codes.h says. Behind the codes are each
// lane's two scales, and behind the panels the largest scale of each row.
#pragma once

#include "../mx/layout.h"

namespace micromix::cuda {

constexpr int kPanelRows = 16, kStepBlocks = 4, kChunkBlocks = kPanelRows * kStepBlocks;
constexpr int kLanes = 32;

// A chunk of a format with so many bits.
MX_HOST_DEVICE constexpr int chunk_code_bytes(int bits) { return kChunkBlocks * bits * 4; }
MX_HOST_DEVICE constexpr int chunk_bytes(int bits) { return chunk_code_bytes(bits) + kChunkBlocks; }

// In a chunk: bytes [16 * part, ...) of the block that a lane has of its first or second row, 16
// of them or, at the end of 24, 8.
MX_HOST_DEVICE constexpr int place_in_chunk(int bits, int lane, int row, int part) {
  const int size = bits == 6 && part == 1 ? 8 : 16;
  return kChunkBlocks * 16 * part + (row * kLanes + lane) * size;
}
MX_HOST_DEVICE constexpr int place_of_scale(int bits, int lane, int row) {
  return chunk_code_bytes(bits) + 2 * lane + row;
}

// The blocks of a step: the first, and where its segment ends.
struct StepBlocks {
  int first, last;
};

struct Steps {
  int32_t ends[3];       // of the segments, in blocks
  int32_t step_ends[3];  // and in steps

  Steps() = default;
  explicit Steps(const mx::MixedLayout& own) {
    const auto segments = own.segments();
    for (int i = 0, steps = 0; i < 3; ++i) {
      steps += static_cast<int>((segments[i].blocks + kStepBlocks - 1) / kStepBlocks);
      step_ends[i] = steps;
      ends[i] = static_cast<int32_t>(segments[i].first_block + segments[i].blocks);
    }
  }
  MX_HOST_DEVICE int count() const { return step_ends[2]; }
  MX_HOST_DEVICE int bits_of(int step) const {
    return step < step_ends[0] ? 4 : step < step_ends[1] ? 6 : 8;
  }
  MX_HOST_DEVICE StepBlocks blocks_of(int step) const {
    const int segment = (step >= step_ends[0]) + (step >= step_ends[1]);
    if (segment == 0) return {kStepBlocks * step, ends[0]};
    if (segment == 1) return {ends[0] + kStepBlocks * (step - step_ends[0]), ends[1]};
    return {ends[1] + kStepBlocks * (step - step_ends[1]), ends[2]};
  }
  // Where the chunk of a step begins in a panel; of the step after the last: a panel's bytes.
  MX_HOST_DEVICE int64_t chunk_start(int step) const {
    const auto before = [&](int end) { return int64_t{step < end ? step : end}; };
    const int64_t four = before(step_ends[0]), six = before(step_ends[1]) - four;
    return four * chunk_bytes(4) + six * chunk_bytes(6) + (step - four - six) * chunk_bytes(8);
  }
  MX_HOST_DEVICE int64_t panel_bytes() const { return chunk_start(count()); }
};

MX_HOST_DEVICE constexpr int64_t panels_of(int64_t n) { return (n + kPanelRows - 1) / kPanelRows; }

inline int64_t decoded_weight_bytes(const mx::MixedLayout& layout, int64_t n) {
  return panels_of(n) * (Steps(layout.weight()).panel_bytes() + kPanelRows);
}

}  // namespace micromix::cuda
