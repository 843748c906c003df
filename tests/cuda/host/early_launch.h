// A launch on the host: all threads, one after the other.
#pragma once

#include "cuda_runtime_api.h"

namespace micromix::cuda {

template <typename... Parameters>
int launch_early(void (*kernel)(Parameters...), dim3 blocks, dim3 threads, size_t, cudaStream_t,
                 bool, const Parameters&... arguments) {
  gridDim = blocks, blockDim = threads;
  for (unsigned y = 0; y < blocks.y; ++y)
    for (unsigned x = 0; x < blocks.x; ++x)
      for (unsigned t = 0; t < threads.x; ++t) {
        blockIdx = dim3(x, y), threadIdx = dim3(t);
        kernel(arguments...);
      }
  return cudaSuccess;
}

}  // namespace micromix::cuda
