// The launch of the linear kernels, for the files that instantiate them.
#pragma once

#include "launch.h"
#include "linear_kernel.h"

namespace micromix::blackwell {

template <typename T, typename F>
__global__ void __launch_bounds__(T::kThreads)
    mx_linear(const __grid_constant__ LinearArguments arguments) {
  extern __shared__ __align__(128) uint8_t memory[];
  linear_block<T, F>(arguments, static_cast<uint32_t>(__cvta_generic_to_shared(memory)));
}

template <typename F>
cudaError_t launch_linear(TileId id, const LinearArguments& arguments, int column_tiles,
                          cudaStream_t stream) {
  return with_tile(id, [&](auto tile) {
    using T = decltype(tile);
    const auto kernel = mx_linear<T, F>;
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, T::kSharedBytes);
    if (error != cudaSuccess) return error;
    const dim3 grid(column_tiles, (arguments.m + T::kM - 1) / T::kM, arguments.splits);
    kernel<<<grid, T::kThreads, T::kSharedBytes, stream>>>(arguments);
    return cudaGetLastError();
  });
}

}  // namespace micromix::blackwell
