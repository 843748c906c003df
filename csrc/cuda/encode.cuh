// Eight elements to their codes, side by side as they lie in memory: 32, 48 or 64 bits.
//
// A format whose cast the hardware lacks is cast through a wider one with the same mantissa: scaled
// by the power of two that brings the smallest normal numbers of both together, the codes are those
// of the wider format, subnormals included, and there is one rounding.
#pragma once

#include <cuda_fp16.h>

#include "../mx/scales.h"

#if defined(__CUDA_ARCH_FEAT_SM100_ALL) || defined(__CUDA_ARCH_FEAT_SM103_ALL) || \
    defined(__CUDA_ARCH_FEAT_SM120_ALL) || defined(__CUDA_ARCH_FEAT_SM121_ALL)
#define MICROMIX_HAS_MX_CASTS 1
#else
#define MICROMIX_HAS_MX_CASTS 0
#endif
#define MICROMIX_HAS_FP8_CASTS (__CUDA_ARCH__ >= 890)

namespace micromix::cuda {

struct Eight {
  float v[8];
};

// 2^exponent, from -149.
__device__ __forceinline__ float power_of_two(int exponent) {
  return __uint_as_float(exponent < -126 ? 1u << (149 + exponent)
                                         : static_cast<uint32_t>(exponent + 127) << 23);
}

__device__ __forceinline__ Eight scaled(const Eight& x, float factor) {
  Eight y;
#pragma unroll
  for (int i = 0; i < 8; ++i) y.v[i] = x.v[i] * factor;
  return y;
}

// Saturation, for the few blocks that need it: only the floor and even rules leave values above the
// largest element.
__device__ __forceinline__ void clamp(Eight& x, float amax, float largest) {
  if (amax <= largest) return;
#pragma unroll
  for (int i = 0; i < 8; ++i) x.v[i] = fminf(fmaxf(x.v[i], -largest), largest);
}

// Four codes of 6 bits, one a byte, to 24 bits.
__device__ __forceinline__ uint32_t pack6(uint32_t bytes) {
  const uint32_t pairs = (bytes & 0x003F003F) | ((bytes >> 2) & 0x0FC00FC0);
  return (pairs & 0xFFF) | (pairs >> 4 & 0xFFF000);
}

__device__ __forceinline__ uint64_t join6(uint32_t low, uint32_t high) {
  return pack6(low) | static_cast<uint64_t>(pack6(high)) << 24;
}

// By integer arithmetic, where the hardware has no cast.
template <mx::ElementFormat kFormat>
__device__ __forceinline__ uint64_t encode_by_arithmetic(const Eight& x) {
  uint64_t codes = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i)
    codes |= static_cast<uint64_t>(mx::encode(x.v[i], kFormat)) << (kFormat.bits * i);
  return codes;
}

// Bytes of E2M3 or E3M2 codes, one each, from those of E4M3 or E5M2 with the same mantissa.
__device__ __forceinline__ uint32_t narrow_sign(uint32_t bytes) {
  return (bytes & 0x1F1F1F1F) | ((bytes >> 2) & 0x20202020);
}

#if MICROMIX_HAS_FP8_CASTS
__device__ __forceinline__ uint32_t e4m3x4(float a, float b, float c, float d) {
  uint16_t low, high;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(low) : "f"(b), "f"(a));
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(high) : "f"(d), "f"(c));
  return low | static_cast<uint32_t>(high) << 16;
}
__device__ __forceinline__ uint32_t e5m2x4(float a, float b, float c, float d) {
  uint16_t low, high;
  asm("cvt.rn.satfinite.e5m2x2.f32 %0, %1, %2;" : "=h"(low) : "f"(b), "f"(a));
  asm("cvt.rn.satfinite.e5m2x2.f32 %0, %1, %2;" : "=h"(high) : "f"(d), "f"(c));
  return low | static_cast<uint32_t>(high) << 16;
}
#endif

#if MICROMIX_HAS_MX_CASTS
__device__ __forceinline__ uint32_t e2m1x8(const Eight& x) {
  uint32_t codes;
  asm("{\n"
      ".reg .b8 a, b, c, d;\n"
      "cvt.rn.satfinite.e2m1x2.f32 a, %2, %1;\n"
      "cvt.rn.satfinite.e2m1x2.f32 b, %4, %3;\n"
      "cvt.rn.satfinite.e2m1x2.f32 c, %6, %5;\n"
      "cvt.rn.satfinite.e2m1x2.f32 d, %8, %7;\n"
      "mov.b32 %0, {a, b, c, d};\n"
      "}"
      : "=r"(codes)
      : "f"(x.v[0]), "f"(x.v[1]), "f"(x.v[2]), "f"(x.v[3]), "f"(x.v[4]), "f"(x.v[5]), "f"(x.v[6]),
        "f"(x.v[7]));
  return codes;
}
__device__ __forceinline__ uint32_t e2m3x4(float a, float b, float c, float d) {
  uint16_t low, high;
  asm("cvt.rn.satfinite.e2m3x2.f32 %0, %1, %2;" : "=h"(low) : "f"(b), "f"(a));
  asm("cvt.rn.satfinite.e2m3x2.f32 %0, %1, %2;" : "=h"(high) : "f"(d), "f"(c));
  return low | static_cast<uint32_t>(high) << 16;
}
__device__ __forceinline__ uint32_t e3m2x4(float a, float b, float c, float d) {
  uint16_t low, high;
  asm("cvt.rn.satfinite.e3m2x2.f32 %0, %1, %2;" : "=h"(low) : "f"(b), "f"(a));
  asm("cvt.rn.satfinite.e3m2x2.f32 %0, %1, %2;" : "=h"(high) : "f"(d), "f"(c));
  return low | static_cast<uint32_t>(high) << 16;
}
#endif

