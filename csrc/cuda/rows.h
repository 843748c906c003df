// Rows on a GPU: what the kernels are given, and how they are launched. Nothing here knows torch.
#pragma once

#include <cuda_runtime_api.h>

#include "../rows.h"
#include "gathers.h"

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
  uint32_t increments4, increments6;            // their upper halves, in both halves
  uint32_t rotated;                             // a bit for each segment whose blocks are
  bool e3m2;                                    // what MXFP6 is
  bool order_aligned, aligned4, aligned8;       // to 16 bytes: the order, the 4- and 8-bit elements
};

// Bytes from a row to the next, and to that of a thread block's next turn.
struct Strides {
  uint32_t row;
  uint64_t turn;
  MX_HOST_DEVICE uint64_t before(int row_number) const {
    return uint64_t{static_cast<uint32_t>(row_number)} * row;
  }
};

// The arguments of a row kernel.
struct Rows {
  RowTask task;
  int32_t k, count;                 // channels and rows
  int32_t stages;                   // of the streamed kernel
  Strides x, second, data, scales;  // of the paired kernel
  float inverse_k;                  // 1 / k
  uint32_t fetched;  // of the direct kernel: rows that are fetched before the kernel before ends
  Output output;
};

// What a kernel is compiled for: one type of x, of the other operand and of the result, with rows
// that are aligned to 16 bytes and of whole groups; or anything, decided while it runs.
enum class Types { kBFloat16, kFloat16, kFloat32, kAny };

// Whether a value takes two bytes.
constexpr bool is_narrow(Types types) {
  return types == Types::kBFloat16 || types == Types::kFloat16;
}

// Where the result waits to be quantised: in registers, for an output without an order; in shared
// memory; or nowhere, where a row does not fit there: it is computed again as an order wants it. Or
// in thread blocks that stay for many rows: two short rows at a time, or longer ones, whose
// operands are streamed through shared memory.
enum class Placement { kDirect, kStaged, kRecomputed, kPaired, kStreamed };

// Shared memory holds channel c at slot kFirstSlot + c, a zero before channel
// 0, which is what the order's -1 reads, and a NaN behind the last one. Any other channel that is
// out of range reads the NaN: an order cannot be checked without waiting for the device, and must
// not be wrong in silence.
constexpr int kFirstSlot = 8;
constexpr int slot_bytes(Types types) { return is_narrow(types) ? 2 : 4; }
constexpr int64_t staged_bytes(int64_t k, Types types) {
  return (kFirstSlot + (k / 16 + 1) * 16) * slot_bytes(types);
}
// A norm's weight and bias, whether it has them or not.
constexpr int streamed_parameters(RowFunction function) {
  return function == RowFunction::kLayerNorm ? 2 : function == RowFunction::kRmsNorm ? 1 : 0;
}
// The streamed kernel's shared memory: barriers, a ring of stages, and the parameters. Every
// operand of a stage begins with 16 bytes, of them a zero, which is what the order's -1 reads, and
// a NaN for what is not there.
constexpr int kLeastStages = 3, kMostStages = 4, kStreamedBarriers = 128;
constexpr int kStreamedZero = 0, kStreamedNan = 2, kStreamedEnd = 16;
constexpr int64_t streamed_operand_bytes(int64_t k) { return kStreamedEnd + (k + 31) / 32 * 64; }
constexpr int64_t streamed_bytes(int64_t k, int operands, int stages, int threads,
                                 RowFunction function) {
  const int64_t ring = stages * operands * streamed_operand_bytes(k);
  const int64_t of_threads = 2 * threads * kStreamedGroup;
  const int parameters = streamed_parameters(function);
  return kStreamedBarriers + (parameters > 0      ? ring + parameters * of_threads
                              : ring > of_threads ? ring
                                                  : of_threads);
}

// The paired kernel's is of areas with two times eight channels for each thread: where two operands
// are streamed, two stages of each; a norm's weight and bias; and for an order the results, behind
// two zeros, which are what the order's -1 reads, and two NaNs for what is not there.
constexpr int kPairedArea = 4 * kPairedGroup;
constexpr int kPairedZero = 0, kPairedNan = 8, kPairedEnd = 32, kPairedStages = 2;
// Where registers and shared memory were counted: what stays the same from turn to turn stays in
// registers, and a LayerNorm's weight and bias wait in float32.
constexpr bool keeps(int architecture, Types types) {
  return architecture == 90 && types == Types::kBFloat16;
}
constexpr bool has_wide_vectors(int architecture, RowFunction function, Types types, bool two) {
  return keeps(architecture, types) && function == RowFunction::kLayerNorm && !two;
}
// Where registers were counted, and bulk copies are.
constexpr bool paired_streams(int architecture) { return architecture == 90; }
// A LayerNorm of a sum in an order has too many registers for sm_80.
constexpr bool is_paired(int architecture, RowFunction function, bool ordered, bool two) {
  return architecture >= 90 || function != RowFunction::kLayerNorm || !ordered || !two;
}
// 16 bytes are free after every 32 channels of results.
constexpr int paired_bytes(int threads, RowFunction function, Types types, bool ordered, bool two,
                           int architecture) {
  const int areas = (two && paired_streams(architecture) ? 2 * kPairedStages : 0) +
                    (function != RowFunction::kPointwise) +
                    has_wide_vectors(architecture, function, types, two) + ordered;
  const int free_bytes = ordered ? kPairedArea * threads / 8 : 0;
  return kPairedEnd + areas * kPairedArea * threads + free_bytes;
}

constexpr int kOtherSharedBytes = 2048;  // at most, that a row kernel uses beside the staged rows

constexpr int max_threads(Placement placement) {
  return placement == Placement::kDirect ? 256 : 512;
}

// How a kernel is launched; `bytes` is of shared memory, of at most `most_bytes`. One file
// for each function, because they take long to compile.
struct Launch {
  Types types;
  Placement placement;
  int blocks, threads, bytes, most_bytes;
  int parts = 1;  // of a row, where the direct kernel has few: its thread blocks are as many more
  int stages;     // of the streamed kernel
  cudaStream_t stream;
  bool early;  // before the kernel before it in the stream ends
};
cudaError_t architecture_of_rows(int& architecture);
cudaError_t launch_rms_norm(const Rows& rows, const Launch& launch);
cudaError_t launch_layer_norm(const Rows& rows, const Launch& launch);
cudaError_t launch_pointwise(const Rows& rows, const Launch& launch);

}  // namespace micromix::cuda
