// The row kernel: one thread block computes a row and quantises it for every output.
//
// A thread has eight neighbouring channels at a time, four neighbouring threads a block of 32. A
// row is read from memory once. It waits in shared memory where it is needed twice: by a norm,
// between its sum and its values, and by an order, which gathers from it. An output without an
// order is quantised from registers. A row that is too long for shared memory is computed again
// from global memory where it is needed (kStaged = false).
#pragma once

#include <type_traits>

#include "activations.cuh"
#include "vectors.cuh"

namespace micromix::cuda {

constexpr int kMaxThreads = 1024;
constexpr int kTogether = 2;  // groups whose loads a thread has in flight
constexpr unsigned kWarp = 0xFFFFFFFF;

__device__ __forceinline__ float largest(float a, float b) {  // NaN if one of them is
  float c;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(c) : "f"(a), "f"(b));
  return c;
}

// Quantises eight values of one row at position 8 * group of an output. All threads of a warp call
// it, with neighbouring groups.
template <bool kBFloat16>
__device__ __forceinline__ void quantize_group(const Output& out, int64_t row, int group,
                                               const Eight& y) {
  float amax = fabsf(y.v[0]);
#pragma unroll
  for (int i = 1; i < 8; ++i) amax = largest(amax, fabsf(y.v[i]));
  amax = largest(amax, __shfl_xor_sync(kWarp, amax, 1));
  amax = largest(amax, __shfl_xor_sync(kWarp, amax, 2));

  const int block = group / 4, part = group % 4;
  const uint32_t bits = __float_as_uint(amax) & mx::kFloat32Magnitude;
  uint64_t codes;
  uint8_t byte;
  if (block < out.end4) {
    byte = mx::scale_byte(bits, out.increment4, mx::E2M1.emax);
    codes = encode<mx::E2M1, kBFloat16>(y, amax, byte);
  } else if (block >= out.end6) {
    byte = mx::scale_byte(bits, out.increment8, mx::E4M3.emax);
    codes = encode<mx::E4M3, kBFloat16>(y, amax, byte);
  } else if (out.e3m2) {
    byte = mx::scale_byte(bits, out.increment6, mx::E3M2.emax);
    codes = encode<mx::E3M2, kBFloat16>(y, amax, byte);
  } else {
    byte = mx::scale_byte(bits, out.increment6, mx::E2M3.emax);
    codes = encode<mx::E2M3, kBFloat16>(y, amax, byte);
  }
  if (byte == mx::kNanScale) codes = 0;

  // The 24 bytes of a block of MXFP6 are stored by its first three threads, with the codes of the
  // next thread after their own.
  uint64_t next = 0;
  if (out.end6 > out.end4) next = __shfl_down_sync(kWarp, codes, 1);
  if (block >= out.blocks) return;
  uint8_t* const data = out.data + row * out.row_bytes;
  if (block < out.end4) {
    *reinterpret_cast<uint32_t*>(data + 4 * group) = static_cast<uint32_t>(codes);
  } else if (block >= out.end6) {
    *reinterpret_cast<uint64_t*>(data + out.start8 + 8 * (group - 4 * out.end6)) = codes;
  } else if (part < 3) {
    *reinterpret_cast<uint64_t*>(data + out.start6 + 24 * (block - out.end4) + 8 * part) =
        (codes >> (16 * part)) | (next << (48 - 16 * part));
  }
  if (part == 0) out.scales[row * out.blocks + block] = byte;
}

// The sum over a thread block, the same in every thread; always in the same order.
__device__ __forceinline__ float block_sum(float x) {
  __shared__ float of_warp[32];
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) x += __shfl_xor_sync(kWarp, x, lanes);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  __syncthreads();  // the sum before this one has been read
  if (lane == 0) of_warp[warp] = x;
  __syncthreads();
  x = lane < static_cast<int>(blockDim.x) / 32 ? of_warp[lane] : 0.0f;
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) x += __shfl_xor_sync(kWarp, x, lanes);
  return x;
}

struct Statistics {
  float mean, factor;
};

