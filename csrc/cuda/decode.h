// Products on devices whose tensor cores know no block scales: packed rows to bfloat16, and sums to
// results. Nothing here knows torch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../dtype.h"

namespace micromix::cuda {

// Packed rows [rows, row bytes], aligned to 8 bytes, with their scales [rows, blocks]. They are
// decoded over 2^(largest - 127), `largest` being the largest scale byte of each row.
struct PackedRows {
  const uint8_t* data;
  const uint8_t* scales;
  const uint8_t* largest;  // [rows], or null where it is not known yet
  int64_t rows;
  int64_t row_bytes;
  // The segments: they end at these blocks, and their elements begin at these bytes of a row.
  int32_t end4, end6, blocks;
  int32_t start6, start8;
  bool e3m2;  // what MXFP6 is
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

// Finds the largest scale of each row.
cudaError_t launch_find_largest(const PackedRows& rows, uint8_t* largest, cudaStream_t stream);

// Decodes rows to bfloat16 [rows, channels], in the order of decode.cuh; `largest` is found too,
// unless it is known.
cudaError_t launch_decode(const PackedRows& rows, void* values, uint8_t* largest,
                          cudaStream_t stream);

// Brings float32 sums [m, n] to the results.
cudaError_t launch_finish(const float* sums, const Results& results, cudaStream_t stream);

// few_rows.cu: the product of few decoded rows with the packed rows of a weight.
constexpr int kFewRows = 16;
cudaError_t launch_few_rows(const void* x, const PackedRows& weight, const Results& results,
                            cudaStream_t stream);

// many_rows.cu: the product of any number of rows, on Hopper. The activations are decoded to
// tiles, for all weights whose blocks' formats are the same: slices of 64 channels, and of
// a slice all rows, `padded` of them.
struct Tiles {
  // The blocks at which the weight's segments end, and the slices before them.
  int32_t ends[3];
  int64_t padded;

  static constexpr int kSliceBytes = 128;  // of a row
  static constexpr int kStepBlocks = 4;    // what is multiplied in a step: two slices
  constexpr int steps(int segment) const {
    const int blocks = ends[segment] - (segment ? ends[segment - 1] : 0);
    return (blocks + kStepBlocks - 1) / kStepBlocks;
  }
  constexpr int all_steps() const { return steps(0) + steps(1) + steps(2); }
  constexpr int64_t bytes() const { return int64_t{2} * all_steps() * padded * kSliceBytes; }
};
bool has_many_rows();  // whether the current device runs it
int64_t padded_rows(int64_t m);
cudaError_t launch_decode_tiles(const PackedRows& rows, const Tiles& tiles, void* values,
                                uint8_t* largest, cudaStream_t stream);
cudaError_t launch_many_rows(const void* x, const Tiles& tiles, const PackedRows& weight,
                             const Results& results, int multiprocessors, cudaStream_t stream);

}  // namespace micromix::cuda