// E2M1 of values with at most 8 significant bits (bfloat16, and a power of two). Times 2^-14 they
// are float16 numbers whose bits, without the lowest nine, are the code; rounding those off to
// nearest even is integer arithmetic, two values at a time. Values that are too small for float16
// to hold exactly are below a quarter, so they become zero in either way.
__device__ __forceinline__ uint32_t encode_e2m1_of_bfloat16(const Eight& x, float factor) {
  const __half2 largest = __float2half2_rn(6.0f / 16384);
  uint32_t codes = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {  // elements i and i + 4: nibble i of either half
    const __half2 pair = __floats2half2_rn(x.v[i] * factor, x.v[i + 4] * factor);
    const uint32_t bits = *reinterpret_cast<const uint32_t*>(&pair);
    const __half2 magnitude = __hmin2(__habs2(pair), largest);
    uint32_t rounded = *reinterpret_cast<const uint32_t*>(&magnitude);
    rounded += 0x00FF00FF + ((rounded >> 9) & 0x00010001);
    const int up = 4 * i;
    codes |= (up < 9 ? rounded >> (9 - up) : rounded << (up - 9)) & (0x00070007u << up);
    codes |= (bits >> (12 - up)) & (0x00080008u << up);
  }
  return codes;
}

// The codes of `x`, a block's scale being `byte` (not NaN) and `amax` the largest magnitude of the
// block. `kBFloat16`: the values are bfloat16 numbers.
template <mx::ElementFormat kFormat, bool kBFloat16>
__device__ __forceinline__ uint64_t encode(const Eight& x, float amax, uint8_t byte) {
  const int exponent = 127 - byte;  // of the factor, from -126
#if MICROMIX_HAS_MX_CASTS
  const float factor = power_of_two(exponent);
  const Eight y = scaled(x, factor);
  const float* const v = y.v;
  if constexpr (kFormat == mx::E2M1) return e2m1x8(y);
  if constexpr (kFormat == mx::E2M3)
    return join6(e2m3x4(v[0], v[1], v[2], v[3]), e2m3x4(v[4], v[5], v[6], v[7]));
  if constexpr (kFormat == mx::E3M2)
    return join6(e3m2x4(v[0], v[1], v[2], v[3]), e3m2x4(v[4], v[5], v[6], v[7]));
  if constexpr (kFormat == mx::E4M3)
    return e4m3x4(v[0], v[1], v[2], v[3]) | static_cast<uint64_t>(e4m3x4(v[4], v[5], v[6], v[7]))
                                                << 32;
#else
  if constexpr (kFormat == mx::E2M1 && kBFloat16)
    return encode_e2m1_of_bfloat16(x, power_of_two(exponent - 14));
#if MICROMIX_HAS_FP8_CASTS
  if constexpr (kFormat == mx::E4M3) {
    const Eight y = scaled(x, power_of_two(exponent));
    const float* const v = y.v;
    return e4m3x4(v[0], v[1], v[2], v[3]) | static_cast<uint64_t>(e4m3x4(v[4], v[5], v[6], v[7]))
                                                << 32;
  }
  if constexpr (kFormat == mx::E2M3) {  // E4M3 begins 2^-6 lower
    const float factor = power_of_two(exponent - 6);
    Eight y = scaled(x, factor);
    clamp(y, amax * factor, 7.5f / 64);
    const float* const v = y.v;
    return join6(narrow_sign(e4m3x4(v[0], v[1], v[2], v[3])),
                 narrow_sign(e4m3x4(v[4], v[5], v[6], v[7])));
  }
  if constexpr (kFormat == mx::E3M2) {  // E5M2 begins 2^-12 lower
    const float factor = power_of_two(exponent - 12);
    Eight y = scaled(x, factor);
    clamp(y, amax * factor, 28.0f / 4096);
    const float* const v = y.v;
    return join6(narrow_sign(e5m2x4(v[0], v[1], v[2], v[3])),
                 narrow_sign(e5m2x4(v[4], v[5], v[6], v[7])));
  }
#endif
  return encode_by_arithmetic<kFormat>(scaled(x, power_of_two(exponent)));
#endif
}

}  // namespace micromix::cuda
