// An RMSNorm, of x or of x + residual, and its quantised forms.
#include "launch.cuh"

namespace micromix::cuda {

cudaError_t launch_rms_norm(const Rows& rows, const Launch& how) {
  return launch<RowFunction::kRmsNorm>(rows, how);
}

}  // namespace micromix::cuda
