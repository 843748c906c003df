// What csrc/cuda's small kernels need of CUDA, for g++. Kernels run a thread after the other, so
// they must not wait for each other; a warp's reductions see one lane.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#define __host__
#define __device__
#define __global__ static
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static

using std::max;
using std::min;

using cudaStream_t = void*;
using cudaError_t = int;
constexpr int cudaSuccess = 0;

struct uint2 {
  uint32_t x, y;
};
struct uint4 {
  uint32_t x, y, z, w;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

template <typename T>
T __ldg(const T* from) {
  T x;
  std::memcpy(&x, from, sizeof x);
  return x;
}
inline uint32_t __funnelshift_r(uint32_t low, uint32_t high, uint32_t shift) {
  return static_cast<uint32_t>((uint64_t{high} << 32 | low) >> shift % 32);
}
inline int __reduce_max_sync(unsigned, int x) { return x; }
inline void __syncthreads() {}
