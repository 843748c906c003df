// The CUDA side of a torch tensor: its device, its stream, and errors of the runtime.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <array>

#include "../error.h"

namespace micromix::cuda {

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) [[likely]]
    return;
  cudaGetLastError();  // or the runtime says it again of a later launch
  fail("micromix::", what, ": CUDA says: ", cudaGetErrorString(error));
}

// Calls an operator with the arguments on the stack, where its results are then.
template <size_t kCount>
void call(const char* op, std::array<StableIValue, kCount>& stack) {
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(op, "", stack.data(), TORCH_ABI_VERSION));
}

// Makes the device of `t` the current one; `stream` is torch's current stream there.
struct OnDevice {
  explicit OnDevice(const torch::stable::Tensor& t)
      : index(t.get_device_index()), guard(index), stream(nullptr) {
    void* current;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index, &current));
    stream = static_cast<cudaStream_t>(current);
  }

  int index;
  torch::stable::accelerator::DeviceGuard guard;
  cudaStream_t stream;
};

}  // namespace micromix::cuda
