// The atoms on the host, in float64 per block. See atoms.h.
#pragma once

#include <cmath>

#include "../mx/scales.h"

namespace micromix::blackwell {

inline constexpr bool kNativeAtoms = false;

template <int kBits>
MICROMIX_DEVICE void load_matrices(uint32_t (&out)[4], uint32_t address) {
  const uint32_t* const addresses = simulator::exchange(&address, 1);
  const int lane = thread_index() % 32;
  for (int j = 0; j < 4; ++j) {
    const uint8_t* const row = simulator::shared(addresses[(8 * j + lane / 4) * 8], 16);
    out[j] = 0;
    for (int i = 0; i < 4; ++i) {
      const int bit = (4 * (lane % 4) + i) * kBits;
      const uint32_t two = row[bit / 8] | (bit / 8 < 15 ? row[bit / 8 + 1] << 8 : 0);
      const uint32_t code = two >> (bit % 8) & ((1u << kBits) - 1);
      out[j] |= (kBits == 4 ? code << 2 : code) << (8 * i);
    }
  }
}

// A code from the byte of an operand.
template <bool kPacked, Element E>
MICROMIX_DEVICE double value_at(uint32_t codes, int i) {
  const uint32_t code = kPacked               ? codes >> (4 * i) & 0xF
                        : E == Element::kE2M1 ? codes >> (8 * i + 2) & 0xF
                                              : codes >> (8 * i) & ((1u << bits_of(E)) - 1);
  return mx::decode(static_cast<uint8_t>(code), format_of(E));
}

template <bool kPacked, Element A, Element B>
MICROMIX_DEVICE void multiply(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                              uint32_t scale_a, uint32_t scale_b) {
  constexpr int kCodes = kPacked ? 8 : 4;  // of a register
  const uint32_t own[8] = {a[0], a[1], a[2], a[3], b[0], b[1], scale_a, scale_b};
  const uint32_t* const lanes = simulator::exchange(own, 8);
  const int lane = thread_index() % 32;
  for (int i = 0; i < 4; ++i) {
    const int m = lane / 4 + 8 * (i / 2), n = 2 * (lane % 4) + i % 2;
    double sum = 0, total = sums[i];
    for (int half = 0; half < 2; ++half) {
      for (int q = 0; q < 4; ++q) {
        const uint32_t from_a = lanes[(m % 8 * 4 + q) * 8 + half * 2 + m / 8];
        const uint32_t from_b = lanes[(n * 4 + q) * 8 + 4 + half];
        for (int k = 0; k < kCodes; ++k)
          sum += value_at<kPacked, A>(from_a, k) * value_at<kPacked, B>(from_b, k);
      }
      if (!kPacked && half == 0) continue;
      const int shift = kPacked ? 8 * half : 0;
      const auto by_row = static_cast<uint8_t>(lanes[(m % 8 * 4 + m / 8) * 8 + 6] >> shift);
      const auto by_column = static_cast<uint8_t>(lanes[n * 4 * 8 + 7] >> shift);
      const bool nan = by_row == mx::kNanScale || by_column == mx::kNanScale;
      total += nan ? NAN : std::ldexp(sum, by_row + by_column - 2 * mx::kFloat32Bias);
      sum = 0;
    }
    sums[i] = static_cast<float>(total);
  }
}

}  // namespace micromix::blackwell