// What a row function makes of eight channels: of x (of a norm: x + residual), the other operand,
// and the norm's vectors. Not rounded to the result's type.
template <RowFunction kFunction, Types kTypes>
__device__ __forceinline__ Eight finish(const RowTask& task, Eight y, const Eight& second,
                                        const Eight& weight, const Eight& bias,
                                        const Statistics& of_row) {
  const Dtype x_type = type_of<kTypes>(task.x.dtype);
  if constexpr (kFunction == RowFunction::kPointwise) {
    activate(task.function, y);
    if (task.second.data == nullptr) return y;
    if (task.function == Pointwise::kAdd) {
#pragma unroll
      for (int i = 0; i < 8; ++i) y.v[i] += second.v[i];
      return y;
    }
    // An activation has a value of its own in the model, of x's type.
    if (task.function != Pointwise::kCast) y = rounded(y, x_type);
#pragma unroll
    for (int i = 0; i < 8; ++i) y.v[i] *= second.v[i];
  } else if constexpr (kFunction == RowFunction::kRmsNorm) {
#pragma unroll
    for (int i = 0; i < 8; ++i) y.v[i] *= of_row.factor;
    if (task.form == RmsForm::kWeightAfterCast) y = rounded(y, x_type);
    if (task.weight.data == nullptr) return y;
    const bool plus_one = task.form == RmsForm::kOnePlusWeight;
#pragma unroll
    for (int i = 0; i < 8; ++i) y.v[i] *= plus_one ? weight.v[i] + 1.0f : weight.v[i];
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) y.v[i] = (y.v[i] - of_row.mean) * of_row.factor;
    if (task.weight.data != nullptr) {
#pragma unroll
      for (int i = 0; i < 8; ++i) y.v[i] *= weight.v[i];
    }
    if (task.bias.data != nullptr) {
#pragma unroll
      for (int i = 0; i < 8; ++i) y.v[i] += bias.v[i];
    }
  }
  return y;
}

// x + residual, rounded to x's type, as the model has it.
template <Types kTypes>
__device__ __forceinline__ Eight with_residual(const RowTask& task, Eight x, const Eight& second) {
  if (task.second.data == nullptr) return x;
#pragma unroll
  for (int i = 0; i < 8; ++i) x.v[i] += second.v[i];
  return rounded(x, type_of<kTypes>(task.x.dtype));
}

// One row, as a thread sees it.
template <RowFunction kFunction, Types kTypes, bool kStaged>
struct Row {
  static constexpr bool kNorm = kFunction != RowFunction::kPointwise;
  using Slot = std::conditional_t<is_narrow(kTypes), uint16_t, float>;

  const Rows& rows;
  const RowTask& task;
  const int k;
  const int64_t row, x_start, second_start;
  Slot* const slots;

  __device__ Row(const Rows& rows, void* shared)
      : rows(rows),
        task(rows.task),
        k(rows.k),
        row(blockIdx.x),
        x_start(row * task.x.stride),
        second_start(row * task.second.stride),
        slots(static_cast<Slot*>(shared) + kFirstSlot) {}

  __device__ bool has(int group) const { return 8 * group < k; }

  __device__ Raw<kTypes> load_x(int group) const {
    return load_eight<kTypes>(task.x.data, task.x.dtype, x_start, 8 * group, k, rows.x_aligned);
  }
  __device__ Raw<kTypes> load_second(int group) const {
    if (task.second.data == nullptr || !has(group)) return {};
    return load_eight<kTypes>(task.second.data, task.second.dtype, second_start, 8 * group, k,
                              rows.second_aligned);
  }

  __device__ Eight staged(int group) const {
    const uint4* const from = reinterpret_cast<const uint4*>(slots + 8 * group);
    if constexpr (is_narrow(kTypes)) {
      return unpack(*from, kTypes == Types::kBFloat16);
    } else {
      const uint4 low = from[0], high = from[1];
      return {__uint_as_float(low.x),  __uint_as_float(low.y),  __uint_as_float(low.z),
              __uint_as_float(low.w),  __uint_as_float(high.x), __uint_as_float(high.y),
              __uint_as_float(high.z), __uint_as_float(high.w)};
    }
  }
  __device__ void stage(int group, const Eight& x) const {
    uint4* const to = reinterpret_cast<uint4*>(slots + 8 * group);
    if constexpr (is_narrow(kTypes)) {
      *to = pack(x, kTypes == Types::kBFloat16);
    } else {
      to[0] = {__float_as_uint(x.v[0]), __float_as_uint(x.v[1]), __float_as_uint(x.v[2]),
               __float_as_uint(x.v[3])};
      to[1] = {__float_as_uint(x.v[4]), __float_as_uint(x.v[5]), __float_as_uint(x.v[6]),
               __float_as_uint(x.v[7])};
    }
  }
  __device__ float at_slot(int slot) const {
    if constexpr (is_narrow(kTypes)) {
      return widen(slots[slot], kTypes == Types::kBFloat16);
    } else {
      return slots[slot];
    }
  }

