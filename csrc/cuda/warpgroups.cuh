// Hopper's matrix instructions of a warpgroup, and clusters; sm_90a.
#pragma once

#include <cstdint>

namespace micromix::cuda {

// The registers of a warpgroup's threads from here on: fewer, which are free then, or more.
template <int kCount>
__device__ __forceinline__ void keep_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}
template <int kCount>
__device__ __forceinline__ void get_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}

// What the warpgroup's registers hold is there for its next matrix instructions.
__device__ __forceinline__ void before_matrix_instructions() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void commit_matrix_instructions() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// All groups but the last `kGroups` are done.
template <int kGroups>
__device__ __forceinline__ void wait_for_matrix_instructions() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kGroups) : "memory");
}

// Rows of 128 bytes in shared memory, swizzled by 128 bytes, from a multiple of 1024 on.
__device__ __forceinline__ uint64_t swizzled_rows(uint32_t address) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62, kEightRows = uint64_t{1024 / 16} << 32;
  return kSwizzle128 | kEightRows | uint64_t{1} << 16 | (address & 0x3FFFF) >> 4;
}

// sums [64, kColumns] += a [64, 16], in registers, times b [kColumns, 16], in bfloat16.
template <int kColumns>
__device__ __forceinline__ void multiply(float* d, const uint32_t (&a)[4], uint64_t b);

#define MICROMIX_D8(i)                                                                        \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define MICROMIX_A_AND_B "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b)

template <>
__device__ __forceinline__ void multiply<32>(float* d, const uint32_t (&a)[4], uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7, "
      "%8, %9, %10, %11, %12, %13, %14, %15}, {%16, %17, %18, %19}, %20, 1, 1, 1, 0;"
      : MICROMIX_D8(0), MICROMIX_D8(8)
      : MICROMIX_A_AND_B);
}
template <>
__device__ __forceinline__ void multiply<64>(float* d, const uint32_t (&a)[4], uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7, "
      "%8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, "
      "%24, %25, %26, %27, %28, %29, %30, %31}, {%32, %33, %34, %35}, %36, 1, 1, 1, 0;"
      : MICROMIX_D8(0), MICROMIX_D8(8), MICROMIX_D8(16), MICROMIX_D8(24)
      : MICROMIX_A_AND_B);
}
template <>
__device__ __forceinline__ void multiply<128>(float* d, const uint32_t (&a)[4], uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7, "
      "%8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, "
      "%24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, "
      "%40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, "
      "%56, %57, %58, %59, %60, %61, %62, %63}, {%64, %65, %66, %67}, %68, 1, 1, 1, 0;"
      : MICROMIX_D8(0), MICROMIX_D8(8), MICROMIX_D8(16), MICROMIX_D8(24), MICROMIX_D8(32),
        MICROMIX_D8(40), MICROMIX_D8(48), MICROMIX_D8(56)
      : MICROMIX_A_AND_B);
}
#undef MICROMIX_D8
#undef MICROMIX_A_AND_B

// Four matrices of 8 x 8 numbers of 16 bits, of which a lane has two neighbours of row lane / 4, as
// their transposes: lane 8 * i + j tells where matrix i has its column j, 16 bytes.
__device__ __forceinline__ void store_transposed(uint32_t to, const uint32_t (&pairs)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to),
               "r"(pairs[0]), "r"(pairs[1]), "r"(pairs[2]), "r"(pairs[3])
               : "memory");
}

// All threads of all thread blocks of the cluster have come here, and what they wrote to shared
// memory is there.
__device__ __forceinline__ void meet_cluster() {
  asm volatile(
      "barrier.cluster.arrive.release.aligned;\n"
      "barrier.cluster.wait.acquire.aligned;" ::
          : "memory");
}
// An address in the shared memory of a thread block of the cluster.
__device__ __forceinline__ uint32_t in_thread_block(uint32_t address, uint32_t rank) {
  uint32_t there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
  return there;
}
__device__ __forceinline__ float4 load_from_cluster(uint32_t address) {
  float4 x;
  asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
               : "r"(address)
               : "memory");
  return x;
}

}  // namespace micromix::cuda
