// bfloat16 and float16 from and to float32, one value at a time, in plain C++.
#pragma once

#include <cstring>

#include "kernels.h"

namespace micromix::cpu {

MX_HOST_DEVICE inline float bfloat16_to_float(uint16_t bits) {
  return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
}

MX_HOST_DEVICE constexpr uint16_t float_to_bfloat16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  if ((bits & mx::kFloat32Magnitude) > mx::kFloat32Exponent) return 0x7FC0;
  return static_cast<uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

MX_HOST_DEVICE inline float float16_to_float(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16;
  const uint32_t magnitude = bits & 0x7FFF;
  // A subnormal number gets the leading 1 that it has not, which is taken off again. No float32
  // here is subnormal: the thread may want those taken for zero. The difference makes NaN quiet.
  const uint32_t one = magnitude < 0x400 ? 0x38800000 : 0;  // 2^-14
  const uint32_t bias = magnitude >= 0x7C00 ? 0x70000000 : 0x38000000;
  const uint32_t moved = (magnitude << 13) + (one ? one : bias);
  const float value = std::bit_cast<float>(moved) - std::bit_cast<float>(one);
  return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(value));
}

MX_HOST_DEVICE constexpr uint16_t float_to_float16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000);
  const uint32_t magnitude = bits & mx::kFloat32Magnitude;
  if (magnitude > mx::kFloat32Exponent) return sign | 0x7E00;
  if (magnitude >= 0x477FF000) return sign | 0x7C00;  // 65520 and more
  if (magnitude < 0x38800000) {                       // below 2^-14: steps of 2^-24
    const float sum = std::bit_cast<float>(magnitude) + 0.5f;
    return sign | static_cast<uint16_t>(std::bit_cast<uint32_t>(sum) & 0xFFFF);
  }
  return sign |
         static_cast<uint16_t>((magnitude - 0x38000000 + 0xFFF + ((magnitude >> 13) & 1)) >> 13);
}

// The scale byte of a block of floats whose largest magnitude has these bits: it is below 2 over
// the scale. That of zeros is neutral, that of a block with NaN or Inf is NaN.
MX_HOST_DEVICE constexpr uint8_t power_of_two_over(uint32_t amax_bits) {
  if (amax_bits == 0) return kNeutralScale;
  return static_cast<uint8_t>(amax_bits >> mx::kFloat32MantissaBits);
}

MX_HOST_DEVICE inline float load_float(const void* values, Dtype dtype, int64_t i) {
  if (dtype == Dtype::kFloat32) return static_cast<const float*>(values)[i];
  const uint16_t bits = static_cast<const uint16_t*>(values)[i];
  return dtype == Dtype::kBFloat16 ? bfloat16_to_float(bits) : float16_to_float(bits);
}

MX_HOST_DEVICE inline void store_float(void* values, Dtype dtype, int64_t i, float value) {
  if (dtype == Dtype::kFloat32) {
    static_cast<float*>(values)[i] = value;
  } else {
    static_cast<uint16_t*>(values)[i] =
        dtype == Dtype::kBFloat16 ? float_to_bfloat16(value) : float_to_float16(value);
  }
}

}  // namespace micromix::cpu
