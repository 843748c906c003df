// The rotation of a block: the Sylvester-Hadamard matrix of order 32, divided by sqrt(32). Sums of
// pairs of distance 1, 2, 4, 8, 16, in that order, then one product: every kernel gives the same
// bits. micromix_compile/mx/hadamard.py says the same in torch.
#pragma once

#include "scales.h"

namespace mx {

inline constexpr float kHadamardNorm = 0.17677669529663687f;

MX_HOST_DEVICE inline void hadamard(float* block) {
  for (int distance = 1; distance < kBlock; distance *= 2) {
    for (int i = 0; i < kBlock; ++i) {
      if (i & distance) continue;
      const float low = block[i], high = block[i + distance];
      block[i] = low + high;
      block[i + distance] = low - high;
    }
  }
  for (int i = 0; i < kBlock; ++i) block[i] *= kHadamardNorm;
}

}  // namespace mx
