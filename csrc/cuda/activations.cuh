// Activations in float32, to about 1e-6 of their value, or 1e-9 where they are tiny;
// tests/ops/test_quantize_cuda.py compares every bfloat16 and float16 number with float64.
#pragma once

#include "../rows.h"
#include "encode.cuh"

namespace micromix::cuda {

// 2^x and 1 / x to 2 units in the last place, one instruction each; subnormal results are zero.
__device__ __forceinline__ float exp2_approximately(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float reciprocal_approximately(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

constexpr float kLog2E = 1.44269504f;

// x / (1 + e^-a). Where e^-a overflows, 1 / infinity is the zero that is wanted.
__device__ __forceinline__ float logistic_product(float x, float a) {
  return x * reciprocal_approximately(1.0f + exp2_approximately(a * -kLog2E));
}

// x erfc(-x / sqrt 2) / 2. With t = 1 / (1 + z/2), erfc(z) = t exp(p(t) - z^2), p as on the CPU
// (csrc/cpu/rows_kernels.h), here times log2 e and less 1 for the half: no cancellation for
// negative x.
__device__ __forceinline__ float gelu(float x) {
  const float z = fabsf(x) * 0.70710678f;
  const float t = reciprocal_approximately(fmaf(0.5f, z, 1.0f));
  float p = fmaf(1.67381010e-01f * kLog2E, t, -8.01325262e-01f * kLog2E);
  p = fmaf(p, t, 1.43554546e+00f * kLog2E);
  p = fmaf(p, t, -1.06009940e+00f * kLog2E);
  p = fmaf(p, t, 2.13782744e-01f * kLog2E);
  p = fmaf(p, t, -1.50773008e-01f * kLog2E);
  p = fmaf(p, t, 8.46820959e-02f * kLog2E);
  p = fmaf(p, t, 3.76550192e-01f * kLog2E);
  p = fmaf(p, t, 9.99756808e-01f * kLog2E);
  p = fmaf(p, t, -1.26550058e+00f * kLog2E - 1.0f);
  const float tail = t * exp2_approximately(fmaf(z * -kLog2E, z, p));
  return x * (x < 0.0f ? tail : 1.0f - tail);
}

__device__ __forceinline__ float gelu_tanh(float x) {
  return logistic_product(x, 1.59576912f * fmaf(0.044715f * x, x * x, x));
}

// `function` of every value; the switch is outside of the loop.
template <int kCount>
__device__ __forceinline__ void activate(Pointwise function, Values<kCount>& x) {
  const auto each = [&](auto f) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) x.v[i] = f(x.v[i]);
  };
  switch (function) {
    case Pointwise::kRelu:
      return each([](float v) { return v < 0.0f ? 0.0f : v; });
    case Pointwise::kSilu:
      return each([](float v) { return logistic_product(v, v); });
    case Pointwise::kGelu:
      return each([](float v) { return gelu(v); });
    case Pointwise::kGeluTanh:
      return each([](float v) { return gelu_tanh(v); });
    case Pointwise::kQuickGelu:
      return each([](float v) { return logistic_product(v, 1.702f * v); });
    case Pointwise::kCast:
    case Pointwise::kAdd:
      return;
  }
}

}  // namespace micromix::cuda
