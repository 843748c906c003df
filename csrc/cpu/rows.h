// Row kernels of the CPU. A kernel leaves its row in float32, rounded to the type that the model
// computes in, for a quantise kernel to read while it is in the first-level cache.
#pragma once

#include "../rows.h"
#include "kernels.h"

namespace micromix::cpu {

// Bytes of a row in float32, in whole cache lines.
constexpr int64_t row_scratch_bytes(int64_t k) {
  return (k * static_cast<int64_t>(sizeof(float)) + 63) / 64 * 64;
}

// `out` is float32 [k].
using RowKernel = void (*)(const RowTask&, int64_t row, float* out);

struct RowKernels {
  RowKernel rms_norm, layer_norm, pointwise;
  // Stores a row whose values are of `dtype` already, at `out[start]`.
  void (*store)(const float* row, int64_t k, Dtype dtype, void* out, int64_t start);

  RowKernel of(RowFunction function) const {
    return function == RowFunction::kRmsNorm     ? rms_norm
           : function == RowFunction::kLayerNorm ? layer_norm
                                                 : pointwise;
  }
};

extern const RowKernels kRowsPortable;
#if defined(MICROMIX_X86)
extern const RowKernels kRowsAvx2;
extern const RowKernels kRowsAvx512;
#endif

}  // namespace micromix::cpu
