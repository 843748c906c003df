// What comes before a quantise in a model, computed one row at a time: norms, activations, sums.
// What a row kernel is given, the same on every device.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "mx/layout.h"

namespace micromix {

// Rows of a tensor, `stride` elements apart. `data` is null where there is none.
struct RowInput {
  const void* data = nullptr;
  Dtype dtype = Dtype::kFloat32;
  int64_t stride = 0;
};

enum class RowFunction : int32_t { kRmsNorm, kLayerNorm, kPointwise };

// Where an RMSNorm multiplies its weight, relative to the rounding of x / rms(x).
enum class RmsForm : int32_t { kWeightAfterCast = 0, kWeightBeforeCast = 1, kOnePlusWeight = 2 };

enum class Pointwise : int32_t {
  kCast = 0,
  kRelu = 1,
  kSilu = 2,
  kGelu = 3,
  kGeluTanh = 4,
  kAdd = 5,  // x + second, no activation
  kQuickGelu = 6,
};

struct RowTask {
  RowFunction row_function = RowFunction::kPointwise;
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
  void* kept = nullptr;           // [rows, k] of `dtype`: the result itself
};

// The quantised form of the result. `order` is null for the identity.
struct RowOutput {
  mx::MixedLayout layout;
  const int32_t* order;  // [layout.channels()], -1 for padding
  uint8_t* data;
  uint8_t* scales;
};

}  // namespace micromix
