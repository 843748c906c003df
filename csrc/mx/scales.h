// E8M0 block scales: one byte b per 32 elements, 2^(b - 127), 0xFF is NaN.
// micromix_compile/mx/scales.py says the same in torch.
#pragma once

#include "elements.h"

namespace mx {

inline constexpr int kBlock = 32;
inline constexpr uint8_t kNanScale = 0xFF;

enum class ScaleRule : int { kFloor = 0, kCeil = 1, kEven = 2 };

// What is added to the bits of amax so that its exponent field, less emax, is the scale byte: it
// carries when the mantissa is beyond that of the largest element (ceil), or within half a step of
// the next power of two (even).
MX_HOST_DEVICE constexpr uint32_t scale_increment(ElementFormat format, ScaleRule rule) {
  switch (rule) {
    case ScaleRule::kFloor:
      return 0;
    case ScaleRule::kCeil:
      return kFloat32Mantissa - (format.largest_bits & kFloat32Mantissa);
    case ScaleRule::kEven:
      return 1u << (kFloat32MantissaBits - format.mantissa_bits - 1);
  }
  return 0;
}

// The scale byte of a block whose largest magnitude has the float32 bits `amax_bits`.
MX_HOST_DEVICE constexpr uint8_t scale_byte(uint32_t amax_bits, uint32_t increment, int emax) {
  if (amax_bits >= kFloat32Exponent) return kNanScale;
  const int exponent = static_cast<int>((amax_bits + increment) >> kFloat32MantissaBits) - emax;
  return static_cast<uint8_t>(exponent < 0 ? 0 : exponent);
}

// The factor 2^(127 - byte) that quantisation multiplies by: normal for every byte up to 253, and
// no finite block has a larger one.
MX_HOST_DEVICE constexpr float inverse_scale(uint8_t byte) {
  return std::bit_cast<float>((254u - byte) << kFloat32MantissaBits);
}

// The value of a scale byte; byte 0 is a float32 subnormal.
MX_HOST_DEVICE constexpr float scale_value(uint8_t byte) {
  if (byte == kNanScale) return std::bit_cast<float>(0x7FC00000u);
  return std::bit_cast<float>(byte == 0 ? 1u << (kFloat32MantissaBits - 1)
                                        : static_cast<uint32_t>(byte) << kFloat32MantissaBits);
}

}  // namespace mx
