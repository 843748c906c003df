// The row kernels, included once for each instruction set: vectors of sixteen channels, for the
// compiler to split as the including file is built. No product and sum is contracted and every
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
typedef uint16_t Halves __attribute__((vector_size(kLanes * sizeof(uint16_t))));

// Calls f(i, lanes) for the vectors of a row: channels i to i + lanes, sixteen but for the last.
template <typename F>
[[gnu::always_inline]] inline void for_each_vector(int64_t k, F f) {
  int64_t i = 0;
  for (; i + kLanes <= k; i += kLanes) f(i, kLanes);
  if (i < k) f(i, static_cast<int>(k - i));
}

[[gnu::always_inline]] inline Lanes load_floats(const float* from, int lanes) {
  Lanes v{};
  std::memcpy(&v, from, lanes * sizeof(float));
  return v;
}

// Apart from the others, whose vectors stay in registers.
[[gnu::noinline]] void from_float16(const Halves& bits, Lanes& v) {
  for (int j = 0; j < kLanes; ++j) v[j] = float16_to_float(bits[j]);
}

[[gnu::noinline]] void to_float16(const Lanes& v, Halves& bits) {
  for (int j = 0; j < kLanes; ++j) bits[j] = float_to_float16(v[j]);
}

// Vectors of a row's values; lanes beyond its end are zero.
[[gnu::always_inline]] inline Lanes load(const void* from, Dtype dtype, int64_t at, int lanes) {
  if (dtype == Dtype::kFloat32) return load_floats(static_cast<const float*>(from) + at, lanes);
  Halves bits{};
  std::memcpy(&bits, static_cast<const uint16_t*>(from) + at, lanes * sizeof(uint16_t));
  if (dtype == Dtype::kBFloat16) return (Lanes)(__builtin_convertvector(bits, Words) << 16);
  Lanes v;
  from_float16(bits, v);
  return v;
}

// Stores values that are of `dtype` already.
[[gnu::always_inline]] inline void store(Lanes v, void* to, Dtype dtype, int64_t at, int lanes) {
  if (dtype == Dtype::kFloat32) {
    std::memcpy(static_cast<float*>(to) + at, &v, lanes * sizeof(float));
    return;
  }
  Halves bits;
  if (dtype == Dtype::kBFloat16) {
    bits = __builtin_convertvector((Words)v >> 16, Halves);
  } else {
    to_float16(v, bits);
  }
  std::memcpy(static_cast<uint16_t*>(to) + at, &bits, lanes * sizeof(uint16_t));
}

[[gnu::always_inline]] inline Lanes rounded(Lanes v, Dtype dtype) {
  if (dtype == Dtype::kBFloat16) {
    const Words bits = (Words)v;
    const Words up = (bits + 0x7FFFu + ((bits >> 16) & 1u)) & 0xFFFF0000u;
    return (Lanes)(v == v ? up : Words{} + 0x7FC00000u);
  }
  if (dtype == Dtype::kFloat16) {
    Halves half;
    to_float16(v, half);
    from_float16(half, v);
  }
  return v;
}

