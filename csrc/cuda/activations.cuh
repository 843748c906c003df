// Activations in float32, to about 4e-7 of their value (1e-9 absolute in the far tail of the exact
// GELU); tests/ops/test_quantize_cuda.py compares every bfloat16 and float16 number with float64.
#pragma once

#include "../rows.h"
#include "encode.cuh"

namespace micromix::cuda {

constexpr float kLog2E = 1.44269504f, kLog2ELow = 1.92596299e-8f, kLn2 = 0.69314718f;

// x / (1 + e^-a): the exponential is of -|a|, so that nothing overflows, and has its argument in
// two parts. The divisor lies in [1, 2], where __fdividef is good to 2 units in the last place.
__device__ __forceinline__ float logistic_product(float x, float a) {
  const float n = fmaxf(-fabsf(a), -200.0f);
  const float high = n * kLog2E;
  const float low = fmaf(n, kLog2ELow, fmaf(n, kLog2E, -high));
  float s = exp2f(high);
  s = fmaf(s, low * kLn2, s);
  const float r = __fdividef(1.0f, 1.0f + s);
  return x * (a < 0.0f ? s * r : r);
}

// x erfc(-x / sqrt 2) / 2. With t = 1 / (1 + z/2), erfc(z) = t exp(p(t) - z^2), p as on the CPU
// (csrc/cpu/rows_kernels.h): no cancellation for negative x.
__device__ __forceinline__ float gelu(float x) {
  const float z = fabsf(x) * 0.70710678f;
  const float t = __fdividef(1.0f, fmaf(0.5f, z, 1.0f));
  float p = fmaf(1.67381010e-01f, t, -8.01325262e-01f);
  p = fmaf(p, t, 1.43554546e+00f);
  p = fmaf(p, t, -1.06009940e+00f);
  p = fmaf(p, t, 2.13782744e-01f);
  p = fmaf(p, t, -1.50773008e-01f);
  p = fmaf(p, t, 8.46820959e-02f);
  p = fmaf(p, t, 3.76550192e-01f);
  p = fmaf(p, t, 9.99756808e-01f);
  p = fmaf(p, t, -1.26550058e+00f);
  const float tail = 0.5f * t * exp2f(fmaf(-z, z, p) * kLog2E);
  return x * (x < 0.0f ? tail : 1.0f - tail);
}

__device__ __forceinline__ float gelu_tanh(float x) {
  return logistic_product(x, 1.59576912f * fmaf(0.044715f * x, x * x, x));
}

// `function` of eight values; the switch is outside of the loop.
__device__ __forceinline__ void activate(Pointwise function, Eight& x) {
  const auto each = [&](auto f) {
#pragma unroll
    for (int i = 0; i < 8; ++i) x.v[i] = f(x.v[i]);
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
