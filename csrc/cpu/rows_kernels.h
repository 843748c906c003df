// The row kernels, included once for each instruction set: the compiler vectorises these loops for
// the one that the including file is built for. No product and sum is contracted and every
// reduction has sixteen lanes, so all instruction sets give the same bits.
#pragma once

#include <cmath>
#include <cstring>

#include "convert.h"
#include "rows.h"

namespace micromix::cpu {
namespace {

constexpr int kLanes = 16;
typedef float Lanes __attribute__((vector_size(kLanes * sizeof(float))));
typedef uint32_t Words __attribute__((vector_size(kLanes * sizeof(float))));

float total(Lanes lanes) {
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}

// The sum of f(x[i]) over a row.
template <typename F>
inline float sum_of(const float* x, int64_t k, F f) {
  Lanes sum{};
  int64_t i = 0;
  for (; i + kLanes <= k; i += kLanes) {
    Lanes v;
    std::memcpy(&v, x + i, sizeof(v));
    sum += f(v);
  }
  if (i < k) {
    Lanes v{}, counted{};
    for (int j = 0; i + j < k; ++j) {
      v[j] = x[i + j];
      counted[j] = 1.0f;
    }
    sum += f(v) * counted;
  }
  return total(sum);
}

inline float round_bfloat16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000u;
  const bool nan = (bits & mx::kFloat32Magnitude) > mx::kFloat32Exponent;
  return std::bit_cast<float>(nan ? 0x7FC00000u : rounded);
}

void round_row(float* row, int64_t k, Dtype dtype) {
  if (dtype == Dtype::kBFloat16) {
    for (int64_t i = 0; i < k; ++i) row[i] = round_bfloat16(row[i]);
  } else if (dtype == Dtype::kFloat16) {
    for (int64_t i = 0; i < k; ++i) row[i] = float16_to_float(float_to_float16(row[i]));
  }
}

void load_row(const RowInput& input, int64_t row, int64_t k, float* __restrict out) {
  const int64_t start = row * input.stride;
  if (input.dtype == Dtype::kFloat32) {
    std::memcpy(out, static_cast<const float*>(input.data) + start, k * sizeof(float));
    return;
  }
  const uint16_t* const bits = static_cast<const uint16_t*>(input.data) + start;
  if (input.dtype == Dtype::kBFloat16) {
    for (int64_t i = 0; i < k; ++i) out[i] = bfloat16_to_float(bits[i]);
  } else {
    for (int64_t i = 0; i < k; ++i) out[i] = float16_to_float(bits[i]);
  }
}

// Stores a row whose values are of `dtype` already.
void store_row(const float* __restrict row, int64_t k, Dtype dtype, void* out, int64_t start) {
  if (dtype == Dtype::kFloat32) {
    std::memcpy(static_cast<float*>(out) + start, row, k * sizeof(float));
    return;
  }
  uint16_t* const bits = static_cast<uint16_t*>(out) + start;
  if (dtype == Dtype::kBFloat16) {
    for (int64_t i = 0; i < k; ++i)
      bits[i] = static_cast<uint16_t>(std::bit_cast<uint32_t>(row[i]) >> 16);
  } else {
    for (int64_t i = 0; i < k; ++i) bits[i] = float_to_float16(row[i]);
  }
}

// e^x to 2 units in the last place; below 2^-126 it is that, above 2^127 about that.
inline Lanes exponential(Lanes x) {
  x = x < -87.33f ? -87.33f : x;
  x = x > 88.37f ? 88.37f : x;
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

inline Lanes silu(Lanes x) { return x / (1.0f + exponential(-x)); }

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

// 0.5 (1 + tanh u) is the logistic function of 2 u.
inline Lanes gelu_tanh(Lanes x) {
  const Lanes u = 0.79788456f * (x + 0.044715f * (x * x * x));
  return x / (1.0f + exponential(-2.0f * u));
}

// x times the logistic function of 1.702 x: CLIP's activation.
inline Lanes quick_gelu(Lanes x) { return x / (1.0f + exponential(-1.702f * x)); }

// x, or x + residual rounded to x's type and stored.
void load_sum(const RowTask& task, int64_t row, float* out, float* scratch) {
  load_row(task.x, row, task.k, out);
  if (!task.second.data) return;
  load_row(task.second, row, task.k, scratch);
  for (int64_t i = 0; i < task.k; ++i) out[i] += scratch[i];
  round_row(out, task.k, task.x.dtype);
  store_row(out, task.k, task.x.dtype, task.sum, row * task.k);
}

void rms_norm(const RowTask& task, int64_t row, float* out, float* scratch) {
  const int64_t k = task.k;
  load_sum(task, row, out, scratch);
  const float mean = sum_of(out, k, [](Lanes v) { return v * v; }) / static_cast<float>(k);
  const float factor = 1.0f / std::sqrt(mean + task.eps);
  for (int64_t i = 0; i < k; ++i) out[i] *= factor;
  if (task.form == RmsForm::kWeightAfterCast) round_row(out, k, task.x.dtype);
  if (task.weight.data) {
    load_row(task.weight, 0, k, scratch);
    if (task.form == RmsForm::kOnePlusWeight)
      for (int64_t i = 0; i < k; ++i) scratch[i] += 1.0f;
    for (int64_t i = 0; i < k; ++i) out[i] *= scratch[i];
  }
  round_row(out, k, task.dtype);
}

void layer_norm(const RowTask& task, int64_t row, float* out, float* scratch) {
  const int64_t k = task.k;
  load_sum(task, row, out, scratch);
  const float mean = sum_of(out, k, [](Lanes v) { return v; }) / static_cast<float>(k);
  for (int64_t i = 0; i < k; ++i) out[i] -= mean;
  const float variance = sum_of(out, k, [](Lanes v) { return v * v; }) / static_cast<float>(k);
  const float factor = 1.0f / std::sqrt(variance + task.eps);
  for (int64_t i = 0; i < k; ++i) out[i] *= factor;
  if (task.weight.data) {
    load_row(task.weight, 0, k, scratch);
    for (int64_t i = 0; i < k; ++i) out[i] *= scratch[i];
  }
  if (task.bias.data) {
    load_row(task.bias, 0, k, scratch);
    for (int64_t i = 0; i < k; ++i) out[i] += scratch[i];
  }
  round_row(out, k, task.dtype);
}

// f of each value of a row, in place, sixteen at a time.
template <typename F>
inline void apply(float* row, int64_t k, F f) {
  Lanes v;
  int64_t i = 0;
  for (; i + kLanes <= k; i += kLanes) {
    std::memcpy(&v, row + i, sizeof(v));
    v = f(v);
    std::memcpy(row + i, &v, sizeof(v));
  }
  if (i < k) {
    v = Lanes{};
    std::memcpy(&v, row + i, (k - i) * sizeof(float));
    v = f(v);
    std::memcpy(row + i, &v, (k - i) * sizeof(float));
  }
}

void pointwise(const RowTask& task, int64_t row, float* out, float* scratch) {
  const int64_t k = task.k;
  load_row(task.x, row, k, out);
  switch (task.function) {
    case Pointwise::kRelu:
      apply(out, k, [](Lanes x) { return x < 0.0f ? Lanes{} : x; });
      break;
    case Pointwise::kSilu:
      apply(out, k, [](Lanes x) { return silu(x); });
      break;
    case Pointwise::kGelu:
      apply(out, k, [](Lanes x) { return gelu(x); });
      break;
    case Pointwise::kGeluTanh:
      apply(out, k, [](Lanes x) { return gelu_tanh(x); });
      break;
    case Pointwise::kQuickGelu:
      apply(out, k, [](Lanes x) { return quick_gelu(x); });
      break;
    case Pointwise::kCast:
    case Pointwise::kAdd:
      break;
  }
  if (task.second.data) {
    load_row(task.second, row, k, scratch);
    if (task.function == Pointwise::kAdd) {
      for (int64_t i = 0; i < k; ++i) out[i] += scratch[i];
    } else {
      // An activation has a value of its own in the model, of x's type.
      round_row(out, k, task.x.dtype);
      for (int64_t i = 0; i < k; ++i) out[i] *= scratch[i];
    }
  }
  round_row(out, k, task.dtype);
}

}  // namespace
}  // namespace micromix::cpu
