// The kernels of a row function, and the launch of one of them.
#pragma once

#include "early_launch.h"
#include "paired_rows.cuh"
#include "rows.cuh"
#include "streamed_rows.cuh"

namespace micromix::cuda {

using RowKernel = void (*)(Rows);

template <RowFunction kFunction, Types kTypes>
RowKernel kernel_of(const Rows& rows, const Launch& how) {
  if (how.placement == Placement::kDirect)
    return rows_kernel<kFunction, kTypes, Placement::kDirect>;
  if constexpr (is_narrow(kTypes)) {
    constexpr bool kNorm = kFunction != RowFunction::kPointwise;
    const bool ordered = rows.output.order != nullptr, two = rows.task.second.data != nullptr;
    // The others are faster in the direct kernel: see rows.cpp.
    if (how.placement == Placement::kPaired) {
      if (!ordered && !two) return paired_rows_kernel<kFunction, kTypes, false, false>;
      if (!kNorm || ordered)
        return two ? paired_rows_kernel<kFunction, kTypes, true, true>
                   : paired_rows_kernel<kFunction, kTypes, true, false>;
      if constexpr (kNorm) return paired_rows_kernel<kFunction, kTypes, false, true>;
    }
    if (how.placement == Placement::kStreamed) {
      if (!kNorm || ordered)
        return two ? streamed_rows_kernel<kFunction, kTypes, true, true>
                   : streamed_rows_kernel<kFunction, kTypes, true, false>;
      if constexpr (kNorm)
        return two ? streamed_rows_kernel<kFunction, kTypes, false, true>
                   : streamed_rows_kernel<kFunction, kTypes, false, false>;
    }
  }
  return rows_kernel<kFunction, kTypes, Placement::kStaged>;
}

template <RowFunction kFunction>
cudaError_t launch(const Rows& rows, const Launch& how) {
  const RowKernel kernel = [&] {
    if (how.placement == Placement::kRecomputed)
      return RowKernel{rows_kernel<kFunction, Types::kAny, Placement::kRecomputed>};
    switch (how.types) {
      case Types::kBFloat16:
        return kernel_of<kFunction, Types::kBFloat16>(rows, how);
      case Types::kFloat16:
        return kernel_of<kFunction, Types::kFloat16>(rows, how);
      case Types::kFloat32:
        return kernel_of<kFunction, Types::kFloat32>(rows, how);
      case Types::kAny:
        break;
    }
    return kernel_of<kFunction, Types::kAny>(rows, how);
  }();
  // The 48 KB that need no leave hold the kernel's own bytes too. It gets the same leave every
  // time: another thread may launch it with more.
  if (how.bytes + kOtherSharedBytes > 48 * 1024) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, how.most_bytes);
    if (error != cudaSuccess) return error;
  }
  const dim3 blocks(how.blocks, how.parts);
  return launch_early(kernel, blocks, how.threads, how.bytes, how.stream, how.early, rows);
}

}  // namespace micromix::cuda
