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
  bool order_aligned, aligned8;                 // to 16 bytes: the order, the 8-bit elements
};

constexpr int kMaxOutputs = 16;  // of one launch

// The arguments of a row kernel.
struct Rows {
  RowTask task;
  int32_t k, count;  // channels and rows
  int32_t outputs;
  Output output[kMaxOutputs];
};

// What a kernel is compiled for: one type of x, of the other operand and of the result, with rows
// that are aligned to 16 bytes and of whole groups; or anything, decided while it runs.
enum class Types { kBFloat16, kFloat16, kFloat32, kAny };

// Whether a value takes two bytes.
constexpr bool is_narrow(Types types) {
  return types == Types::kBFloat16 || types == Types::kFloat16;
}

// Where the result waits to be quantised: in registers, for one output without an order; in shared
// memory; or nowhere, where a row does not fit there: it is computed again for each output.
enum class Placement { kDirect, kStaged, kRecomputed };

// Shared memory holds channel c, of one or two rows, at slot kFirstSlot + c, a zero before channel
// 0, which is what the order's -1 reads, and a NaN behind the last one. Any other channel that is
// out of range reads the NaN: an order cannot be checked without waiting for the device, and must
// not be wrong in silence.
constexpr int kFirstSlot = 8;
constexpr int slot_bytes(Types types, int rows) { return is_narrow(types) ? 2 * rows : 4; }
constexpr int64_t staged_bytes(int64_t k, Types types, int rows) {
  return (kFirstSlot + (k / 16 + 1) * 16) * slot_bytes(types, rows);
}
constexpr int kOtherSharedBytes = 256;  // at most, that a row kernel uses beside the staged row

constexpr int max_threads(Placement placement) {
  return placement == Placement::kDirect ? 256 : 512;
}

// How a kernel is launched; `bytes` is of shared memory, `rows_each` of a thread block. One file
// for each function, because they take long to compile.
struct Launch {
  Types types;
  Placement placement;
  int rows_each, threads, bytes;
  cudaStream_t stream;
};
cudaError_t launch_rms_norm(const Rows& rows, const Launch& launch);
cudaError_t launch_layer_norm(const Rows& rows, const Launch& launch);
cudaError_t launch_pointwise(const Rows& rows, const Launch& launch);

}  // namespace micromix::cuda
