// What linear.cpp calls of the files that nvcc compiles.
#pragma once

#include <cuda_runtime_api.h>

#include "heuristic.h"

namespace micromix::blackwell {

// The linear kernels of one MXFP6 format and one kind of weight, by tile.
cudaError_t launch_e2m3(TileId, const LinearArguments&, int column_tiles, cudaStream_t);
cudaError_t launch_e3m2(TileId, const LinearArguments&, int column_tiles, cudaStream_t);
cudaError_t launch_e2m3_mxfp4(TileId, const LinearArguments&, int column_tiles, cudaStream_t);
cudaError_t launch_e3m2_mxfp4(TileId, const LinearArguments&, int column_tiles, cudaStream_t);

cudaError_t launch_add_partial_sums(const LinearArguments&, cudaStream_t);
cudaError_t launch_place(const mx::MixedLayout&, const uint8_t* data, const uint8_t* scales,
                         uint8_t* placed, int64_t n, cudaStream_t);

// Whether the current device runs the native atoms, or could run those in software.
enum class Atoms : int { kNone, kEmulated, kNative };
cudaError_t find_atoms(Atoms& atoms);

}  // namespace micromix::blackwell
