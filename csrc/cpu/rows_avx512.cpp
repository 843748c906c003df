#include "rows_kernels.h"

namespace micromix::cpu {

const RowKernels kRowsAvx512 = {rms_norm, layer_norm, pointwise};

}  // namespace micromix::cpu
