// Devices for which this library was not built.
#pragma once

#include <cuda_runtime_api.h>

namespace micromix::cuda {

// Whether an error of the runtime says that the current device runs none of a kernel's code, which
// is no failure; the runtime forgets it then. Others are: out of memory, or code for a later
// driver.
inline bool has_no_code(cudaError_t error) {
  if (error != cudaErrorNoKernelImageForDevice && error != cudaErrorInvalidDeviceFunction)
    return false;
  cudaGetLastError();
  return true;
}

}  // namespace micromix::cuda
