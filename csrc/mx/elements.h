// The element formats of OCP Microscaling v1.0 (section 5.3): their casts from and to float32.
// Usable from host and device code. micromix_compile/mx/elements.py says the same in torch.
#pragma once

#include <bit>
#include <cstdint>

// Always inlined on the host: a copy that a file compiled for AVX-512 leaves behind could be the
// one that the linker keeps for a machine without it.
#if defined(__CUDACC__)
#define MX_HOST_DEVICE __host__ __device__
#else
#define MX_HOST_DEVICE [[gnu::always_inline]]
#endif

namespace mx {

inline constexpr int kFloat32MantissaBits = 23;
inline constexpr int kFloat32Bias = 127;
inline constexpr uint32_t kFloat32Magnitude = 0x7FFFFFFF;
inline constexpr uint32_t kFloat32Exponent = 0x7F800000;  // also the bits of +Inf
inline constexpr uint32_t kFloat32Mantissa = 0x007FFFFF;

// Sign, exponent, mantissa, from the high bit down. `emax` is the exponent of the largest power of
// two, `largest_bits` the float32 bits of the largest magnitude. Only E4M3 has a NaN: 0x7F, 0xFF.
struct ElementFormat {
  int bits;
  int mantissa_bits;
  int bias;
  int emax;
  uint32_t largest_bits;
  bool has_nan;

  constexpr bool operator==(const ElementFormat&) const = default;
};

inline constexpr ElementFormat E2M1{4, 1, 1, 2, std::bit_cast<uint32_t>(6.0f), false};
inline constexpr ElementFormat E2M3{6, 3, 1, 2, std::bit_cast<uint32_t>(7.5f), false};
inline constexpr ElementFormat E3M2{6, 2, 3, 4, std::bit_cast<uint32_t>(28.0f), false};
inline constexpr ElementFormat E4M3{8, 3, 7, 8, std::bit_cast<uint32_t>(448.0f), true};

// Formats whose elements, so many times, are integers of 7 bits with their sign.
constexpr bool is_small_integer(const ElementFormat& f) { return f == E2M1 || f == E2M3; }
constexpr int integer_factor(const ElementFormat& f) { return f == E2M1 ? 2 : 8; }

// The code of `x`, which is not NaN: nearest even, subnormals kept, saturating, sign of zero kept.
MX_HOST_DEVICE constexpr uint8_t encode(float x, ElementFormat format) {
  const int dropped_bits = kFloat32MantissaBits - format.mantissa_bits;
  const uint32_t smallest_normal = static_cast<uint32_t>(1 - format.bias + kFloat32Bias)
                                   << kFloat32MantissaBits;
  const uint32_t bits = std::bit_cast<uint32_t>(x);

  uint32_t magnitude = bits & kFloat32Magnitude;
  if (magnitude > format.largest_bits) magnitude = format.largest_bits;
  uint32_t exponent = magnitude & kFloat32Exponent;
  if (exponent < smallest_normal) exponent = smallest_normal;
  // One unit in the last place of `anchor` is the step of the format at this exponent, so the
  // float32 sum rounds where the element does, and counts the steps in its low bits.
  const uint32_t anchor = exponent + (static_cast<uint32_t>(dropped_bits) << kFloat32MantissaBits);
  const float sum = std::bit_cast<float>(magnitude) + std::bit_cast<float>(anchor);
  const uint32_t steps = std::bit_cast<uint32_t>(sum) - anchor;
  const uint32_t code = ((exponent - smallest_normal) >> dropped_bits) + steps;
  const uint32_t sign = (bits >> (32 - format.bits)) & (1u << (format.bits - 1));
  return static_cast<uint8_t>(code | sign);
}

MX_HOST_DEVICE constexpr bool is_nan(uint8_t code, ElementFormat format) {
  return format.has_nan && (code & 0x7F) == 0x7F;
}

// The value of a code, exact.
MX_HOST_DEVICE constexpr float decode(uint8_t code, ElementFormat format) {
  const uint32_t sign = static_cast<uint32_t>(code >> (format.bits - 1)) << 31;
  if (is_nan(code, format)) return std::bit_cast<float>(sign | 0x7FC00000u);
  const uint32_t magnitude = code & ((1u << (format.bits - 1)) - 1);
  const uint32_t exponent = magnitude >> format.mantissa_bits;
  const uint32_t mantissa = magnitude & ((1u << format.mantissa_bits) - 1);
  if (exponent == 0) {
    // A subnormal: mantissa steps of 2^(1 - bias - mantissa_bits).
    const uint32_t step_exponent =
        static_cast<uint32_t>(1 - format.bias - format.mantissa_bits + kFloat32Bias);
    const float step = std::bit_cast<float>(step_exponent << kFloat32MantissaBits);
    const float value = static_cast<float>(mantissa) * step;
    return std::bit_cast<float>(std::bit_cast<uint32_t>(value) | sign);
  }
  return std::bit_cast<float>(
      sign |
      ((exponent + static_cast<uint32_t>(kFloat32Bias - format.bias)) << kFloat32MantissaBits) |
      (mantissa << (kFloat32MantissaBits - format.mantissa_bits)));
}

}  // namespace mx