[[gnu::always_inline]] inline float total(Lanes lanes) {
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
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
[[gnu::always_inline]] inline void load_sum(const RowTask& task, int64_t row, float* out, F f) {
  for_each_vector(task.k, [&](int64_t i, int lanes) __attribute__((always_inline)) {
    Lanes v = load(task.x.data, task.x.dtype, row * task.x.stride + i, lanes);
    if (task.second.data) {
      v += load(task.second.data, task.second.dtype, row * task.second.stride + i, lanes);
      v = rounded(v, task.x.dtype);
      store(v, task.sum, task.x.dtype, row * task.k + i, lanes);
    }
    store(v, out, Dtype::kFloat32, i, lanes);
    f(v);
  });
}

[[gnu::always_inline]] inline void rms_norm_of(const RowTask& task, int64_t row, float* out) {
  const int64_t k = task.k;
  Lanes squares{};
  load_sum(task, row, out, [&](Lanes v) __attribute__((always_inline)) { squares += v * v; });
  const float mean = total(squares) / static_cast<float>(k);
  const float factor = 1.0f / std::sqrt(mean + task.eps);
  for_each_vector(k, [&](int64_t i, int lanes) __attribute__((always_inline)) {
    Lanes v = load_floats(out + i, lanes) * factor;
    if (task.form == RmsForm::kWeightAfterCast) v = rounded(v, task.x.dtype);
    if (task.weight.data) {
      const Lanes weight = load(task.weight.data, task.weight.dtype, i, lanes);
      v *= task.form == RmsForm::kOnePlusWeight ? weight + 1.0f : weight;
    }
    store(rounded(v, task.dtype), out, Dtype::kFloat32, i, lanes);
  });
}

[[gnu::always_inline]] inline void layer_norm_of(const RowTask& task, int64_t row, float* out) {
  const int64_t k = task.k;
  Lanes sum{}, squares{};
  load_sum(task, row, out, [&](Lanes v) __attribute__((always_inline)) { sum += v; });
  const float mean = total(sum) / static_cast<float>(k);
  for_each_vector(k, [&](int64_t i, int lanes) __attribute__((always_inline)) {
    store(load_floats(out + i, lanes) - mean, out, Dtype::kFloat32, i, lanes);
    const Lanes v = load_floats(out + i, lanes);  // zero beyond the row's end
    squares += v * v;
  });
  const float variance = total(squares) / static_cast<float>(k);
  const float factor = 1.0f / std::sqrt(variance + task.eps);
  for_each_vector(k, [&](int64_t i, int lanes) __attribute__((always_inline)) {
    Lanes v = load_floats(out + i, lanes) * factor;
    if (task.weight.data) v *= load(task.weight.data, task.weight.dtype, i, lanes);
    if (task.bias.data) v += load(task.bias.data, task.bias.dtype, i, lanes);
    store(rounded(v, task.dtype), out, Dtype::kFloat32, i, lanes);
  });
}

void rms_norm(const RowTask& task, int64_t row, float* out) {
  specialised(
      task, [=](const RowTask& one) __attribute__((always_inline)) { rms_norm_of(one, row, out); });
}

void layer_norm(const RowTask& task, int64_t row, float* out) {
  specialised(task, [=](const RowTask& one)
                        __attribute__((always_inline)) { layer_norm_of(one, row, out); });
}

template <typename F>
[[gnu::always_inline]] inline void pointwise_of(const RowTask& task, int64_t row, float* out, F f) {
  for_each_vector(task.k, [&](int64_t i, int lanes) __attribute__((always_inline)) {
    Lanes v = f(load(task.x.data, task.x.dtype, row * task.x.stride + i, lanes));
    if (task.second.data) {
      const Lanes other =
          load(task.second.data, task.second.dtype, row * task.second.stride + i, lanes);
      // An activation has a value of its own in the model, of x's type.
      v = task.function == Pointwise::kAdd ? v + other : rounded(v, task.x.dtype) * other;
    }
    store(rounded(v, task.dtype), out, Dtype::kFloat32, i, lanes);
  });
}

void pointwise(const RowTask& task, int64_t row, float* out) {
  const auto apply = [&](auto f) {
    specialised(task, [=](const RowTask& one)
                          __attribute__((always_inline)) { pointwise_of(one, row, out, f); });
  };
  switch (task.function) {
    case Pointwise::kRelu:
      return apply([](Lanes x) __attribute__((always_inline)) { return x < 0.0f ? Lanes{} : x; });
    case Pointwise::kSilu:
      return apply([](Lanes x) __attribute__((always_inline)) { return silu(x); });
    case Pointwise::kGelu:
      return apply([](Lanes x) __attribute__((always_inline)) { return gelu(x); });
    case Pointwise::kGeluTanh:
      return apply([](Lanes x) __attribute__((always_inline)) { return gelu_tanh(x); });
    case Pointwise::kQuickGelu:
      return apply([](Lanes x) __attribute__((always_inline)) { return quick_gelu(x); });
    case Pointwise::kCast:
    case Pointwise::kAdd:
      return apply([](Lanes x) __attribute__((always_inline)) { return x; });
  }
}

// Stores a row whose values are of `dtype` already.
void store_row(const float* row, int64_t k, Dtype dtype, void* out, int64_t start) {
  for_each_vector(k, [&](int64_t i, int lanes) __attribute__((always_inline)) {
    store(load_floats(row + i, lanes), out, dtype, start + i, lanes);
  });
}

}  // namespace
}  // namespace micromix::cpu