  // f(group, x, second) for this thread's groups among the first `groups`; loads of several groups
  // are in flight together. All threads of the block make the same number of calls.
  template <typename F>
  __device__ void for_loaded(int groups, const F& f) const {
    for (int first = 0; first < groups; first += kTogether * blockDim.x) {
      Raw<kTypes> x[kTogether], second[kTogether];
#pragma unroll
      for (int j = 0; j < kTogether; ++j) {
        const int group = first + j * blockDim.x + threadIdx.x;
        x[j] = has(group) ? load_x(group) : Raw<kTypes>{};
        second[j] = load_second(group);
      }
#pragma unroll
      for (int j = 0; j < kTogether; ++j)
        if (first + j * static_cast<int>(blockDim.x) < groups)
          f(first + j * blockDim.x + threadIdx.x, x[j].values(), second[j].values());
    }
  }

  // f(group, x + residual) for this thread's groups of a norm, from where they wait.
  template <typename F>
  __device__ void for_waiting(int groups, const F& f) const {
    if constexpr (kStaged) {
      for (int first = 0; first < groups; first += blockDim.x) {
        const int group = first + threadIdx.x;
        f(group, has(group) ? staged(group) : Eight{});
      }
    } else {
      for_loaded(groups, [&](int group, const Eight& x, const Eight& second) {
        f(group, with_residual<kTypes>(task, x, second));
      });
    }
  }

