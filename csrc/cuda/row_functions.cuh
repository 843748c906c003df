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

// Adds, in float32, 16 x 8 sums of products: of 16 rows of values, `low` of the first eight and
// `high` of the others, and of eight columns. A word is two neighbours; four lanes have a row or a
// column.
__device__ __forceinline__ void add_products(float (&sums)[4], uint32_t low, uint32_t high,
                                             uint32_t columns, bool bfloat16) {
  if (bfloat16) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, "
        "{%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(low), "r"(high), "r"(columns));
  } else {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, "
        "{%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(low), "r"(high), "r"(columns));
  }
}

// Sums of squares, and of values if `kSum`, of the lanes 4 * i to 4 * i + 3, in the one of these
// whose number modulo 4 is its eighth. Matrix instructions sum up: of the products of values with
// themselves, the diagonal is of squares; their products with ones are the values.
struct Products {
  float squares, sum;
};
// `upper`: whether the lane is in the upper half of its eight.
template <bool kSum, int kWords>
__device__ __forceinline__ Products products_of_lanes(const uint32_t (&x)[kWords], bool upper,
                                                      bool bfloat16) {
  const uint32_t kOnes = bfloat16 ? 0x3F803F80 : 0x3C003C00;
  float even[4] = {}, odd[4] = {}, ones[4] = {};
#pragma unroll
  for (int i = 0; i < kWords; i += 2) {
    add_products(even, x[i], x[i + 1], x[i], bfloat16);
    add_products(odd, x[i], x[i + 1], x[i + 1], bfloat16);
    if constexpr (kSum) add_products(ones, x[i], x[i + 1], kOnes, bfloat16);
  }
  // A lane has columns 2 * (lane % 4) and the next of rows lane / 4 and 8 + lane / 4.
  return {upper ? even[1] + odd[3] : even[0] + odd[2], ones[0] + ones[2]};
}

// A normalised value is (v - from) * factor + plus; an RMSNorm's v * factor.
struct Statistics {
  float factor, from, plus;
};
// To 2 units in the last place.
__device__ __forceinline__ float inverse_root(float mean_square, float eps) {
  return rsqrtf(mean_square + eps);
}
// Whether the mean is so small that it may be taken off last, in a fused multiply and add. What the
// mean square less the square of the mean then loses is below the rounding of the sums.
__device__ __forceinline__ bool is_near_zero(float mean, float variance) {
  return mean * mean <= variance;
}
__device__ __forceinline__ Statistics layer_statistics(float mean, float variance, float eps) {
  const float factor = inverse_root(variance, eps);
  if (is_near_zero(mean, variance)) return {factor, 0.0f, -mean * factor};
  return {factor, mean, 0.0f};
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
    const bool weighs = task.weight.data != nullptr, adds = task.bias.data != nullptr;
    each([&](float v, int) { return fmaf(v - of_row.from, of_row.factor, of_row.plus); });
    each([&](float v, int i) {
      return fmaf(v, weighs ? weight.v[i] : 1.0f, adds ? bias.v[i] : -0.0f);
    });
  }
  return y;
}

}  // namespace micromix::cuda
