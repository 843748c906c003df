// Launches a kernel that may start before the one before it in the stream ends
// (wait_for_the_kernel_before), on sm_90 and later.
#pragma once

#include <cuda_runtime_api.h>

namespace micromix::cuda {

constexpr int kMostAttributes = 2;

// `cluster`: its thread blocks. The attributes are to live as long as the result.
inline cudaLaunchConfig_t early_config(dim3 blocks, dim3 threads, size_t bytes, cudaStream_t stream,
                                       bool early, dim3 cluster,
                                       cudaLaunchAttribute (&attributes)[kMostAttributes]) {
  unsigned count = 0;
  if (early) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count++].val.programmaticStreamSerializationAllowed = 1;
  }
  if (cluster.x * cluster.y * cluster.z > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count++].val.clusterDim = {cluster.x, cluster.y, cluster.z};
  }
  cudaLaunchConfig_t config{};
  config.gridDim = blocks;
  config.blockDim = threads;
  config.dynamicSmemBytes = bytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = count;
  return config;
}

template <typename... Parameters>
cudaError_t launch_early(void (*kernel)(Parameters...), dim3 blocks, dim3 threads, size_t bytes,
                         cudaStream_t stream, bool early, const Parameters&... arguments) {
  cudaLaunchAttribute attributes[kMostAttributes];
  const cudaLaunchConfig_t config =
      early_config(blocks, threads, bytes, stream, early, dim3(1), attributes);
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

}  // namespace micromix::cuda
