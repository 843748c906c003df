// A LayerNorm, of x or of x + residual, and its quantised forms.
#include "launch.cuh"

namespace micromix::cuda {

cudaError_t launch_layer_norm(const Rows& rows, const Launch& how) {
  return launch<RowFunction::kLayerNorm>(rows, how);
}

}  // namespace micromix::cuda
