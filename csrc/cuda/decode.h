// Products on devices whose tensor cores know no block scales: packed rows to bfloat16, and sums to
// results. Nothing here knows torch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <span>

#include "../dtype.h"
#include "decoded_weight.h"

namespace micromix::cuda {

// Packed rows [rows, row bytes], aligned to 8 bytes, with their scales [rows, blocks].
struct PackedRows {
  const uint8_t* data;
  const uint8_t* scales;
  int64_t rows;
  int64_t row_bytes;
  // The segments: they end at these blocks, and their elements begin at these bytes of a row.
  int32_t end4, end6, blocks;
  int32_t start6, start8;
  bool e3m2;  // what MXFP6 is
};
inline PackedRows packed_rows(const mx::MixedLayout& layout, const uint8_t* data,
                              const uint8_t* scales, int64_t rows) {
  const auto segments = layout.segments();
  return {.data = data,
          .scales = scales,
          .rows = rows,
          .row_bytes = layout.row_bytes(),
          .end4 = static_cast<int32_t>(segments[1].first_block),
          .end6 = static_cast<int32_t>(segments[2].first_block),
          .blocks = static_cast<int32_t>(layout.blocks()),
          .start6 = static_cast<int32_t>(segments[1].byte_start),
          .start8 = static_cast<int32_t>(segments[2].byte_start),
          .e3m2 = layout.format6() == mx::E3M2};
}

// Float rows [rows, k], of which the products take channel order[i] as their i-th of 32 * blocks,
// or, without an order, channel i; where there is none, zero. The segments' blocks that `rotated`
// has a bit for are rotated, and all are rounded to bfloat16.
struct FloatRows {
  const void* data;
  Dtype dtype;
  int64_t rows;
  int32_t k;
  const int32_t* order;  // aligned to 16 bytes, or null
  int32_t end4, end6, blocks;
  uint32_t rotated;
};

// A weight, or some of its panels, as decoded_weight.h has it.
struct PlacedRows {
  const uint8_t* panels;
  const uint8_t* largest;  // [rows]
  int64_t rows;
  Steps steps;
  bool e3m2;
};

// A product's results: out[m, n] = sum * 2^(largest of row + largest of column - 254) + bias[n],
// rounded once. Rows of `out` are `stride` numbers apart.
struct Results {
  const uint8_t *largest_of_rows, *largest_of_columns;
  int64_t m, n, stride;
  const void* bias;  // or null
  Dtype bias_dtype;
  void* out;
  Dtype out_dtype;
};

// Of one of the layers that share a launch: as many rows of as many channels.
struct LayerProduct {
  PlacedRows weight;
  Results results;
};
constexpr int kMostProducts = 3;

// Where a kernel is launched; `early`: before the one before it ends (early_launch.h).
constexpr int kMostDevices = 64;
struct Launcher {
  cudaStream_t stream;
  int device;
  bool early = false;
  bool warpgroups = false;  // whether the device runs many_rows.cu
  int multiprocessors = 1;
};

// place_decoded.cu
cudaError_t launch_place(const PackedRows& rows, const Steps& steps, uint8_t* placed,
                         const Launcher& on);

// decode.cu. Rows are decoded over 2^(largest - 127), `largest` [rows] being the largest scale byte
// of each: to bfloat16 [rows, channels], in the order of decode.cuh.
cudaError_t launch_decode(const PackedRows& rows, void* values, uint8_t* largest,
                          const Launcher& on);
cudaError_t launch_decode(const FloatRows& rows, void* values, uint8_t* largest,
                          const Launcher& on);  // float_rows.cu: each with the scale of one
cudaError_t launch_decode_weight(const PlacedRows& weight, void* values, const Launcher& on);
// Brings float32 sums [m, n] to the results.
cudaError_t launch_finish(const float* sums, const Results& results, const Launcher& on);

// few_rows.cu: the products of few decoded rows with one to kMostProducts weights that have rows.
constexpr int kFewRows = 16;
cudaError_t launch_few_rows(const void* x, std::span<const LayerProduct> layers,
                            const Launcher& on);

// many_rows.cu: the same of any number of rows, on Hopper. They are decoded to tiles: slices, half
// a step of the weight of all rows and those that pad them.
constexpr int kSliceBytes = 128;  // of a row
constexpr int64_t padded_rows(int64_t m) {
  constexpr int64_t kMostTokens = 256;  // of a tile
  return (m + kMostTokens - 1) / kMostTokens * kMostTokens;
}
inline int64_t tile_bytes(const Steps& steps, int64_t m) {
  return int64_t{2} * steps.count() * padded_rows(m) * kSliceBytes;
}
cudaError_t find_many_rows(bool& there);  // whether the current device runs it
cudaError_t launch_decode_tiles(const PackedRows& rows, const Steps& steps, void* tiles,
                                uint8_t* largest, const Launcher& on);
cudaError_t launch_decode_tiles(const FloatRows& rows, const Steps& steps, void* tiles,
                                uint8_t* largest, const Launcher& on);
cudaError_t launch_many_rows(const void* tiles, std::span<const LayerProduct> layers,
                             const Launcher& on);

}  // namespace micromix::cuda
