// Float rows to bfloat16 operands, in the order of a weight's channels: the activations of
// weight-only products. Each has the scale of one.
#include "decode.cuh"
#include "early_launch.h"
#include "quantize_group.cuh"

namespace micromix::cuda {
namespace {

constexpr int kThreads = 128,
              kTogether = 8;            // thread blocks that a multiprocessor has registers for
constexpr int kMostStaged = 48 * 1024;  // bytes of a row in shared memory
constexpr uint32_t kNans = 0x7FFF7FFF;
constexpr uint8_t kScaleOfOne = mx::kFloat32Bias;

// A row where the kernel's threads read it: in memory, or, if it is gathered from, in shared
// memory.
template <bool kStaged>
struct RowOfFloats {
  const FloatRows& rows;
  const void* data;

  __device__ __forceinline__ RowOfFloats(const FloatRows& rows, int64_t row, char* shared)
      : rows(rows), data(element(rows.data, rows.dtype, row * rows.k)) {
    if constexpr (kStaged) {
      const int bytes = rows.k * (rows.dtype == Dtype::kFloat32 ? 4 : 2);
      const auto* const from = static_cast<const char*>(data);
      if (reinterpret_cast<uintptr_t>(from) % 16 == 0 && bytes % 16 == 0) {
        for (int i = 16 * threadIdx.x; i < bytes; i += 16 * kThreads)
          *reinterpret_cast<uint4*>(shared + i) = __ldg(reinterpret_cast<const uint4*>(from + i));
      } else {
        for (int i = 2 * threadIdx.x; i < bytes; i += 2 * kThreads)
          *reinterpret_cast<uint16_t*>(shared + i) =
              __ldg(reinterpret_cast<const uint16_t*>(from + i));
      }
      data = shared;
      __syncthreads();
    }
  }
  __device__ __forceinline__ float channel(int i) const {
    if constexpr (!kStaged) return load_one(data, rows.dtype, i);
    const void* const from = element(data, rows.dtype, i);
    if (rows.dtype == Dtype::kFloat32) return *static_cast<const float*>(from);
    return widen(*static_cast<const uint16_t*>(from), rows.dtype == Dtype::kBFloat16);
  }
  // Positions [at, at + 8) of the order; zeros where nothing is.
  __device__ __forceinline__ Values<8> gathered(int at) const {
    const auto* const order = reinterpret_cast<const int4*>(rows.order + at);
    const int4 low = __ldg(order), high = __ldg(order + 1);
    const int channels[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
    Values<8> y;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const bool there = static_cast<unsigned>(channels[i]) < static_cast<unsigned>(rows.k);
      // A channel that cannot be is NaN, as in every kernel here that gathers.
      y.v[i] = there               ? channel(channels[i])
               : channels[i] == -1 ? 0.0f
                                   : __uint_as_float(0x7FFFFFFF);
    }
    return y;
  }
  __device__ __forceinline__ Values<8> neighbours(int at) const {
    Values<8> y;
#pragma unroll
    for (int i = 0; i < 8; ++i) y.v[i] = at + i < rows.k ? channel(at + i) : 0.0f;
    return y;
  }
  // The same of 16-bit numbers that are all there and aligned.
  __device__ __forceinline__ Values<8> aligned_neighbours(int at) const {
    return load_aligned<8>(data, rows.dtype, at);
  }
};

// Group g of a block as operands, if it is `there`, else zeros. All threads of a warp call it; four
// of them have a block.
template <bool kStaged>
__device__ __forceinline__ Eight operands_of(const RowOfFloats<kStaged>& row, bool there, int block,
                                             int g) {
  const FloatRows& rows = row.rows;
  const int at = mx::kBlock * block + 8 * g;
  Values<8> y{};
  if (there) {
    if (kStaged || rows.order != nullptr) {
      y = row.gathered(at);
    } else if (rows.dtype != Dtype::kFloat32 && rows.k % 8 == 0 && at < rows.k &&
               reinterpret_cast<uintptr_t>(row.data) % 16 == 0) {
      y = row.aligned_neighbours(at);
    } else {
      y = row.neighbours(at);
    }
  }
  if (rows.rotated != 0) {
    const Values<8> turned = rotated<8>(y);
    if (rows.rotated >> ((block >= rows.end4) + (block >= rows.end6)) & 1) y = turned;
  }
  const Pairs<8> pairs = pack_pairs(y, true);
  Eight x{pairs.word[0], pairs.word[1], pairs.word[2], pairs.word[3]};
  // All of a block that has an infinity or NaN is NaN.
  const auto extreme = [](uint32_t two) {
    return (two & 0x7F80) == 0x7F80 || (two & 0x7F800000) == 0x7F800000;
  };
  int bad = extreme(x.x) | extreme(x.y) | extreme(x.z) | extreme(x.w);
  bad |= __shfl_xor_sync(kWarp, bad, 1);
  bad |= __shfl_xor_sync(kWarp, bad, 2);
  if (bad) x = {kNans, kNans, kNans, kNans};
  return x;
}

__device__ __forceinline__ void leave_scale(uint8_t* largest) {
  if (threadIdx.x == 0 && blockIdx.y == 0) largest[blockIdx.x] = kScaleOfOne;
}

// As decode_rows_kernel of decode.cu. Whole warps stay in the loop.
template <bool kStaged>
__global__ void __launch_bounds__(kThreads, kTogether)
    float_rows_kernel(const FloatRows rows, uint4* values, uint8_t* largest) {
  extern __shared__ __align__(16) char shared[];
  wait_for_the_kernel_before();
  let_the_next_kernel_start();
  const RowOfFloats<kStaged> row(rows, blockIdx.x, shared);
  leave_scale(largest);
  const int groups = rows.blocks * kGroups;
  for (int first = blockIdx.y * kThreads; first < groups; first += gridDim.y * kThreads) {
    const int at = first + threadIdx.x;
    const Eight x = operands_of(row, at < groups, at / kGroups, at % kGroups);
    if (at < groups) values[int64_t{blockIdx.x} * groups + at] = x;
  }
}

// As decode_tiles_kernel of decode.cu.
template <bool kStaged>
__global__ void __launch_bounds__(kThreads, kTogether)
    float_tiles_kernel(const FloatRows rows, const Steps steps, int64_t padded, uint4* tiles,
                       uint8_t* largest) {
  extern __shared__ __align__(16) char shared[];
  wait_for_the_kernel_before();
  let_the_next_kernel_start();
  const RowOfFloats<kStaged> row(rows, blockIdx.x, shared);
  leave_scale(largest);
  const int groups = steps.count() * kGroups;
  for (int begin = blockIdx.y * kThreads; begin < groups; begin += gridDim.y * kThreads) {
    const int at = begin + threadIdx.x, step = at / kGroups, g = at % kGroups;
    const bool there = at < groups;
    const auto [first, last] = steps.blocks_of(step);
    Eight of_blocks[kStepBlocks];
#pragma unroll
    for (int i = 0; i < kStepBlocks; ++i)
      of_blocks[i] = operands_of(row, there && first + i < last, first + i, g);
    if (there) store_tile_group(tiles, padded, blockIdx.x, step, g, of_blocks);
  }
}

struct Shape {
  dim3 grid;
  unsigned bytes;  // of shared memory
  bool staged;
};

// A thread block stages a row of many that are gathered from; otherwise some share out a row.
Shape shape_of(const FloatRows& rows, int groups) {
  const int64_t bytes = int64_t{rows.k} * (rows.dtype == Dtype::kFloat32 ? 4 : 2);
  const bool staged = rows.order != nullptr && rows.rows > kFewRows && bytes <= kMostStaged;
  const unsigned shares = staged || groups == 0 ? 1 : (groups + kThreads - 1) / kThreads;
  return {{static_cast<unsigned>(rows.rows), shares, 1},
          staged ? static_cast<unsigned>(bytes) : 0,
          staged};
}

}  // namespace

cudaError_t launch_decode(const FloatRows& rows, void* values, uint8_t* largest,
                          const Launcher& on) {
  const Shape shape = shape_of(rows, rows.blocks * kGroups);
  const auto run = shape.staged ? float_rows_kernel<true> : float_rows_kernel<false>;
  return launch_early(run, shape.grid, kThreads, shape.bytes, on.stream, on.early, rows,
                      static_cast<uint4*>(values), largest);
}

cudaError_t launch_decode_tiles(const FloatRows& rows, const Steps& steps, void* tiles,
                                uint8_t* largest, const Launcher& on) {
  const Shape shape = shape_of(rows, steps.count() * kGroups);
  const auto run = shape.staged ? float_tiles_kernel<true> : float_tiles_kernel<false>;
  return launch_early(run, shape.grid, kThreads, shape.bytes, on.stream, on.early, rows, steps,
                      padded_rows(rows.rows), static_cast<uint4*>(tiles), largest);
}

}  // namespace micromix::cuda
