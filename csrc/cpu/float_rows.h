// Activations that are not quantised, as the products take them: in the order of the layout,
// rotated, rounded to bfloat16, and block by block over a power of two, so that no product of two
// elements leaves the range of float32.
#pragma once

#include "../mx/hadamard.h"
#include "convert.h"

namespace micromix::cpu {

// The values of a block of row r.
[[gnu::always_inline]] inline void load_block(const LinearTask& task, int64_t r, int64_t block,
                                              bool rotated, float* values) {
  const int64_t first = block * mx::kBlock;
  for (int i = 0; i < mx::kBlock; ++i) {
    const int64_t channel = task.order ? task.order[first + i] : first + i;
    const bool real = channel >= 0 && channel < task.k;
    values[i] = real ? load_float(task.x, task.x_dtype, r * task.k + channel) : 0.0f;
  }
  if (rotated) mx::hadamard(values);
  if (!rotated && task.x_dtype == Dtype::kBFloat16) return;
  for (int i = 0; i < mx::kBlock; ++i) values[i] = bfloat16_to_float(float_to_bfloat16(values[i]));
}

// Brings a block over the power of two of its largest magnitude, whose scale byte it returns. A
// block with NaN or Inf becomes NaN.
[[gnu::always_inline]] inline uint8_t normalise_block(float* values) {
  uint32_t amax = 0;
  for (int i = 0; i < mx::kBlock; ++i) {
    const uint32_t magnitude = std::bit_cast<uint32_t>(values[i]) & mx::kFloat32Magnitude;
    amax = magnitude > amax ? magnitude : amax;
  }
  const uint8_t scale = power_of_two_over(amax);
  const float factor = scale < 254 ? mx::inverse_scale(scale) : 0x1p-127f;
  const bool nan = scale == mx::kNanScale;
  for (int i = 0; i < mx::kBlock; ++i) {
    values[i] = nan ? mx::scale_value(mx::kNanScale) : values[i] * factor;
  }
  return scale;
}

}  // namespace micromix::cpu
