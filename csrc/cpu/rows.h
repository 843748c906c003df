// What comes before a quantise in a model, one row at a time: norms, activations, sums. A kernel
// leaves its row in float32, rounded to the type that the model computes in, for a quantise kernel
// to read while it is in the first-level cache.
#pragma once

#include "kernels.h"

namespace micromix::cpu {

// Rows of a tensor, `stride` elements apart. `data` is null where there is none.
struct RowInput {
  const void* data = nullptr;
  Dtype dtype = Dtype::kFloat32;
  int64_t stride = 0;
};

// Where an RMSNorm multiplies its weight, relative to the rounding of x / rms(x).
enum class RmsForm : int64_t { kWeightAfterCast = 0, kWeightBeforeCast = 1, kOnePlusWeight = 2 };

enum class Pointwise : int64_t {
  kCast = 0,
  kRelu = 1,
  kSilu = 2,
  kGelu = 3,
  kGeluTanh = 4,
  kAdd = 5,  // x + second, no activation
  kQuickGelu = 6,
};

struct RowTask {
  int64_t k = 0;
  RowInput x;
  RowInput second;  // norms: a residual added to x first; pointwise: a factor, or what kAdd adds
  RowInput weight;  // [k], stride 0
  RowInput bias;    // [k], stride 0
  float eps = 0;
  RmsForm form = RmsForm::kWeightAfterCast;
  Pointwise function = Pointwise::kCast;
  Dtype dtype = Dtype::kFloat32;  // that the result is rounded to
  void* sum = nullptr;            // [rows, k] of x's type: x + second of a norm
};

// Bytes of scratch that a row kernel needs: two rows.
constexpr int64_t row_scratch_bytes(int64_t k) {
  return (2 * k * static_cast<int64_t>(sizeof(float)) + 63) / 64 * 64;
}

// `out` is float32 [k], `scratch` as large.
using RowKernel = void (*)(const RowTask&, int64_t row, float* out, float* scratch);

struct RowKernels {
  RowKernel rms_norm, layer_norm, pointwise;
  // Stores a row whose values are of `dtype` already, at `out[start]`.
  void (*store)(const float* row, int64_t k, Dtype dtype, void* out, int64_t start);
};

extern const RowKernels kRowsPortable;
#if defined(MICROMIX_X86)
extern const RowKernels kRowsAvx2;
extern const RowKernels kRowsAvx512;
#endif

}  // namespace micromix::cpu
