// What a row function makes of its operands, in float32.
#pragma once

#include "activations.cuh"
#include "vectors.cuh"

namespace micromix::cuda {

// The sum over a warp, in every thread.
__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) v += __shfl_xor_sync(kWarp, v, lanes);
  return v;
}

struct Statistics {
  float mean, factor;
};
// To 2 units in the last place.
__device__ __forceinline__ float inverse_root(float mean_square, float eps) {
  return rsqrtf(mean_square + eps);
}

// What a row function makes of a group: of x (of a norm: x + residual), the other operand, and the
// norm's vectors. Not rounded to the result's type.
template <RowFunction kFunction, Types kTypes, int kGroup>
__device__ __forceinline__ Values<kGroup> finish(const RowTask& task, Values<kGroup> y,
                                                 const Values<kGroup>& second,
                                                 const Values<kGroup>& weight,
                                                 const Values<kGroup>& bias,
                                                 const Statistics& of_row) {
  const Dtype x_type = type_of<kTypes>(task.x.dtype);
  const auto each = [&](auto f) {
#pragma unroll
    for (int i = 0; i < kGroup; ++i) y.v[i] = f(y.v[i], i);
  };
  if constexpr (kFunction == RowFunction::kPointwise) {
    activate<kTypes == Types::kBFloat16>(task.function, y);
    if (task.second.data == nullptr) return y;
    if (task.function == Pointwise::kAdd) {
      each([&](float v, int i) { return v + second.v[i]; });
      return y;
    }
    // An activation has a value of its own in the model, of x's type.
    if (task.function != Pointwise::kCast) y = rounded(y, x_type);
    each([&](float v, int i) { return v * second.v[i]; });
  } else if constexpr (kFunction == RowFunction::kRmsNorm) {
    each([&](float v, int) { return v * of_row.factor; });
    if (task.form == RmsForm::kWeightAfterCast) y = rounded(y, x_type);
    if (task.weight.data == nullptr) return y;
    if (task.form == RmsForm::kOnePlusWeight)
      each([&](float v, int i) { return v * (weight.v[i] + 1.0f); });
    else
      each([&](float v, int i) { return v * weight.v[i]; });
  } else {
    each([&](float v, int) { return (v - of_row.mean) * of_row.factor; });
    if (task.weight.data != nullptr) each([&](float v, int i) { return v * weight.v[i]; });
    if (task.bias.data != nullptr) each([&](float v, int i) { return v + bias.v[i]; });
  }
  return y;
}

}  // namespace micromix::cuda