  // Reads the row of a norm, stores its sum with the residual, and leaves it where it waits.
  __device__ Statistics statistics() const {
    const int groups = (k + 7) / 8;
    float sum = 0.0f;
    for_loaded(groups, [&](int group, const Eight& x, const Eight& second) {
      if (!has(group)) return;
      const Eight y = with_residual<kTypes>(task, x, second);
      if (task.sum != nullptr)
        store_eight(task.sum, type_of<kTypes>(task.x.dtype), row * k, 8 * group, k,
                    rows.sum_aligned, y);
      if constexpr (kStaged) stage(group, y);
#pragma unroll
      for (int i = 0; i < 8; ++i)
        sum += kFunction == RowFunction::kRmsNorm ? y.v[i] * y.v[i] : y.v[i];
    });
    const float mean = block_sum(sum) / static_cast<float>(k);
    if constexpr (kFunction == RowFunction::kRmsNorm) {
      return {0.0f, 1.0f / sqrtf(mean + task.eps)};
    } else {
      float squares = 0.0f;
      for_waiting(groups, [&](int group, const Eight& y) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const float d = 8 * group + i < k ? y.v[i] - mean : 0.0f;
          squares += d * d;
        }
      });
      const float variance = block_sum(squares) / static_cast<float>(k);
      return {mean, 1.0f / sqrtf(variance + task.eps)};
    }
  }

  // Rounds a group of the result, stores it where it is kept, quantises it for the outputs without
  // an order, and stages it for those with one.
  __device__ void emit(int group, Eight y) const {
    const Dtype dtype = type_of<kTypes>(task.dtype);
    y = rounded(y, dtype);
    if (task.kept != nullptr && has(group))
      store_eight(task.kept, dtype, row * k, 8 * group, k, rows.kept_aligned, y);
    if (8 * group + 8 > k) {
#pragma unroll
      for (int i = 0; i < 8; ++i)
        if (8 * group + i >= k) y.v[i] = 0.0f;
    }
    for (int o = 0; o < rows.outputs; ++o)
      if (rows.output[o].order == nullptr)
        quantize_group<kTypes == Types::kBFloat16>(rows.output[o], row, group, y);
    if (kStaged && rows.ordered && has(group)) {
      if (8 * group + 8 > k) {
#pragma unroll
        for (int i = 0; i < 8; ++i)
          if (8 * group + i >= k) y.v[i] = __uint_as_float(0x7FC00000);
      }
      stage(group, y);
    }
  }

  // Eight channels of the result anywhere in the row; -1 is 0, and what is out of range NaN.
  __device__ Eight gathered(const int (&channels)[8], const Statistics& of_row) const {
    Eight y;
    if constexpr (kStaged) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const unsigned position = static_cast<unsigned>(channels[i]) + 1u;
        y.v[i] = at_slot(static_cast<int>(min(position, static_cast<unsigned>(k) + 1u)) - 1);
      }
      return y;
    } else {
      const auto read = [&](const RowInput& from, int64_t start) {
        Eight x{};
        if (from.data == nullptr) return x;
        for (int i = 0; i < 8; ++i)
          if (channels[i] >= 0 && channels[i] < k)
            x.v[i] = load_one(from.data, from.dtype, start + channels[i]);
        return x;
      };
      Eight x = read(task.x, x_start);
      const Eight second = read(task.second, second_start);
      if constexpr (kNorm) x = with_residual<kTypes>(task, x, second);
      y = finish<kFunction, kTypes>(task, x, second, read(task.weight, 0), read(task.bias, 0),
                                    of_row);
      y = rounded(y, task.dtype);
#pragma unroll
      for (int i = 0; i < 8; ++i)
        if (channels[i] < 0 || channels[i] >= k)
          y.v[i] = channels[i] == -1 ? 0.0f : __uint_as_float(0x7FC00000);
      return y;
    }
  }

  __device__ void quantize_in_order(const Output& out, const Statistics& of_row) const {
    const int groups = 4 * out.blocks;
    for (int first = 0; first < groups; first += blockDim.x) {
      const int group = first + threadIdx.x;
      int channels[8] = {-1, -1, -1, -1, -1, -1, -1, -1};
      if (group < groups) {
        if (out.order_aligned) {
          const int4* const from = reinterpret_cast<const int4*>(out.order) + 2 * group;
          const int4 low = __ldg(from), high = __ldg(from + 1);
          channels[0] = low.x, channels[1] = low.y, channels[2] = low.z, channels[3] = low.w;
          channels[4] = high.x, channels[5] = high.y, channels[6] = high.z, channels[7] = high.w;
        } else {
#pragma unroll
          for (int i = 0; i < 8; ++i) channels[i] = __ldg(out.order + 8 * group + i);
        }
      }
      quantize_group<kTypes == Types::kBFloat16>(out, row, group, gathered(channels, of_row));
    }
  }

  __device__ void compute() const {
    Statistics of_row{};
    if constexpr (kNorm) {
      of_row = statistics();
      for_waiting(rows.groups, [&](int group, const Eight& x) {
        Eight weight{}, bias{};
        if (task.weight.data != nullptr && has(group))
          weight = load_vector(task.weight, 8 * group, k, rows.weight_aligned);
        if (task.bias.data != nullptr && has(group))
          bias = load_vector(task.bias, 8 * group, k, rows.bias_aligned);
        emit(group, finish<kFunction, kTypes>(task, x, {}, weight, bias, of_row));
      });
    } else {
      for_loaded(rows.groups, [&](int group, const Eight& x, const Eight& second) {
        emit(group, finish<kFunction, kTypes>(task, x, second, {}, {}, of_row));
      });
    }
    if (!rows.ordered) return;
    if constexpr (kStaged) {
      if (threadIdx.x == 0) {
        const Eight nan = {__uint_as_float(0x7FC00000)};
        slots[-1] = 0;
        if (k % 8 == 0) stage(k / 8, nan);
      }
      __syncthreads();
    }
    for (int o = 0; o < rows.outputs; ++o)
      if (rows.output[o].order != nullptr) quantize_in_order(rows.output[o], of_row);
  }
};

template <RowFunction kFunction, Types kTypes, bool kStaged>
__global__ void __launch_bounds__(kMaxThreads, 1) rows_kernel(const __grid_constant__ Rows rows) {
  extern __shared__ uint4 shared[];
  Row<kFunction, kTypes, kStaged>(rows, shared).compute();
}

template <RowFunction kFunction>
cudaError_t launch(const Rows& rows, const Launch& launch) {
  void (*kernel)(Rows) = rows_kernel<kFunction, Types::kAny, false>;
  if (launch.staged) {
    kernel = launch.types == Types::kBFloat16  ? rows_kernel<kFunction, Types::kBFloat16, true>
             : launch.types == Types::kFloat16 ? rows_kernel<kFunction, Types::kFloat16, true>
             : launch.types == Types::kFloat32 ? rows_kernel<kFunction, Types::kFloat32, true>
                                               : rows_kernel<kFunction, Types::kAny, true>;
  }
  if (launch.bytes > 48 * 1024) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, launch.bytes);
    if (error != cudaSuccess) return error;
  }
  kernel<<<launch.rows, launch.threads, launch.bytes, launch.stream>>>(rows);
  return cudaGetLastError();
}

}  // namespace micromix::cuda
