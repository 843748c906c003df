// Barriers in shared memory, and bulk copies to it; sm_90 and later.
#pragma once

#include <cstdint>

namespace micromix::cuda {

__device__ __forceinline__ void make_barrier(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
// To the copies, by the thread that made them.
__device__ __forceinline__ void show_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
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
// The same, to a barrier of another thread block of the cluster.
__device__ __forceinline__ void arrive_in_cluster_as_warp(uint32_t barrier_there) {
  __syncwarp();
  if (threadIdx.x % 32 < kArrivalsOfWarp)
    asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(barrier_there) : "memory");
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
// To the same place in the shared memory of each thread block of the cluster in `ranks`, whose own
// barrier there is told.
__device__ __forceinline__ void copy_bulk_to_cluster(uint32_t to, const void* from, uint32_t bytes,
                                                     uint32_t barrier, uint16_t ranks) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1], %2, [%3], %4;" ::"r"(to),
      "l"(from), "r"(bytes), "r"(barrier), "h"(ranks)
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

}  // namespace micromix::cuda
