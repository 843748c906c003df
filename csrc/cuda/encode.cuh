// Eight elements to their codes, side by side as they lie in memory.
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

// `kCount` neighbouring channels.
template <int kCount>
struct Values {
  float v[kCount];
};

// The codes of eight channels: 32, 48 or 64 bits.
struct Codes {
  uint32_t low, high;
};

// 2^exponent, from -149.
__device__ __forceinline__ float power_of_two(int exponent) {
  return __uint_as_float(exponent < -126 ? 1u << (149 + exponent)
                                         : static_cast<uint32_t>(exponent + 127) << 23);
}

// Eight values of a block, scaled; `amax` is the largest magnitude of the block, scaled too.
struct Scaled {
  float v[8];
  float amax;

  __device__ __forceinline__ Scaled(const float* x, float amax, float factor)
      : amax(amax * factor) {
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = x[i] * factor;
  }
  // Saturation, for the few blocks that need it: only the floor and even rules leave values above
  // the largest element.
  __device__ __forceinline__ void clamp(float beyond, float largest) {
    if (amax <= beyond) return;
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = fminf(fmaxf(v[i], -largest), largest);
  }
};

// Four codes of 6 bits, one a byte, to 24 bits; and eight of them.
__device__ __forceinline__ uint32_t pack6(uint32_t bytes) {
  const uint32_t pairs = (bytes & 0x003F003F) | ((bytes >> 2) & 0x0FC00FC0);
  return (pairs & 0xFFF) | (pairs >> 4 & 0xFFF000);
}
__device__ __forceinline__ Codes join6(uint32_t first, uint32_t last) {
  const uint32_t a = pack6(first), b = pack6(last);
  return {a | b << 24, b >> 8};
}

// By integer arithmetic, where the hardware has no cast.
template <mx::ElementFormat kFormat>
__device__ __forceinline__ Codes encode_by_arithmetic(const float* x) {
  uint64_t codes = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i)
    codes |= static_cast<uint64_t>(mx::encode(x[i], kFormat)) << (kFormat.bits * i);
  return {static_cast<uint32_t>(codes), static_cast<uint32_t>(codes >> 32)};
}

// E2M3 or E3M2 codes, one a byte, from those of E4M3 or E5M2, which have the same mantissa.
__device__ __forceinline__ uint32_t narrow_sign(uint32_t bytes) {
  return (bytes & 0x1F1F1F1F) | ((bytes >> 2) & 0x20202020);
}

// Casts of four values by the hardware, to a byte each.
#define MICROMIX_CAST(name, type)                                                           \
  __device__ __forceinline__ uint32_t name(const float* v) {                                \
    uint16_t low, high;                                                                     \
    asm("cvt.rn.satfinite." type "x2.f32 %0, %1, %2;" : "=h"(low) : "f"(v[1]), "f"(v[0]));  \
    asm("cvt.rn.satfinite." type "x2.f32 %0, %1, %2;" : "=h"(high) : "f"(v[3]), "f"(v[2])); \
    return low | static_cast<uint32_t>(high) << 16;                                         \
  }
#if MICROMIX_HAS_FP8_CASTS
MICROMIX_CAST(e4m3x4, "e4m3")
MICROMIX_CAST(e5m2x4, "e5m2")
#endif
#if MICROMIX_HAS_MX_CASTS
MICROMIX_CAST(e2m3x4, "e2m3")
MICROMIX_CAST(e3m2x4, "e3m2")

__device__ __forceinline__ uint32_t e2m1x8(const float* v) {
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
      : "f"(v[0]), "f"(v[1]), "f"(v[2]), "f"(v[3]), "f"(v[4]), "f"(v[5]), "f"(v[6]), "f"(v[7]));
  return codes;
}
#endif
#undef MICROMIX_CAST

template <unsigned kSelector>
__device__ __forceinline__ uint32_t permute_bytes(uint32_t a, uint32_t b) {
  uint32_t c;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(c) : "r"(a), "r"(b), "n"(kSelector));
  return c;
}

