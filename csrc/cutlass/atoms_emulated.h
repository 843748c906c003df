// The atoms in software, on a device from sm_80 on. See atoms.h.
//
// A code is moved by shifts to the float16 of the same sign, exponent and mantissa: the value times
// a power of two of its format, exact, subnormals included. Tensor cores multiply those; the scales
// and the formats' powers of two are applied to the float32 sum of a block.
#pragma once

#include "../mx/scales.h"

namespace micromix::blackwell {

inline constexpr bool kNativeAtoms = false;

MICROMIX_DEVICE uint32_t from_lane(uint32_t value, int lane) {
  return __shfl_sync(0xFFFFFFFFu, value, lane);
}

template <int kBits>
MICROMIX_DEVICE void load_matrices(uint32_t (&out)[4], uint32_t address) {
  if constexpr (kBits == 8) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(address)
                 : "memory");
  } else {
    const int lane = thread_index() % 32;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const uint32_t from = from_lane(address, 8 * j + lane / 4) + lane % 4 * (kBits / 2);
      uint32_t packed = load_shared_byte(from) | load_shared_byte(from + 1) << 8;
      if constexpr (kBits == 6) packed |= load_shared_byte(from + 2) << 16;
      out[j] = 0;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t code = packed >> (kBits * i) & ((1u << kBits) - 1);
        out[j] |= (kBits == 4 ? code << 2 : code) << (8 * i);
      }
    }
  }
}

// float16 has 5 exponent bits, bias 15, and 10 mantissa bits.
constexpr int kFloat16Bias = 15, kFloat16MantissaBits = 10;

// The power of two that is missing from a code's float16.
template <Element E>
constexpr int kMissing = kFloat16Bias - format_of(E).bias;

// Two codes, in the low and high half, as two float16.
template <Element E>
MICROMIX_DEVICE uint32_t as_float16s(uint32_t codes) {
  constexpr mx::ElementFormat f = format_of(E);
  constexpr uint32_t magnitude = (1u << (f.bits - 1)) - 1, both = 0x00010001;
  const uint32_t magnitudes = codes & (magnitude * both);
  const uint32_t signs = (codes >> (f.bits - 1) & both) << 15;
  uint32_t result = signs | magnitudes << (kFloat16MantissaBits - f.mantissa_bits);
  // A code of all ones carries into the sign's place; a NaN has all exponent bits, and a mantissa.
  if constexpr (f.has_nan) result |= ((magnitudes + both) >> 7 & both) * 0x7E00;
  return result;
}

// Codes kPair and kPair + 1 of a register of an operand, in the low and high half.
template <bool kPacked, Element E>
MICROMIX_DEVICE uint32_t pair_of(uint32_t codes, int pair) {
  if constexpr (kPacked) {
    const uint32_t two = codes >> (8 * pair);
    return (two & 0xF) | (two & 0xF0) << 12;
  } else {
    const uint32_t two = codes >> (16 * pair);
    const uint32_t bytes = (two & 0xFF) | (two & 0xFF00) << 8;
    return E == Element::kE2M1 ? bytes >> 2 : bytes;
  }
}

MICROMIX_DEVICE void multiply_float16(float (&sums)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                      uint32_t a3, uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// sum + product * 2^(exponents of both scales + missing), the power applied in halves, each of them
// a float32. Beyond that range the result is 0 or infinite either way.
MICROMIX_DEVICE float add_scaled(float sum, float product, uint32_t scale_a, uint32_t scale_b,
                                 int missing) {
  if (scale_a == mx::kNanScale || scale_b == mx::kNanScale) return as_float(0x7FC00000);
  const int exponent = static_cast<int>(scale_a + scale_b) - 2 * mx::kFloat32Bias + missing;
  const int one = exponent >> 1, other = exponent - one;
  const auto power = [](int e) {
    const int clamped = e < -126 ? -126 : e > 127 ? 127 : e;
    return as_float(static_cast<uint32_t>(clamped + mx::kFloat32Bias) << mx::kFloat32MantissaBits);
  };
  return __fadd_rn(sum, __fmul_rn(__fmul_rn(product, power(one)), power(other)));
}

// Not inlined: a kernel has hundreds.
template <bool kPacked, Element A, Element B>
__device__ __noinline__ float4 multiply_block(float4 sums, uint4 a, uint2 b, uint32_t scale_a,
                                              uint32_t scale_b) {
  constexpr int kCodes = kPacked ? 8 : 4;  // of a register
  const int lane = thread_index() % 32, g = lane / 4, q = lane % 4;
  const uint32_t as[4] = {a.x, a.y, a.z, a.w}, bs[2] = {b.x, b.y};
  uint32_t rows[2], columns[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    rows[i] = from_lane(scale_a, 4 * g + i);
    columns[i] = from_lane(scale_b, 4 * (2 * q + i));
  }
  float product[4] = {};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int pair = 0; pair < kCodes / 2; pair += 2) {
      const auto of_a = [&](int i, int p) {
        return as_float16s<A>(pair_of<kPacked, A>(as[2 * half + i], p));
      };
      const auto of_b = [&](int p) { return as_float16s<B>(pair_of<kPacked, B>(bs[half], p)); };
      multiply_float16(product, of_a(0, pair), of_a(1, pair), of_a(0, pair + 1), of_a(1, pair + 1),
                       of_b(pair), of_b(pair + 1));
    }
    if (!kPacked && half == 0) continue;
    const int shift = kPacked ? 8 * half : 0;
    const auto add = [&](float sum, int i) {
      return add_scaled(sum, product[i], rows[i / 2] >> shift & 0xFF,
                        columns[i % 2] >> shift & 0xFF, kMissing<A> + kMissing<B>);
    };
    sums = make_float4(add(sums.x, 0), add(sums.y, 1), add(sums.z, 2), add(sums.w, 3));
#pragma unroll
    for (float& p : product) p = 0;
  }
  return sums;
}

template <bool kPacked, Element A, Element B>
MICROMIX_DEVICE void multiply(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                              uint32_t scale_a, uint32_t scale_b) {
  const float4 result = multiply_block<kPacked, A, B>(
      make_float4(sums[0], sums[1], sums[2], sums[3]), make_uint4(a[0], a[1], a[2], a[3]),
      make_uint2(b[0], b[1]), scale_a, scale_b);
  sums[0] = result.x;
  sums[1] = result.y;
  sums[2] = result.z;
  sums[3] = result.w;
}

}  // namespace micromix::blackwell
