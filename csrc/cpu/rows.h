// Row kernels of the CPU. A kernel leaves its row, in the type that the model computes in, for a
// quantise kernel to read while it is in the first-level cache.
#pragma once

#include "../rows.h"
#include "kernels.h"

namespace micromix::cpu {

// `values` is scratch, float32 [k]; `out` is the result, [k] of the task's type.
using RowKernel = void (*)(const RowTask&, int64_t row, float* values, void* out);

struct RowKernels {
  RowKernel rms_norm, layer_norm, pointwise;

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
