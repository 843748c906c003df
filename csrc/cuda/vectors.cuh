// Eight neighbouring channels of a row, from and to memory in any of the three types.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "encode.cuh"
#include "rows.h"

namespace micromix::cuda {

// The type of a tensor: known to the compiler, or decided as the kernel runs.
template <Types kTypes>
__device__ __forceinline__ Dtype type_of(Dtype dtype) {
  return kTypes == Types::kBFloat16  ? Dtype::kBFloat16
         : kTypes == Types::kFloat16 ? Dtype::kFloat16
         : kTypes == Types::kFloat32 ? Dtype::kFloat32
                                     : dtype;
}

__device__ __forceinline__ float widen(uint16_t bits, bool bfloat16) {
  return bfloat16 ? __uint_as_float(static_cast<uint32_t>(bits) << 16)
                  : __half2float(__ushort_as_half(bits));
}

__device__ __forceinline__ Eight unpack(uint4 raw, bool bfloat16) {
  const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
  Eight x;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (bfloat16) {
      x.v[2 * i] = __uint_as_float(words[i] << 16);
      x.v[2 * i + 1] = __uint_as_float(words[i] & 0xFFFF0000u);
    } else {
      const float2 pair = __half22float2(*reinterpret_cast<const __half2*>(&words[i]));
      x.v[2 * i] = pair.x;
      x.v[2 * i + 1] = pair.y;
    }
  }
  return x;
}

// Rounds to nearest even.
__device__ __forceinline__ uint4 pack(const Eight& x, bool bfloat16) {
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (bfloat16) {
      const __nv_bfloat162 pair = __floats2bfloat162_rn(x.v[2 * i], x.v[2 * i + 1]);
      words[i] = *reinterpret_cast<const uint32_t*>(&pair);
    } else {
      const __half2 pair = __floats2half2_rn(x.v[2 * i], x.v[2 * i + 1]);
      words[i] = *reinterpret_cast<const uint32_t*>(&pair);
    }
  }
  return {words[0], words[1], words[2], words[3]};
}

// Rounds to the values of a type.
__device__ __forceinline__ Eight rounded(const Eight& x, Dtype dtype) {
  if (dtype == Dtype::kFloat32) return x;
  const bool bfloat16 = dtype == Dtype::kBFloat16;
  return unpack(pack(x, bfloat16), bfloat16);
}

// One value, or 0 where there is no such channel.
__device__ __forceinline__ float load_one(const void* data, Dtype dtype, int64_t i) {
  if (dtype == Dtype::kFloat32) return __ldg(static_cast<const float*>(data) + i);
  return widen(__ldg(static_cast<const uint16_t*>(data) + i), dtype == Dtype::kBFloat16);
}

// Eight values as they are loaded: 16 bytes where the type is narrow, so that loads can wait in few
// registers.
template <Types kTypes>
struct Raw {
  Eight x;
  __device__ __forceinline__ Eight values() const { return x; }
};
template <Types kTypes>
  requires(is_narrow(kTypes))
struct Raw<kTypes> {
  uint4 bits;
  __device__ __forceinline__ Eight values() const {
    return unpack(bits, kTypes == Types::kBFloat16);
  }
};

// The channels from `first` on of a row that begins at `start`; those from `k` on are 0. Memory
// that a kernel writes too must not be read with this: `__ldg` may give what was there before.
template <Types kTypes>
__device__ __forceinline__ Raw<kTypes> load_eight(const void* data, Dtype dtype, int64_t start,
                                                  int first, int k, bool aligned) {
  Raw<kTypes> raw{};
  dtype = type_of<kTypes>(dtype);
  const int64_t i = start + first;
  if (aligned && first + 8 <= k) {
    if constexpr (is_narrow(kTypes)) {
      raw.bits = __ldg(reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(data) + i));
    } else if (dtype == Dtype::kFloat32) {
      const auto* const from = reinterpret_cast<const float4*>(static_cast<const float*>(data) + i);
      const float4 low = __ldg(from), high = __ldg(from + 1);
      raw.x = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
    } else {
      raw.x = unpack(__ldg(reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(data) + i)),
                     dtype == Dtype::kBFloat16);
    }
    return raw;
  }
  if constexpr (is_narrow(kTypes)) {
    uint32_t words[4] = {};
#pragma unroll
    for (int j = 0; j < 8; ++j)
      if (first + j < k)
        words[j / 2] |= static_cast<uint32_t>(__ldg(static_cast<const uint16_t*>(data) + i + j))
                        << (16 * (j % 2));
    raw.bits = {words[0], words[1], words[2], words[3]};
  } else {
#pragma unroll
    for (int j = 0; j < 8; ++j) raw.x.v[j] = first + j < k ? load_one(data, dtype, i + j) : 0.0f;
  }
  return raw;
}

__device__ __forceinline__ Eight load_vector(const RowInput& vector, int first, int k,
                                             bool aligned) {
  return load_eight<Types::kAny>(vector.data, vector.dtype, 0, first, k, aligned).values();
}

// Stores values, rounded to the type, at channels that the row has.
__device__ __forceinline__ void store_eight(void* data, Dtype dtype, int64_t start, int first,
                                            int k, bool aligned, const Eight& x) {
  const int64_t i = start + first;
  const bool whole = aligned && first + 8 <= k;
  if (dtype == Dtype::kFloat32) {
    auto* const to = static_cast<float*>(data) + i;
    if (whole) {
      reinterpret_cast<float4*>(to)[0] = {x.v[0], x.v[1], x.v[2], x.v[3]};
      reinterpret_cast<float4*>(to)[1] = {x.v[4], x.v[5], x.v[6], x.v[7]};
    } else {
#pragma unroll
      for (int j = 0; j < 8; ++j)
        if (first + j < k) to[j] = x.v[j];
    }
    return;
  }
  auto* const to = static_cast<uint16_t*>(data) + i;
  const uint4 bits = pack(x, dtype == Dtype::kBFloat16);
  if (whole) {
    *reinterpret_cast<uint4*>(to) = bits;
    return;
  }
  const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
  for (int j = 0; j < 8; ++j)
    if (first + j < k) to[j] = static_cast<uint16_t>(words[j / 2] >> (16 * (j % 2)));
}

}  // namespace micromix::cuda
