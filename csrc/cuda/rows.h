// Rows on a GPU: what the kernels are given, and how they are launched. Nothing here knows torch.
#pragma once

#include <cuda_runtime_api.h>

#include "../rows.h"

namespace micromix::cuda {

// A RowOutput as the kernel wants it: the three segments end at these blocks, and their elements
// begin at these bytes of a row.
struct Output {
  const int32_t* order;
  uint8_t* data;
  uint8_t* scales;
  int64_t row_bytes;
  int32_t end4, end6, blocks;
  int32_t start6, start8;
  uint32_t increment4, increment6, increment8;  // mx::scale_increment of each
  bool e3m2;                                    // what MXFP6 is
  bool order_aligned;                           // to 16 bytes
};

constexpr int kMaxOutputs = 16;  // of one launch

// The arguments of a row kernel. Aligned: every row begins at a multiple of 16 bytes.
struct Rows {
  RowTask task;
  int32_t k;
  int32_t groups;  // of 8 channels, that one pass over a row covers
  bool x_aligned, second_aligned, weight_aligned, bias_aligned, sum_aligned, kept_aligned;
  bool ordered;  // some output has an order
  int32_t outputs;
  Output output[kMaxOutputs];
};

// What a kernel is compiled for: one type of x, of the other operand and of the result, or any mix
// of types, decided while it runs.
enum class Types { kBFloat16, kFloat16, kFloat32, kAny };

// Whether eight values of a type take 16 bytes.
constexpr bool is_narrow(Types types) {
  return types == Types::kBFloat16 || types == Types::kFloat16;
}

// Shared memory holds channel c at slot kFirstSlot + c, a zero before channel 0, which is what the
// order's -1 reads, and a NaN behind the last one. Any other channel that is out of range reads the
// NaN: an order cannot be checked without waiting for the device, and must not be wrong in silence.
constexpr int kFirstSlot = 8;

constexpr int64_t staged_bytes(int64_t k, Types types) {
  return (kFirstSlot + (k / 8 + 1) * 8) * (is_narrow(types) ? 2 : 4);
}

constexpr int kOtherSharedBytes = 256;  // at most, that a row kernel uses beside the staged row

// How a kernel is launched. `staged`: a row fits in shared memory; `bytes` is what it takes there.
// One file for each function, because they take long to compile.
struct Launch {
  unsigned rows, threads;
  int bytes;
  bool staged;
  Types types;
  cudaStream_t stream;
};
cudaError_t launch_rms_norm(const Rows& rows, const Launch& launch);
cudaError_t launch_layer_norm(const Rows& rows, const Launch& launch);
cudaError_t launch_pointwise(const Rows& rows, const Launch& launch);

}  // namespace micromix::cuda
