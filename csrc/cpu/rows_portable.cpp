#include "rows_kernels.h"

namespace micromix::cpu {

const RowKernels kRowsPortable = {rms_norm, layer_norm, pointwise};

}  // namespace micromix::cpu
