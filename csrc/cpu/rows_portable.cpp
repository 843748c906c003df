#include "rows_kernels.h"

namespace micromix::cpu {

const RowKernels kRowsPortable = {rms_norm, layer_norm, pointwise, store_row};

}  // namespace micromix::cpu
