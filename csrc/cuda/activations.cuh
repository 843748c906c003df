// Activations in float32, to about 1e-6 of their value, or 1e-9 where they are tiny;
// tests/ops/test_quantize_cuda.py compares every bfloat16 and float16 number with float64.
#pragma once

#include "../rows.h"
#include "vectors.cuh"

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

// max(x, 0) - |x| erfc(|x| / sqrt 2) / 2: no cancellation for negative x. erfc(z) exp(z^2) / 2 is
// t 2^p(t) with t = 1 / (1 + c |x|) and a minimax polynomial p: up to z = 6 to 9e-8 of its value
// beside float32's rounding, and beyond exp(-z^2) is all that counts.
__device__ __forceinline__ float gelu(float x) {
  const float a = fminf(fabsf(x), 64.0f);  // no infinity times zero
  const float t = reciprocal_approximately(fmaf(0.31819806f, a, 1.0f));
  float p = fmaf(-0.29956433f, t, 1.41469693f);
  p = fmaf(p, t, -2.43718243f);
  p = fmaf(p, t, 1.67395461f);
  p = fmaf(p, t, -0.55927974f);
  p = fmaf(p, t, 0.76805514f);
  p = fmaf(p, t, 1.41544056f);
  p = fmaf(p, t, -2.97612095f);
  const float tail = t * exp2_approximately(fmaf(a * a, -0.5f * kLog2E, p));
  return fmaf(-a, tail, largest(x, 0.0f));
}
// The same of a bfloat16 number, for a bfloat16 result. The logarithm of erfc(|x| / sqrt 2) / 2 is
// a polynomial up to 6.3, from where on |x| times that is below 1e-9. It is a linear program's: of
// those that round every number of the type as it should be, the one farthest from the midpoints.
__device__ __forceinline__ float gelu_of_bfloat16(float x) {
  const float a = fminf(fabsf(x), 6.3f);
  float p = fmaf(3.3372817e-5f, a, -7.4892463e-4f);
  p = fmaf(p, a, 0.0078644529f);
  p = fmaf(p, a, -0.052625924f);
  p = fmaf(p, a, -0.45991172f);
  p = fmaf(p, a, -1.1507415f);
  p = fmaf(p, a, -1.0000072f);
  return fmaf(-a, exp2_approximately(p), largest(x, 0.0f));
}

// x / (1 + e^-a), a = sqrt(8 / pi) (x + 0.044715 x^3).
__device__ __forceinline__ float gelu_tanh(float x) {
  constexpr float kSlope = -1.59576912f * kLog2E;
  const float exponent = x * fmaf(x * x, 0.044715f * kSlope, kSlope);
  return x * reciprocal_approximately(1.0f + exp2_approximately(exponent));
}

// `function` of every value; the switch is outside of the loop. `kBFloat16`: the values and what
// they are rounded to are bfloat16.
template <bool kBFloat16, int kCount>
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
      return each([](float v) { return kBFloat16 ? gelu_of_bfloat16(v) : gelu(v); });
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
