// csrc/cuda/vectors.cuh for the host: what decoding takes from there.
#pragma once

#include <cmath>

#include "../dtype.h"
#include "cuda_runtime_api.h"

namespace micromix::cuda {

constexpr unsigned kWarp = 0xFFFFFFFF;
inline void wait_for_the_kernel_before() {}
inline void let_the_next_kernel_start() {}

template <int kCount>
struct Values {
  float v[kCount];
};

// PTX: prmt.
template <unsigned kSelector>
uint32_t permute_bytes(uint32_t a, uint32_t b) {
  const uint64_t both = uint64_t{b} << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned selector = kSelector >> 4 * i & 0xF;
    uint32_t byte = both >> 8 * (selector & 7) & 0xFF;
    if (selector & 8) byte = byte & 0x80 ? 0xFF : 0;
    result |= byte << 8 * i;
  }
  return result;
}

inline float widened(uint32_t bfloat16) {
  const uint32_t bits = bfloat16 << 16;
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
inline uint32_t narrowed(float x) {
  if (std::isnan(x)) return 0x7FFF;
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
}
inline uint32_t product_of_pairs(uint32_t a, uint32_t b, bool) {
  return narrowed(widened(a & 0xFFFF) * widened(b & 0xFFFF)) |
         narrowed(widened(a >> 16) * widened(b >> 16)) << 16;
}

inline float power_of_two(int exponent) { return std::ldexp(1.0f, exponent); }
inline float load_one(const void* data, Dtype, int64_t i) {
  return static_cast<const float*>(data)[i];
}
template <int kCount>
void store_any(void* data, Dtype, int64_t i, int count, const Values<kCount>& x) {
  for (int j = 0; j < count; ++j) static_cast<float*>(data)[i + j] = x.v[j];
}

}  // namespace micromix::cuda