// E2M1 of values with at most 8 significant bits (bfloat16, and a power of two), up to 7. The code
// of |v| is min(2|v|, |v| + 2, |v|/2 + 4) rounded to nearest even: the three lines count steps of a
// half, one and two, each is below the others where its step is the element's, and float16 holds
// them exactly there. Adding 1024 rounds to integers, two values at a time.
__device__ __forceinline__ uint32_t encode_e2m1_of_bfloat16(const float* v) {
  const __half2 half = __float2half2_rn(0.5f), two = __float2half2_rn(2.0f);
  const __half2 four = __float2half2_rn(4.0f), sixteen = __float2half2_rn(16.0f);
  const __half2 integer = __float2half2_rn(1024.0f);
  uint32_t bits[4];
  __half2 code[4];  // of elements i and i + 4, plus 1024
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const __half2 pair = __floats2half2_rn(v[i], v[i + 4]);
    bits[i] = *reinterpret_cast<const uint32_t*>(&pair);
    const __half2 x = __habs2(pair);
    const __half2 line = __hmin2(__hadd2(x, two), __hfma2(x, half, four));
    code[i] = __hadd2(__hmin2(__hadd2(x, x), line), integer);
  }
  const __half2 ab = __hfma2(__hsub2(code[1], integer), sixteen, code[0]);
  const __half2 cd = __hfma2(__hsub2(code[3], integer), sixteen, code[2]);
  const uint32_t codes = permute_bytes<0x6240>(*reinterpret_cast<const uint32_t*>(&ab),
                                               *reinterpret_cast<const uint32_t*>(&cd));
  // Selectors from 8 on repeat a byte's sign bit.
  return codes | (permute_bytes<0xFBD9>(bits[0], bits[2]) & 0x08080808) |
         (permute_bytes<0xFBD9>(bits[1], bits[3]) & 0x80808080);
}

// The codes of eight values of a block with the scale `byte` (not NaN) and the largest magnitude
// `amax`. `kBFloat16`: the values are bfloat16 numbers.
template <mx::ElementFormat kFormat, bool kBFloat16>
__device__ __forceinline__ Codes encode(const float* x, float amax, int byte) {
  const int exponent = 127 - byte;  // of the factor, from -126
#if MICROMIX_HAS_MX_CASTS
  const Scaled y(x, amax, power_of_two(exponent));
  if constexpr (kFormat == mx::E2M1) return {e2m1x8(y.v), 0};
  if constexpr (kFormat == mx::E2M3) return join6(e2m3x4(y.v), e2m3x4(y.v + 4));
  if constexpr (kFormat == mx::E3M2) return join6(e3m2x4(y.v), e3m2x4(y.v + 4));
  if constexpr (kFormat == mx::E4M3) return {e4m3x4(y.v), e4m3x4(y.v + 4)};
#else
  if constexpr (kFormat == mx::E2M1 && kBFloat16) {
    Scaled y(x, amax, power_of_two(exponent));
    y.clamp(6.9f, 6.0f);  // below 7 the code is that of 6 in any case
    return {encode_e2m1_of_bfloat16(y.v), 0};
  }
#if MICROMIX_HAS_FP8_CASTS
  if constexpr (kFormat == mx::E4M3) {
    const Scaled y(x, amax, power_of_two(exponent));
    return {e4m3x4(y.v), e4m3x4(y.v + 4)};
  }
  if constexpr (kFormat == mx::E2M3) {  // E4M3 begins 2^-6 lower
    Scaled y(x, amax, power_of_two(exponent - 6));
    y.clamp(7.5f / 64, 7.5f / 64);
    return join6(narrow_sign(e4m3x4(y.v)), narrow_sign(e4m3x4(y.v + 4)));
  }
  if constexpr (kFormat == mx::E3M2) {  // E5M2 begins 2^-12 lower
    Scaled y(x, amax, power_of_two(exponent - 12));
    y.clamp(28.0f / 4096, 28.0f / 4096);
    return join6(narrow_sign(e5m2x4(y.v)), narrow_sign(e5m2x4(y.v + 4)));
  }
#endif
  return encode_by_arithmetic<kFormat>(Scaled(x, amax, power_of_two(exponent)).v);
#endif
}

}  // namespace micromix::cuda
