// The small kernels beside the linear: placing a weight, adding partial sums; and what the device
// is.
#include "../cuda/no_code.h"
#include "launch.h"
#include "linear_kernel.h"

namespace micromix::blackwell {

namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads)
    mx_place(mx::MixedLayout own, PlacedWeight layout, const uint8_t* data, const uint8_t* scales,
             uint8_t* placed, int64_t n) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int64_t blocks = own.blocks();
  if (i >= n * blocks) return;
  // Neighbouring threads take the rows of a panel, which lie side by side when placed.
  const int64_t panel = i / (blocks * kPanelRows), in_panel = i % (blocks * kPanelRows);
  const int64_t rows = n - panel * kPanelRows < kPanelRows ? n - panel * kPanelRows : kPanelRows;
  place_block(layout, own.row_bytes(), blocks, data, scales, placed,
              panel * kPanelRows + in_panel % rows, in_panel / rows);
}

__global__ void __launch_bounds__(kThreads)
    mx_add_partial_sums(const __grid_constant__ LinearArguments arguments) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int64_t eights = arguments.columns / 8;
  if (i < arguments.m * eights)
    add_partial_sums(arguments, i / eights, static_cast<int>(i % eights) * 8);
}

// Tells by its attributes which atoms it was compiled with.
constexpr int kProbeNative = 64, kProbeEmulated = 32;
__global__ void __launch_bounds__(kNativeAtoms ? kProbeNative : kProbeEmulated) mx_probe() {}

unsigned grid_of(int64_t threads) {
  return static_cast<unsigned>((threads + kThreads - 1) / kThreads);
}

}  // namespace

cudaError_t launch_place(const mx::MixedLayout& layout, const uint8_t* data, const uint8_t* scales,
                         uint8_t* placed, int64_t n, cudaStream_t stream) {
  const PlacedWeight sizes(layout);
  const mx::MixedLayout own = layout.weight();
  if (const auto error = cudaMemsetAsync(placed, 0, sizes.bytes(n), stream)) return error;
  mx_place<<<grid_of(n * own.blocks()), kThreads, 0, stream>>>(own, sizes, data, scales, placed, n);
  return cudaGetLastError();
}

cudaError_t launch_add_partial_sums(const LinearArguments& arguments, cudaStream_t stream) {
  mx_add_partial_sums<<<grid_of(arguments.m * arguments.columns / 8), kThreads, 0, stream>>>(
      arguments);
  return cudaGetLastError();
}

cudaError_t find_atoms(Atoms& atoms) {
  cudaFuncAttributes attributes{};
  atoms = Atoms::kNone;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, mx_probe);
  if (cuda::has_no_code(error)) return cudaSuccess;
  if (error == cudaSuccess)
    atoms = attributes.maxThreadsPerBlock == kProbeNative ? Atoms::kNative : Atoms::kEmulated;
  return error;
}

}  // namespace micromix::blackwell
