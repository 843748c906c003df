// Where the kernels of many rows gather the channels of an order from. A thread gathers
// neighbouring channels of the layout, the i-th of all threads of a warp at once, and waits for the
// bank of shared memory that has most of them: micromix_compile/banks.py lets the channels of a
// block stand so that it has few, and is tested against this. Nothing here knows CUDA.
#pragma once

#include <cstdint>

#include "../mx/elements.h"

namespace micromix::cuda {

// Channels of a thread, and the most threads: longer rows than the paired kernel's are streamed.
constexpr int kPairedGroup = 8, kPairedThreads = 512;
constexpr int kStreamedGroup = 32, kStreamedThreads = 512;

// The bytes before a channel. Of two rows a channel's values lie side by side, and 16 bytes are
// free after every 32 channels, so that eight neighbouring threads store to all banks at once.
MX_HOST_DEVICE constexpr uint32_t paired_place(uint32_t channel) {
  return 4 * channel + 16 * (channel / 32);
}
MX_HOST_DEVICE constexpr uint32_t streamed_place(uint32_t channel) { return 2 * channel; }

}  // namespace micromix::cuda
