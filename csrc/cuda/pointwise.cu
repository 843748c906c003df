// A cast, an activation, its product with another value, or a sum, and its quantised forms.
#include "launch.cuh"

namespace micromix::cuda {

cudaError_t launch_pointwise(const Rows& rows, const Launch& how) {
  return launch<RowFunction::kPointwise>(rows, how);
}

}  // namespace micromix::cuda
