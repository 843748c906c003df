// Eight elements to their codes, side by side as they lie in memory.
//
// A format whose cast the hardware lacks is cast through a wider one with the same mantissa: scaled
// by the power of two that brings the smallest normal numbers of both together, the codes are those
// of the wider format, subnormals included, and there is one rounding.
#pragma once

#include "../mx/hadamard.h"

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
__device__ __forceinline__ Codes join_24_bits(uint32_t first, uint32_t last) {
  return {first | last << 24, last >> 8};
}
__device__ __forceinline__ Codes join6(uint32_t first, uint32_t last) {
  return join_24_bits(pack6(first), pack6(last));
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

// E2M1 and E2M3 of bfloat16 numbers, of two at once. With v = |x| over the scale and M bits of
// mantissa, the code of v is the least of 2^M v, 2^(M-1) v + 2^M and 2^(M-2) v + 2^(M+1), rounded
// to nearest even: the three lines count the steps of the subnormal and first normal numbers, of
// the next and of the last, and each is below the others where its step is the element's. From 128
// to 255 a bfloat16 number is an integer, so a fused multiply and add of |x|, the slope over the
// scale and the line's constant plus 128 rounds once, to that code plus 128. Under every scale rule
// v is below 8, and so the code at most 2^(M+2), one more than the largest.
template <int kMantissa>
struct Lines {
  static constexpr uint32_t k128 = 0x4300;  // and the last bits of 128 + n are n
  static constexpr uint32_t both(uint32_t half) { return half | half << 16; }

  // The steep slope over smaller scales is beyond the type.
  static constexpr int kLeastScale = kMantissa;

  // The slopes over the scales of two blocks, or twice of one, in either half of a word. The last
  // is subnormal for E2M1 and the largest scale.
  uint32_t steep, middle, flat;

  // Of scales whose steep slope is finite; 255 spoils nothing in the other half.
  __device__ __forceinline__ explicit Lines(uint32_t inverse_scales) {
    const auto times = [&](int power) {
      if (power == 0) return inverse_scales;
      constexpr uint32_t kMinusZero = 0x80008000;
      uint32_t y;
      asm("fma.rn.bf16x2 %0, %1, %2, %3;"
          : "=r"(y)
          : "r"(inverse_scales), "r"(both(static_cast<uint32_t>(127 + power) << 7)),
            "r"(kMinusZero));
      return y;
    };
    steep = times(kMantissa);
    middle = times(kMantissa - 1);
    flat = times(kMantissa - 2);
  }
  static __device__ __forceinline__ Lines of_block(int byte) {
    const uint32_t inverse = (254 - byte) << 7;
    return Lines(permute_bytes<0x1010>(inverse, inverse));
  }

  // 128 and the code, as bfloat16.
  __device__ __forceinline__ uint32_t operator()(uint32_t x) const {
    const uint32_t v = x & 0x7FFF7FFF;
    const auto line = [&](uint32_t slope, uint32_t constant) {
      uint32_t code;
      asm("fma.rn.bf16x2 %0, %1, %2, %3;"
          : "=r"(code)
          : "r"(v), "r"(slope), "r"(both(k128 + constant)));
      return code;
    };
    const auto smaller = [](uint32_t a, uint32_t b) {
      uint32_t c;
      asm("min.bf16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
      return c;
    };
    return smaller(smaller(line(steep, 0), line(middle, 1 << kMantissa)),
                   line(flat, 2 << kMantissa));
  }
};

// E2M1 of eight numbers: pairs of channels i and i + 4 of a block, or four channels of two blocks;
// their codes are in the same half.
__device__ __forceinline__ uint32_t encode_e2m1_of_bfloat16(const uint32_t* x,
                                                            const Lines<1>& lines) {
  uint32_t code[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) code[i] = lines(x[i]);
  uint32_t codes = code[0] + 0x10 * code[1] + 0x100 * (code[2] + 0x10 * code[3]) -
                   Lines<1>::both(Lines<1>::k128) * 0x1111;
  codes -= codes >> 3 & 0x11111111;  // a code of 8 saturates to 7
  // Selectors from 8 on repeat a byte's sign bit.
  return codes | (permute_bytes<0xFBD9>(x[0], x[2]) & 0x08080808) |
         (permute_bytes<0xFBD9>(x[1], x[3]) & 0x80808080);
}
// E2M3 of two neighbouring channels, in either half of a word: 12 bits each.
__device__ __forceinline__ uint32_t encode_two_e2m3_of_bfloat16(uint32_t first, uint32_t second,
                                                                const Lines<3>& lines) {
  uint32_t codes = lines(first) + 0x40 * lines(second) - Lines<3>::both(Lines<3>::k128) * 0x41;
  codes -= codes >> 5 & 0x00410041;  // a code of 32 saturates to 31
  return codes | (first >> 10 & 0x00200020) | (second >> 4 & 0x08000800);
}
// Of a half of four channels, the first two and the other two.
template <int kHalf>
__device__ __forceinline__ uint32_t join_two_and_two(uint32_t first, uint32_t last) {
  const uint32_t both = permute_bytes<kHalf == 0 ? 0x5410 : 0x7632>(first, last);
  return (both & 0xFFF) | (both >> 4 & 0xFFF000);
}
// E2M3 of eight channels of two blocks; and of one, pairs of channels i and i + 4.
__device__ __forceinline__ void encode_e2m3_of_bfloat16(const uint32_t (&x)[8],
                                                        const Lines<3>& lines, Codes (&codes)[2]) {
  uint32_t two[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) two[i] = encode_two_e2m3_of_bfloat16(x[2 * i], x[2 * i + 1], lines);
  codes[0] = join_24_bits(join_two_and_two<0>(two[0], two[1]), join_two_and_two<0>(two[2], two[3]));
  codes[1] = join_24_bits(join_two_and_two<1>(two[0], two[1]), join_two_and_two<1>(two[2], two[3]));
}
__device__ __forceinline__ Codes encode_e2m3_of_bfloat16(const uint32_t* x, const Lines<3>& lines) {
  const uint32_t first = encode_two_e2m3_of_bfloat16(x[0], x[1], lines);
  const uint32_t last = encode_two_e2m3_of_bfloat16(x[2], x[3], lines);
  return join_24_bits(join_two_and_two<0>(first, last), join_two_and_two<1>(first, last));
}

// The codes of eight values of a block with the scale `byte` (not NaN) and the largest magnitude
// `amax`.
template <mx::ElementFormat kFormat>
__device__ __forceinline__ Codes encode(const float* x, float amax, int byte) {
  const int exponent = 127 - byte;  // of the factor, from -126
#if MICROMIX_HAS_MX_CASTS
  const Scaled y(x, amax, power_of_two(exponent));
  if constexpr (kFormat == mx::E2M1) return {e2m1x8(y.v), 0};
  if constexpr (kFormat == mx::E2M3) return join6(e2m3x4(y.v), e2m3x4(y.v + 4));
  if constexpr (kFormat == mx::E3M2) return join6(e3m2x4(y.v), e3m2x4(y.v + 4));
  if constexpr (kFormat == mx::E4M3) return {e4m3x4(y.v), e4m3x4(y.v + 4)};
#else
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
