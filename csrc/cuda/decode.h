// Packed rows to bfloat16, and the sums of their products to results. Nothing here knows torch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../dtype.h"

namespace micromix::cuda {

// Packed rows [rows, row bytes], aligned to 8 bytes, with their scales [rows, blocks]; and where
// they go: `values` bfloat16 [rows, channels], in the order of decode.cuh, each row over
// 2^exponent, that of its largest scale.
struct DecodedRows {
  const uint8_t* data;
  const uint8_t* scales;
  int64_t rows;
  void* values;
  int32_t* exponents;  // [rows]
  int64_t row_bytes;
  // The segments: they end at these blocks, and their elements begin at these bytes of a row.
  int32_t end4, end6, blocks;
  int32_t start6, start8;
  bool e3m2;  // what MXFP6 is
};
cudaError_t launch_decode(const DecodedRows& rows, cudaStream_t stream);

// The product of few decoded rows [m, channels] with the packed rows of a weight, `data` to
// `blocks` of `weight`, which are decoded on the way to the tensor cores; finished as below.
constexpr int kFewRows = 16;
struct FewRows {
  const void* x;
  const int32_t* row_exponents;
  int32_t m;
  DecodedRows weight;
  const void* bias;  // or null
  Dtype bias_dtype;
  void* out;  // [m, weight.rows]
  Dtype out_dtype;
};
cudaError_t launch_few_rows(const FewRows& task, cudaStream_t stream);

// out[m, n] = sums[m, n] * 2^(row exponent + column exponent) + bias[n], rounded once. Rows of
// `out` are `stride` numbers apart.
struct FinishedSums {
  const float* sums;  // [m, n]
  const int32_t *row_exponents, *column_exponents;
  int64_t m, n, stride;
  const void* bias;  // or null
  Dtype bias_dtype;
  void* out;
  Dtype out_dtype;
};
cudaError_t launch_finish(const FinishedSums& sums, cudaStream_t stream);

}  // namespace micromix::cuda
