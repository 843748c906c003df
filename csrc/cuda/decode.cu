// Decodes packed rows, a thread block a row, and finishes sums. Both are bound by memory.
#include "decode.h"
#include "vectors.cuh"

namespace micromix::cuda {
namespace {

constexpr int kThreads = 256, kGroup = 8;

// 2^exponent, from -254: below the smallest number it is zero.
__device__ __forceinline__ float power_or_zero(int exponent) {
  return exponent < -149 ? 0.0f : power_of_two(exponent);
}

// Eight codes, `kBits` apart, under a factor.
template <mx::ElementFormat kFormat>
__device__ __forceinline__ uint4 decode_group(uint64_t codes, float factor) {
  float v[kGroup];
#pragma unroll
  for (int i = 0; i < kGroup; ++i) {
    const auto code = static_cast<uint8_t>(codes >> (kFormat.bits * i) & ((1 << kFormat.bits) - 1));
    v[i] = mx::decode(code, kFormat) * factor;
  }
  return {narrow_pair(v[0], v[1], true), narrow_pair(v[2], v[3], true),
          narrow_pair(v[4], v[5], true), narrow_pair(v[6], v[7], true)};
}

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
    const float factor =
        scale == mx::kNanScale ? mx::scale_value(mx::kNanScale) : power_or_zero(scale - largest);
    if (block < rows.end4) {
      values[g] = decode_group<mx::E2M1>(reinterpret_cast<const uint32_t*>(data)[g], factor);
    } else if (block < rows.end6) {
      const int in_segment = g - rows.end4 * (mx::kBlock / kGroup);
      const auto* const halves =
          reinterpret_cast<const uint16_t*>(data + rows.start6) + 3 * in_segment;
      const uint64_t codes = halves[0] | static_cast<uint64_t>(halves[1]) << 16 |
                             static_cast<uint64_t>(halves[2]) << 32;
      values[g] =
          rows.e3m2 ? decode_group<mx::E3M2>(codes, factor) : decode_group<mx::E2M3>(codes, factor);
    } else {
      const int in_segment = g - rows.end6 * (mx::kBlock / kGroup);
      const uint2 codes = reinterpret_cast<const uint2*>(data + rows.start8)[in_segment];
      values[g] = decode_group<mx::E4M3>(codes.x | static_cast<uint64_t>(codes.y) << 32, factor);
    }
  }
}

__global__ void __launch_bounds__(kThreads) finish_sums_kernel(const FinishedSums sums) {
  const int64_t first = blockIdx.x * int64_t{kThreads} + threadIdx.x;
  for (int64_t i = first; i < sums.m * sums.n; i += gridDim.x * int64_t{kThreads}) {
    const int64_t m = i / sums.n, n = i % sums.n;
    // Two powers, as one may be beyond the type.
    const int power = sums.row_exponents[m] + sums.column_exponents[n], half = power / 2;
    const float bias = sums.bias ? load_one(sums.bias, sums.bias_dtype, n) : 0.0f;
    const float y = fmaf(sums.sums[i] * power_of_two(half), power_of_two(power - half), bias);
    store_any<1>(sums.out, sums.out_dtype, m * sums.stride + n, 1, {y});
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
