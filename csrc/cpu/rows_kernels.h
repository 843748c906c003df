// The row kernels, included once for each instruction set. No product and sum is contracted and
// every reduction has sixteen lanes, so all instruction sets give the same bits.
#pragma once

#include <cmath>

#include "lanes.h"
#include "rows.h"

namespace micromix::cpu {
namespace {

// Calls f(i, lanes, part) for the vectors of a row: channels i to i + lanes, kLanes but for the
// last, which belong to `part` of the row's sums.
template <typename F>
[[gnu::always_inline]] inline void for_each_vector(int64_t k, F f) {
  int64_t i = 0;
  for (; i + kSums <= k; i += kSums) {
#pragma GCC unroll 4
    for (int part = 0; part < kParts; ++part) f(i + part * kLanes, kLanes, part);
  }
#pragma GCC unroll 4
  for (int part = 0; part < kParts; ++part) {
    const int64_t left = k - i - part * kLanes;
    if (left > 0) f(i + part * kLanes, left < kLanes ? static_cast<int>(left) : kLanes, part);
  }
}

// e^x to 2 units in the last place; 0 from 2^-126.5 down, infinity from 2^127.5 up, as the factor
// at the end is at the ends of the range.
inline Lanes exponential(Lanes x) {
  x = clamped(x, -88.0f, 88.7f);
  constexpr float kMagic = 0x1.8p23f;  // its unit in the last place is 1
  const Lanes shifted = x * 1.44269504f + kMagic;
  const Lanes n = shifted - kMagic;
  const Words exponent = (Words)shifted - std::bit_cast<uint32_t>(kMagic);
  const Lanes r = (x - n * 0.693359375f) - n * -2.12194440e-4f;  // ln 2 in two parts
  // 1 + r + r^2 p(r), p fitted on |r| <= ln 2 / 2 (Chebyshev nodes).
  Lanes p = 1.990044450e-4f * r + 1.393454510e-3f;
  p = p * r + 8.333297063e-3f;
  p = p * r + 4.166645677e-2f;
  p = p * r + 1.666666672e-1f;
  p = p * r + 5.000000014e-1f;
  p = p * (r * r) + r + 1.0f;
  return p * (Lanes)((exponent + 127u) << 23);
}

#if defined(__AVX512BW__)
// logistic_product, with fused products and sums and no division. It may differ from the other in
// the last bits of a float32, which every rounding to bfloat16 hides where x is a bfloat16 number:
// tests/ops/test_fused.py tries them all.
inline Lanes logistic_product_for_bfloat16(Lanes x, Lanes u) {
  const auto set = [](float value) { return _mm512_set1_ps(value); };
  const __m512 y = (__m512)clamped(u, -88.37f, 87.33f);
  const __m512 magic = set(0x1.8p23f);
  const __m512 shifted = _mm512_fmadd_ps(y, set(-1.44269504f), magic);
  const __m512 n = _mm512_sub_ps(shifted, magic);
  __m512 r = _mm512_fnmsub_ps(n, set(0.693359375f), y);
  r = _mm512_fnmadd_ps(n, set(-2.12194440e-4f), r);
  __m512 p = _mm512_fmadd_ps(r, set(1.990044450e-4f), set(1.393454510e-3f));
  p = _mm512_fmadd_ps(p, r, set(8.333297063e-3f));
  p = _mm512_fmadd_ps(p, r, set(4.166645677e-2f));
  p = _mm512_fmadd_ps(p, r, set(1.666666672e-1f));
  p = _mm512_fmadd_ps(p, r, set(5.000000014e-1f));
  p = _mm512_fmadd_ps(p, r, set(1.0f));
  p = _mm512_fmadd_ps(p, r, set(1.0f));
  const Words power = (Words)p + ((Words)shifted << 23);
  const __m512 below = _mm512_add_ps((__m512)power, set(1.0f));
  // A step of Newton's on a reciprocal of 14 bits.
  const __m512 about = _mm512_rcp14_ps(below);
  const __m512 rest = _mm512_fnmadd_ps(below, about, set(1.0f));
  const __mmask16 finite = _mm512_cmp_ps_mask((__m512)u, set(-88.37f), _CMP_NLT_UQ);  // e^-u
  return x * (Lanes)_mm512_maskz_fmadd_ps(finite, rest, about, about);
}
#endif

// x times the logistic function of u, x / (1 + e^-u). `for_bfloat16`: x is a bfloat16 number, and
// the result will be rounded to one.
[[gnu::always_inline]] inline Lanes logistic_product(Lanes x, Lanes u,
                                                     [[maybe_unused]] bool for_bfloat16) {
#if defined(__AVX512BW__)
  if (for_bfloat16) return logistic_product_for_bfloat16(x, u);
#endif
  return x / (1.0f + exponential(-u));
}

// x erfc(-x / sqrt 2) / 2. With t = 1 / (1 + z/2), erfc(z) = t exp(p(t) - z^2), p fitted on
// 0.12 <= t <= 1 (Chebyshev nodes) to a relative error of 1e-7: no cancellation for negative x.
inline Lanes gelu(Lanes x) {
  const Lanes z = (Lanes)((Words)x & mx::kFloat32Magnitude) * 0.70710678f;
  const Lanes t = 1.0f / (1.0f + 0.5f * z);
  Lanes p = 1.67381010e-01f * t - 8.01325262e-01f;
  p = p * t + 1.43554546e+00f;
  p = p * t - 1.06009940e+00f;
  p = p * t + 2.13782744e-01f;
  p = p * t - 1.50773008e-01f;
  p = p * t + 8.46820959e-02f;
  p = p * t + 3.76550192e-01f;
  p = p * t + 9.99756808e-01f;
  p = p * t - 1.26550058e+00f;
  const Lanes tail = 0.5f * t * exponential(p - z * z);
  return x * (x < 0.0f ? tail : 1.0f - tail);
}

// Calls f with a task whose types are constants to the compiler where all are bfloat16, as they
// mostly are; the copy's fields stay in registers.
template <typename F>
[[gnu::always_inline]] inline void specialised(RowTask task, F f) {
  const auto is_bfloat16 = [](const RowInput& input) {
    return !input.data || input.dtype == Dtype::kBFloat16;
  };
  if (is_bfloat16(task.x) && is_bfloat16(task.second) && is_bfloat16(task.weight) &&
      is_bfloat16(task.bias) && task.dtype == Dtype::kBFloat16) {
    task.x.dtype = task.second.dtype = task.weight.dtype = task.bias.dtype = Dtype::kBFloat16;
    task.dtype = Dtype::kBFloat16;
    f(task);
  } else {
    f(task);
  }
}

// The values that a norm is of, x or x + residual rounded to x's type and stored, and f of each
// vector of them.
template <typename F>
[[gnu::always_inline]] inline void load_sum(const RowTask& task, int64_t row, float* values, F f) {
  for_each_vector(task.k, [&](int64_t i, int lanes, int part) __attribute__((always_inline)) {
    Lanes v = load(task.x.data, task.x.dtype, row * task.x.stride + i, lanes);
    if (task.second.data) {
      v += load(task.second.data, task.second.dtype, row * task.second.stride + i, lanes);
      v = rounded(v, task.x.dtype);
      store(v, task.sum, task.x.dtype, row * task.k + i, lanes);
    }
    store(v, values, Dtype::kFloat32, i, lanes);
    f(v, part);
  });
}

[[gnu::always_inline]] inline void rms_norm_of(const RowTask& task, int64_t row, float* values,
                                               void* out) {
  const int64_t k = task.k;
  Sums squares;
  load_sum(task, row, values,
           [&](Lanes v, int part) __attribute__((always_inline)) { squares.parts[part] += v * v; });
  const float mean = total(squares) / static_cast<float>(k);
  const float factor = 1.0f / std::sqrt(mean + task.eps);
  for_each_vector(k, [&](int64_t i, int lanes, int) __attribute__((always_inline)) {
    Lanes v = load_floats(values + i, lanes) * factor;
    if (task.form == RmsForm::kWeightAfterCast) v = rounded(v, task.x.dtype);
    if (task.weight.data) {
      const Lanes weight = load(task.weight.data, task.weight.dtype, i, lanes);
      v *= task.form == RmsForm::kOnePlusWeight ? weight + 1.0f : weight;
    }
    store(rounded(v, task.dtype), out, task.dtype, i, lanes);
  });
}

[[gnu::always_inline]] inline void layer_norm_of(const RowTask& task, int64_t row, float* values,
                                                 void* out) {
  const int64_t k = task.k;
  Sums sum, squares;
  load_sum(task, row, values,
           [&](Lanes v, int part) __attribute__((always_inline)) { sum.parts[part] += v; });
  const float mean = total(sum) / static_cast<float>(k);
  for_each_vector(k, [&](int64_t i, int lanes, int part) __attribute__((always_inline)) {
    store(load_floats(values + i, lanes) - mean, values, Dtype::kFloat32, i, lanes);
    const Lanes v = load_floats(values + i, lanes);  // zero beyond the row's end
    squares.parts[part] += v * v;
  });
  const float variance = total(squares) / static_cast<float>(k);
  const float factor = 1.0f / std::sqrt(variance + task.eps);
  for_each_vector(k, [&](int64_t i, int lanes, int) __attribute__((always_inline)) {
    Lanes v = load_floats(values + i, lanes) * factor;
    if (task.weight.data) v *= load(task.weight.data, task.weight.dtype, i, lanes);
    if (task.bias.data) v += load(task.bias.data, task.bias.dtype, i, lanes);
    store(rounded(v, task.dtype), out, task.dtype, i, lanes);
  });
}

void rms_norm(const RowTask& task, int64_t row, float* values, void* out) {
  specialised(task, [=](const RowTask& one)
                        __attribute__((always_inline)) { rms_norm_of(one, row, values, out); });
}

void layer_norm(const RowTask& task, int64_t row, float* values, void* out) {
  specialised(task, [=](const RowTask& one)
                        __attribute__((always_inline)) { layer_norm_of(one, row, values, out); });
}

template <typename F>
[[gnu::always_inline]] inline void pointwise_of(const RowTask& task, int64_t row, void* out, F f) {
  const bool for_bfloat16 = task.x.dtype == Dtype::kBFloat16 && task.dtype == Dtype::kBFloat16;
  for_each_vector(task.k, [&](int64_t i, int lanes, int) __attribute__((always_inline)) {
    Lanes v = f(load(task.x.data, task.x.dtype, row * task.x.stride + i, lanes), for_bfloat16);
    if (task.second.data) {
      const Lanes other =
          load(task.second.data, task.second.dtype, row * task.second.stride + i, lanes);
      // An activation has a value of its own in the model, of x's type.
      v = task.function == Pointwise::kAdd ? v + other : rounded(v, task.x.dtype) * other;
    }
    store(rounded(v, task.dtype), out, task.dtype, i, lanes);
  });
}

void pointwise(const RowTask& task, int64_t row, float*, void* out) {
  const auto apply = [&](auto f) {
    specialised(task, [=](const RowTask& one)
                          __attribute__((always_inline)) { pointwise_of(one, row, out, f); });
  };
  switch (task.function) {
    case Pointwise::kRelu:
      return apply([](Lanes x, bool)
                       __attribute__((always_inline)) { return x < 0.0f ? Lanes{} : x; });
    case Pointwise::kSilu:
      return apply([](Lanes x, bool for_bfloat16) __attribute__((always_inline)) {
        return logistic_product(x, x, for_bfloat16);
      });
    case Pointwise::kGelu:
      return apply([](Lanes x, bool) __attribute__((always_inline)) { return gelu(x); });
    case Pointwise::kGeluTanh:  // 0.5 (1 + tanh u) is the logistic function of 2 u
      return apply([](Lanes x, bool for_bfloat16) __attribute__((always_inline)) {
        const Lanes u = 0.79788456f * (x + 0.044715f * (x * x * x));
        return logistic_product(x, 2.0f * u, for_bfloat16);
      });
    case Pointwise::kQuickGelu:  // CLIP's
      return apply([](Lanes x, bool for_bfloat16) __attribute__((always_inline)) {
        return logistic_product(x, 1.702f * x, for_bfloat16);
      });
    case Pointwise::kCast:
    case Pointwise::kAdd:
      return apply([](Lanes x, bool) __attribute__((always_inline)) { return x; });
  }
}

}  // namespace
}  // namespace micromix::cpu
