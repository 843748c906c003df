// Decodes packed rows, and finishes sums. Both are bound by memory.
#include "decode.cuh"

namespace micromix::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32, kGroups = mx::kBlock / 8;

// A warp a row.
__global__ void __launch_bounds__(kThreads)
    find_largest_kernel(const PackedRows rows, uint8_t* largest) {
  const int64_t row = blockIdx.x * int64_t{kWarps} + threadIdx.x / 32;
  if (row >= rows.rows) return;
  const int found =
      largest_scale(rows.scales + row * rows.blocks, rows.blocks, threadIdx.x % 32, 32);
  if (threadIdx.x % 32 == 0) largest[row] = static_cast<uint8_t>(found);
}

// Of the thread block's row.
__device__ __forceinline__ int find_largest(const PackedRows& rows, const uint8_t* scales,
                                            uint8_t* largest) {
  if (rows.largest) return rows.largest[blockIdx.x];
  __shared__ int of_warps[kWarps];
  const int of_warp = largest_scale(scales, rows.blocks, threadIdx.x, kThreads);
  if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = of_warp;
  __syncthreads();
  const int found = __reduce_max_sync(kWarp, of_warps[threadIdx.x % kWarps]);
  if (threadIdx.x == 0) largest[blockIdx.x] = static_cast<uint8_t>(found);
  return found;
}

__global__ void __launch_bounds__(kThreads)
    decode_rows_kernel(const PackedRows rows, uint4* values, uint8_t* largest) {
  const int64_t row = blockIdx.x;
  const uint8_t* const scales = rows.scales + row * rows.blocks;
  const uint8_t* const data = rows.data + row * rows.row_bytes;
  const int most = find_largest(rows, scales, largest);
  const int groups = rows.blocks * kGroups;
  for (int g = threadIdx.x; g < groups; g += kThreads)
    values[row * groups + g] = decode_group(rows, data, g, __ldg(scales + g / kGroups), most);
}

// A thread has one group of the four blocks of a step: the four lanes' operands of two matrix
// instructions, which are pieces of 16 bytes. In a slice a piece lies where a swizzle of 128 bytes
// has it.
__global__ void __launch_bounds__(kThreads)
    decode_tiles_kernel(const PackedRows rows, const Tiles tiles, uint4* values, uint8_t* largest) {
  const int64_t row = blockIdx.x;
  const uint8_t* const scales = rows.scales + row * rows.blocks;
  const uint8_t* const data = rows.data + row * rows.row_bytes;
  const int most = find_largest(rows, scales, largest);
  const int steps4 = tiles.steps(0), steps6 = steps4 + tiles.steps(1);
  for (int at = threadIdx.x; at < kGroups * tiles.all_steps(); at += kThreads) {
    const int step = at / kGroups, g = at % kGroups;
    const int segment = step < steps4 ? 0 : step < steps6 ? 1 : 2;
    const int first = segment == 0   ? Tiles::kStepBlocks * step
                      : segment == 1 ? tiles.ends[0] + Tiles::kStepBlocks * (step - steps4)
                                     : tiles.ends[1] + Tiles::kStepBlocks * (step - steps6);
    Eight of_blocks[Tiles::kStepBlocks];
#pragma unroll
    for (int i = 0; i < Tiles::kStepBlocks; ++i) {
      const int block = first + i;
      of_blocks[i] = block < tiles.ends[segment] ? decode_group(rows, data, block * kGroups + g,
                                                                __ldg(scales + block), most)
                                                 : Eight{};
    }
    const auto& [a, b, c, d] = of_blocks;
    const uint4 pieces[4] = {
        {a.x, b.x, c.x, d.x}, {a.y, b.y, c.y, d.y}, {a.z, b.z, c.z, d.z}, {a.w, b.w, c.w, d.w}};
    constexpr int kPieces = Tiles::kSliceBytes / 16;
    uint4* const slice = values + ((2 * step + g / 2) * tiles.padded + row) * kPieces;
#pragma unroll
    for (int i = 0; i < 4; ++i) slice[(4 * (g % 2) + i) ^ (row % kPieces)] = pieces[i];
  }
}

__global__ void __launch_bounds__(kThreads)
    finish_sums_kernel(const float* sums, const Results results) {
  const int64_t first = blockIdx.x * int64_t{kThreads} + threadIdx.x;
  for (int64_t i = first; i < results.m * results.n; i += gridDim.x * int64_t{kThreads})
    finish(results, sums[i], i / results.n, i % results.n);
}

}  // namespace

cudaError_t launch_find_largest(const PackedRows& rows, uint8_t* largest, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>((rows.rows + kWarps - 1) / kWarps);
  find_largest_kernel<<<blocks, kThreads, 0, stream>>>(rows, largest);
  return cudaGetLastError();
}

cudaError_t launch_decode(const PackedRows& rows, void* values, uint8_t* largest,
                          cudaStream_t stream) {
  decode_rows_kernel<<<static_cast<unsigned>(rows.rows), kThreads, 0, stream>>>(
      rows, static_cast<uint4*>(values), largest);
  return cudaGetLastError();
}

cudaError_t launch_decode_tiles(const PackedRows& rows, const Tiles& tiles, void* values,
                                uint8_t* largest, cudaStream_t stream) {
  decode_tiles_kernel<<<static_cast<unsigned>(rows.rows), kThreads, 0, stream>>>(
      rows, tiles, static_cast<uint4*>(values), largest);
  return cudaGetLastError();
}

cudaError_t launch_finish(const float* sums, const Results& results, cudaStream_t stream) {
  const int64_t blocks = (results.m * results.n + kThreads - 1) / kThreads;
  constexpr int64_t kMost = 1 << 16;
  finish_sums_kernel<<<static_cast<unsigned>(blocks < kMost ? blocks : kMost), kThreads, 0,
                       stream>>>(sums, results);
  return cudaGetLastError();
}

}  // namespace micromix::cuda
