// A cast, an activation, its product with another value, or a sum, and its quantised forms.
#include "launch.cuh"

namespace micromix::cuda {

cudaError_t launch_pointwise(const Rows& rows, const Launch& how) {
  return launch<RowFunction::kPointwise>(rows, how);
}

// Not the device's: it may have compiled the code itself, from that for another.
cudaError_t architecture_of_rows(int& architecture) {
  cudaFuncAttributes attributes{};
  const cudaError_t error = cudaFuncGetAttributes(
      &attributes, rows_kernel<RowFunction::kPointwise, Types::kAny, Placement::kDirect>);
  architecture = attributes.ptxVersion;
  return error;
}

}  // namespace micromix::cuda
