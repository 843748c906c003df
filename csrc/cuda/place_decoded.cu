// Places a weight whose products decode it.
#include "decode.cuh"
#include "early_launch.h"

namespace micromix::cuda {
namespace {

constexpr int kThreads = kChunkBlocks;

// A weight's NaN makes NaN of its row's every product, as a scale that is NaN does: a decoder needs
// to look for the latter only.
__device__ __forceinline__ bool has_nan(const uint32_t (&codes)[8]) {
  uint32_t found = 0;
#pragma unroll
  for (const uint32_t four : codes) found |= (four & 0x7F7F7F7F) + 0x01010101 & 0x80808080;
  return found != 0;
}

// A thread block a chunk, a thread a block of a row. The first ones of a panel find the largest
// scales.
__global__ void __launch_bounds__(kThreads)
    place_kernel(const PackedRows rows, const Steps steps, uint8_t* placed) {
  wait_for_the_kernel_before();
  const int step = blockIdx.x % steps.count();
  const int64_t panel = blockIdx.x / steps.count();
  const int lane = threadIdx.x % kLanes, of_two = threadIdx.x / kLanes;
  const int64_t row = kPanelRows * panel + lane / 4 + 8 * of_two;
  const auto [first, last] = steps.blocks_of(step);
  const int block = first + lane % 4, bits = steps.bits_of(step);
  uint32_t codes[8] = {}, scale = 0;
  if (row < rows.rows && block < last) {
    const int in_row = bits == 4   ? 16 * block
                       : bits == 6 ? rows.start6 + 24 * (block - rows.end4)
                                   : rows.start8 + 32 * (block - rows.end6);
    const uint8_t* const from = rows.data + row * rows.row_bytes + in_row;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (2 * i >= bits) continue;
      const uint2 two = __ldg(reinterpret_cast<const uint2*>(from) + i);
      codes[2 * i] = two.x, codes[2 * i + 1] = two.y;
    }
    scale = __ldg(rows.scales + row * rows.blocks + block);
    if (bits == 8 && has_nan(codes)) scale = mx::kNanScale;
  }
  uint32_t words[8] = {};
  if (bits == 4) {
    arrange<mx::E2M1>(codes, words);
  } else if (bits == 8) {
    arrange<mx::E4M3>(codes, words);
  } else if (rows.e3m2) {
    arrange<mx::E3M2>(codes, words);
  } else {
    arrange<mx::E2M3>(codes, words);
  }
  uint8_t* const chunk = placed + panel * steps.panel_bytes() + steps.chunk_start(step);
#pragma unroll
  for (int part = 0; part < 2; ++part) {
    uint8_t* const to = chunk + place_in_chunk(bits, lane, of_two, part);
    if (4 * part + 4 <= bits) {
      *reinterpret_cast<uint4*>(to) = {words[4 * part], words[4 * part + 1], words[4 * part + 2],
                                       words[4 * part + 3]};
    } else if (4 * part < bits) {
      *reinterpret_cast<uint2*>(to) = {words[4 * part], words[4 * part + 1]};
    }
  }
  chunk[place_of_scale(bits, lane, of_two)] = static_cast<uint8_t>(scale);
}

// A warp a row, of all panels' rows.
__global__ void __launch_bounds__(kThreads)
    find_largest_kernel(const PackedRows rows, int64_t all, uint8_t* largest) {
  wait_for_the_kernel_before();
  const int64_t row = blockIdx.x * int64_t{kThreads / 32} + threadIdx.x / 32;
  if (row >= all) return;
  const int blocks = row < rows.rows ? rows.blocks : 0;
  const int found = largest_scale(rows.scales + row * rows.blocks, blocks, threadIdx.x % 32, 32);
  if (threadIdx.x % 32 == 0) largest[row] = static_cast<uint8_t>(found);
}

}  // namespace

cudaError_t launch_place(const PackedRows& rows, const Steps& steps, uint8_t* placed,
                         const Launcher& on) {
  const int64_t panels = panels_of(rows.rows), all = panels * kPanelRows;
  if (const int64_t chunks = panels * steps.count(); chunks > 0) {
    const cudaError_t error = launch_early(place_kernel, static_cast<unsigned>(chunks), kThreads, 0,
                                           on.stream, on.early, rows, steps, placed);
    if (error != cudaSuccess) return error;
  }
  const auto blocks = static_cast<unsigned>((all * 32 + kThreads - 1) / kThreads);
  return launch_early(find_largest_kernel, blocks, kThreads, 0, on.stream, on.early, rows, all,
                      placed + panels * steps.panel_bytes());
}

}  // namespace micromix::cuda
