// The machine that the kernel is written for: threads, barriers, shared memory by 32-bit address,
// asynchronous copies. Here as a CUDA device has them; simulator/machine.h has them for the host.
#pragma once

#if defined(MICROMIX_SIMULATOR)
#include "simulator/machine.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#define MICROMIX_DEVICE static __device__ __forceinline__

namespace micromix::blackwell {

MICROMIX_DEVICE int thread_index() { return threadIdx.x; }
MICROMIX_DEVICE int block_x() { return blockIdx.x; }
MICROMIX_DEVICE int block_y() { return blockIdx.y; }
MICROMIX_DEVICE int block_z() { return blockIdx.z; }
MICROMIX_DEVICE void barrier() { __syncthreads(); }

MICROMIX_DEVICE uint32_t load_shared(uint32_t address) {
  uint32_t value;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(value) : "r"(address));
  return value;
}
MICROMIX_DEVICE uint32_t load_shared_byte(uint32_t address) {
  uint32_t value;
  asm volatile("ld.shared.u8 %0, [%1];" : "=r"(value) : "r"(address));
  return value;
}
MICROMIX_DEVICE void store_shared(uint32_t address, uint32_t value) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(value) : "memory");
}

// Copies kBytes to shared memory; the source has `valid` of them, the rest is zero.
template <int kBytes>
MICROMIX_DEVICE void copy_async(uint32_t to, const uint8_t* from, int valid) {
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(valid)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(from), "n"(kBytes),
                 "r"(valid)
                 : "memory");
  }
}
MICROMIX_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most kPending of this thread's groups are under way.
template <int kPending>
MICROMIX_DEVICE void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

MICROMIX_DEVICE uint32_t funnel_shift(uint32_t low, uint32_t high, int bits) {
  return __funnelshift_r(low, high, bits);
}
MICROMIX_DEVICE float as_float(uint32_t bits) { return __uint_as_float(bits); }
MICROMIX_DEVICE uint32_t as_bits(float value) { return __float_as_uint(value); }
MICROMIX_DEVICE uint16_t to_bfloat16(float value) {
  return __bfloat16_as_ushort(__float2bfloat16_rn(value));
}
MICROMIX_DEVICE uint16_t to_float16(float value) {
  return __half_as_ushort(__float2half_rn(value));
}
MICROMIX_DEVICE float from_float16(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }

struct alignas(16) Vector {
  uint32_t words[4];
};

}  // namespace micromix::blackwell

#endif
