// Decodes packed rows, and finishes sums. Both are bound by memory.
#include "decode.cuh"
#include "early_launch.h"

namespace micromix::cuda {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / 32;

// The largest scale of the row that some thread blocks share, which all of their threads find.
__device__ __forceinline__ int find_largest(const PackedRows& rows, uint8_t* largest) {
  __shared__ int of_warps[kWarps];
  const int64_t row = blockIdx.x;
  const int of_warp =
      largest_scale(rows.scales + row * rows.blocks, rows.blocks, threadIdx.x, kThreads);
  if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = of_warp;
  __syncthreads();
  const int found = __reduce_max_sync(kWarp, of_warps[threadIdx.x % kWarps]);
  if (threadIdx.x == 0 && blockIdx.y == 0) largest[row] = static_cast<uint8_t>(found);
  return found;
}

// What a thread decodes is on its way while they look for the largest scale. The product that reads
// it may start only when the kernel before has left the device: beside that one its thread blocks
// would lie unevenly on the multiprocessors.
__global__ void __launch_bounds__(kThreads)
    decode_rows_kernel(const PackedRows rows, uint4* values, uint8_t* largest) {
  wait_for_the_kernel_before();
  let_the_next_kernel_start();
  const int groups = rows.blocks * kGroups, at = blockIdx.y * kThreads + threadIdx.x;
  const int block = at / kGroups;
  PackedGroup group;
  if (at < groups) group = load_group(rows, blockIdx.x, block, at % kGroups);
  const int most = find_largest(rows, largest);
  if (at < groups)
    values[int64_t{blockIdx.x} * groups + at] = decode_group(rows, group, block, most);
}

// Thread blocks share out a row. A thread has one group of the four blocks of a step.
__global__ void __launch_bounds__(kThreads)
    decode_tiles_kernel(const PackedRows rows, const Steps steps, int64_t padded, uint4* tiles,
                        uint8_t* largest) {
  wait_for_the_kernel_before();
  let_the_next_kernel_start();
  const int64_t row = blockIdx.x;
  const int at = blockIdx.y * kThreads + threadIdx.x;
  const int step = at / kGroups, g = at % kGroups;
  const bool there = step < steps.count();
  const auto [first, last] = steps.blocks_of(step);
  PackedGroup groups[kStepBlocks];
#pragma unroll
  for (int i = 0; i < kStepBlocks; ++i)
    if (there && first + i < last) groups[i] = load_group(rows, row, first + i, g);
  const int most = find_largest(rows, largest);
  if (!there) return;
  Eight of_blocks[kStepBlocks];
#pragma unroll
  for (int i = 0; i < kStepBlocks; ++i)
    of_blocks[i] = decode_group(rows, groups[i], min(first + i, last - 1), most);
  store_tile_group(tiles, padded, row, step, g, of_blocks);
}

// A warp a chunk.
template <mx::ElementFormat kFormat>
__device__ __forceinline__ void decode_chunk(const PlacedRows& weight, int64_t panel, int step,
                                             uint4* values) {
  const int lane = threadIdx.x % 32;
  const ChunkInMemory chunk{weight.panels + panel * weight.steps.panel_bytes() +
                            weight.steps.chunk_start(step)};
  const auto [first, last] = weight.steps.blocks_of(step);
  const int block = first + lane % 4;
  const uint32_t scales = chunk.scales<kFormat>(lane);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int64_t row = kPanelRows * panel + lane / 4 + 8 * i;
    if (row >= weight.rows || block >= last) continue;
    const BlockCodes<kFormat> codes(lane, i, chunk);
    const uint32_t factor =
        factor_of_block<kFormat>(scales >> (8 * i) & 0xFF, __ldg(weight.largest + row));
    uint4* const to = values + (row * weight.steps.ends[2] + block) * kGroups;
#pragma unroll
    for (int g = 0; g < kGroups; ++g) to[g] = codes.decode(g, factor);
  }
}

__global__ void __launch_bounds__(kThreads)
    decode_weight_kernel(const PlacedRows weight, uint4* values) {
  let_the_next_kernel_start();
  wait_for_the_kernel_before();
  const int64_t chunk = blockIdx.x * int64_t{kWarps} + threadIdx.x / 32;
  const int64_t panel = chunk / weight.steps.count();
  const int step = static_cast<int>(chunk % weight.steps.count());
  if (panel >= panels_of(weight.rows)) return;
  switch (weight.steps.bits_of(step)) {
    case 4:
      return decode_chunk<mx::E2M1>(weight, panel, step, values);
    case 6:
      return weight.e3m2 ? decode_chunk<mx::E3M2>(weight, panel, step, values)
                         : decode_chunk<mx::E2M3>(weight, panel, step, values);
    default:
      return decode_chunk<mx::E4M3>(weight, panel, step, values);
  }
}

__global__ void __launch_bounds__(kThreads)
    finish_sums_kernel(const float* sums, const Results results) {
  wait_for_the_kernel_before();
  const int64_t first = blockIdx.x * int64_t{kThreads} + threadIdx.x;
  for (int64_t i = first; i < results.m * results.n; i += gridDim.x * int64_t{kThreads}) {
    const int64_t m = i / results.n, n = i % results.n;
    store_finished(results, sums[i], load_finish(results, m, n), m, n);
  }
}

// Thread blocks that share out a row, one at least: it finds the largest scale.
dim3 grid_of(const PackedRows& rows, int groups) {
  return {static_cast<unsigned>(rows.rows),
          static_cast<unsigned>(groups > 0 ? (groups + kThreads - 1) / kThreads : 1)};
}

}  // namespace

cudaError_t launch_decode(const PackedRows& rows, void* values, uint8_t* largest,
                          const Launcher& on) {
  return launch_early(decode_rows_kernel, grid_of(rows, rows.blocks * kGroups), kThreads, 0,
                      on.stream, on.early, rows, static_cast<uint4*>(values), largest);
}

cudaError_t launch_decode_tiles(const PackedRows& rows, const Steps& steps, void* tiles,
                                uint8_t* largest, const Launcher& on) {
  return launch_early(decode_tiles_kernel, grid_of(rows, steps.count() * kGroups), kThreads, 0,
                      on.stream, on.early, rows, steps, padded_rows(rows.rows),
                      static_cast<uint4*>(tiles), largest);
}

cudaError_t launch_decode_weight(const PlacedRows& weight, void* values, const Launcher& on) {
  const int64_t chunks = panels_of(weight.rows) * weight.steps.count();
  if (chunks == 0) return cudaSuccess;
  return launch_early(decode_weight_kernel, static_cast<unsigned>((chunks + kWarps - 1) / kWarps),
                      kThreads, 0, on.stream, on.early, weight, static_cast<uint4*>(values));
}

cudaError_t launch_finish(const float* sums, const Results& results, const Launcher& on) {
  const int64_t blocks = (results.m * results.n + kThreads - 1) / kThreads;
  constexpr int64_t kMost = 1 << 16;
  return launch_early(finish_sums_kernel, static_cast<unsigned>(blocks < kMost ? blocks : kMost),
                      kThreads, 0, on.stream, on.early, sums, results);
}

}  // namespace micromix::cuda
