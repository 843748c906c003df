// Barriers and bulk copies in shared memory, which has 32-bit addresses of its own; sm_90 and
// later.
#pragma once

#include "vectors.cuh"

namespace micromix::cuda {

__device__ __forceinline__ void make_barrier(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
// What the warp did before is done, to those who wait for the barrier. One lane says so for all,
// after __syncwarp. compute-sanitizer's racecheck does not follow that: for it, built with
// MICROMIX_RACECHECK, each lane speaks for itself.
#if defined(MICROMIX_RACECHECK)
constexpr int kArrivalsOfWarp = 32;
#else
constexpr int kArrivalsOfWarp = 1;
#endif
__device__ __forceinline__ void arrive_as_warp(uint32_t barrier) {
  __syncwarp();
  if (threadIdx.x % 32 < kArrivalsOfWarp)
    asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// One thread: the barrier's phase ends when so many bytes have come.
__device__ __forceinline__ void expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void copy_bulk(uint32_t to, const void* from, uint32_t bytes,
                                          uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(to),
      "l"(from), "r"(bytes), "r"(barrier)
      : "memory");
}
// Of other bytes to where this thread wrote.
__device__ __forceinline__ void before_bulk_copies() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
__device__ __forceinline__ void wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again%=:\n"
      "mbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n"
      "@!done bra again%=;\n"
      "}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}
__device__ __forceinline__ Narrow<8> load_shared(uint32_t from) {
  Narrow<8> x;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.word[0]), "=r"(x.word[1]), "=r"(x.word[2]), "=r"(x.word[3])
               : "r"(from));
  return x;
}
// Zeros unless `there`.
__device__ __forceinline__ Narrow<8> load_shared_if(bool there, uint32_t from) {
  Narrow<8> x{};
  asm volatile(
      "{\n"
      ".reg .pred there;\n"
      "setp.ne.u32 there, %5, 0;\n"
      "@there ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];\n"
      "}"
      : "+r"(x.word[0]), "+r"(x.word[1]), "+r"(x.word[2]), "+r"(x.word[3])
      : "r"(from), "r"(static_cast<uint32_t>(there)));
  return x;
}
__device__ __forceinline__ uint32_t load_shared_half(uint32_t from) {
  uint16_t x;
  asm volatile("ld.shared.b16 %0, [%1];" : "=h"(x) : "r"(from));
  return x;
}

}  // namespace micromix::cuda
