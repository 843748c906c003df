// Decodes packed rows, a thread block a row, and finishes sums. Both are bound by memory.
#include "decode.cuh"
#include "decode.h"

namespace micromix::cuda {
namespace {

constexpr int kThreads = 256, kGroup = 8;

__global__ void __launch_bounds__(kThreads) decode_rows_kernel(const DecodedRows rows) {
  __shared__ int largest_of_warps[kThreads / 32];
  const int64_t row = blockIdx.x;
  const uint8_t* const scales = rows.scales + row * rows.blocks;
  const uint8_t* const data = rows.data + row * rows.row_bytes;
  int largest = 0;
  for (int b = threadIdx.x; b < rows.blocks; b += kThreads)
    if (scales[b] != mx::kNanScale) largest = max(largest, static_cast<int>(scales[b]));
  largest = __reduce_max_sync(kWarp, largest);
  if (threadIdx.x % 32 == 0) largest_of_warps[threadIdx.x / 32] = largest;
  __syncthreads();
  largest = largest_of_warps[threadIdx.x % (kThreads / 32)];
  largest = __reduce_max_sync(kWarp, largest);
  if (threadIdx.x == 0) rows.exponents[row] = largest - mx::kFloat32Bias;

  const int groups = rows.blocks * (mx::kBlock / kGroup);
  uint4* const values = static_cast<uint4*>(rows.values) + row * groups;
  for (int g = threadIdx.x; g < groups; g += kThreads) {
    const int block = g / (mx::kBlock / kGroup);
    const int scale = scales[block];
    if (block < rows.end4) {
      values[g] = decode_e2m1(__ldg(reinterpret_cast<const uint32_t*>(data) + g),
                              factor_of_block<mx::E2M1>(scale, largest));
    } else if (block < rows.end6) {
      const int in_segment = g - rows.end4 * (mx::kBlock / kGroup);
      const auto* const halves =
          reinterpret_cast<const uint16_t*>(data + rows.start6) + 3 * in_segment;
      const uint32_t low = __ldg(halves) | static_cast<uint32_t>(__ldg(halves + 1)) << 16;
      const uint32_t upper = __funnelshift_r(low, __ldg(halves + 2), 24);
      values[g] =
          rows.e3m2 ? decode_mxfp6<mx::E3M2>(low, upper, factor_of_block<mx::E3M2>(scale, largest))
                    : decode_mxfp6<mx::E2M3>(low, upper, factor_of_block<mx::E2M3>(scale, largest));
    } else {
      const int in_segment = g - rows.end6 * (mx::kBlock / kGroup);
      const uint2 codes = __ldg(reinterpret_cast<const uint2*>(data + rows.start8) + in_segment);
      values[g] = decode_e4m3(codes.x, codes.y, factor_of_block<mx::E4M3>(scale, largest));
    }
  }
}

__global__ void __launch_bounds__(kThreads) finish_sums_kernel(const FinishedSums sums) {
  const int64_t first = blockIdx.x * int64_t{kThreads} + threadIdx.x;
  for (int64_t i = first; i < sums.m * sums.n; i += gridDim.x * int64_t{kThreads}) {
    const int64_t m = i / sums.n, n = i % sums.n;
    finish(sums.sums[i], sums.row_exponents[m] + sums.column_exponents[n], sums.bias,
           sums.bias_dtype, n, sums.out, sums.out_dtype, m * sums.stride + n);
  }
}

}  // namespace

cudaError_t launch_decode(const DecodedRows& rows, cudaStream_t stream) {
  decode_rows_kernel<<<static_cast<unsigned>(rows.rows), kThreads, 0, stream>>>(rows);
  return cudaGetLastError();
}

cudaError_t launch_finish(const FinishedSums& sums, cudaStream_t stream) {
  const int64_t blocks = (sums.m * sums.n + kThreads - 1) / kThreads;
  constexpr int64_t kMost = 1 << 16;
  finish_sums_kernel<<<static_cast<unsigned>(blocks < kMost ? blocks : kMost), kThreads, 0,
                       stream>>>(sums);
  return cudaGetLastError();
}

}  // namespace micromix::cuda
