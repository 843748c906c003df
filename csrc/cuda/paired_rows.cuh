// The row kernel for many short regular rows of a 16-bit type: thread blocks that stay, and take
// two rows at a time.
//
// A thread has eight channels of both rows, which it loads while the two rows before them are
// worked on. A norm's sums, a row function's values and their rounding happen in registers, the
// channels in their order. For an order the results go to shared memory side by side, the two
// values of a channel in a word, and come back from there by one gather for both rows. Then they
// are quantised together, one row in either half of a word.
#pragma once

#include "quantize_pair.cuh"
#include "row_functions.cuh"

namespace micromix::cuda {

template <RowFunction kFunction, Types kTypes, bool kOrdered, bool kTwo>
struct PairedRows {
  static constexpr bool kNorm = kFunction != RowFunction::kPointwise;
  static constexpr bool kLayerNorm = kFunction == RowFunction::kLayerNorm;
  static constexpr bool kBFloat16 = kTypes == Types::kBFloat16;
  static constexpr int kRows = 2, kGroup = kPairedGroup, kWords = kGroup / 2,
                       kWarps = kPairedThreads / 32;
  static constexpr uint32_t kNoChannel = 0xFFFFFFFF;
  static_assert(is_narrow(kTypes) && kWarps == 16);
  using Words = uint32_t[kRows][kWords];
  // Where the compiler has registers for it, the next rows are loaded ahead, and a weight stays.
#if __CUDA_ARCH__ == 900
  static constexpr bool kAhead = kBFloat16 && !(kLayerNorm && kTwo);
#else
  static constexpr bool kAhead = false;
#endif
  static constexpr bool kSecondAhead = kAhead && kTwo && !kNorm;
  static constexpr bool kKeepsVectors = kFunction == RowFunction::kRmsNorm && kBFloat16;

  // The warps' sums of the rows of this turn and of the next, which some warps may have begun.
  struct Parts {
    float squares[2][kRows][kWarps], sums[kLayerNorm ? 2 : 1][kRows][kWarps];
  };

  const RowTask& task;
  const Output& out;
  Parts& parts;
  const int k, count;
  const uint32_t results;                  // in shared memory
  const bool own;                          // there are channels at this thread's place
  uint32_t places[kOrdered ? kGroup : 1];  // of the channels that it wants

  __device__ PairedRows(const Rows& rows, void* shared, Parts& parts)
      : task(rows.task),
        out(rows.output),
        parts(parts),
        k(rows.k),
        count(rows.count),
        results(static_cast<uint32_t>(__cvta_generic_to_shared(shared))),
        own(kGroup * static_cast<int>(threadIdx.x) < rows.k) {}

  // Zeros where there is nothing.
  __device__ __forceinline__ void load(const RowInput& from, int row, Words& x) const {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int j = 0; j < kWords; ++j) x[i][j] = 0;
      if (own && row + i < count)
        load_words_now(static_cast<const uint16_t*>(from.data) + (row + i) * from.stride +
                           kGroup * threadIdx.x,
                       x[i]);
    }
  }
  static __device__ __forceinline__ void copy(const Words& from, Words& to) {
#pragma unroll
    for (int i = 0; i < kRows; ++i)
#pragma unroll
      for (int j = 0; j < kWords; ++j) to[i][j] = from[i][j];
  }
  // Where there is none, what changes nothing.
  __device__ __forceinline__ void load_vector(const RowInput& from, uint32_t otherwise,
                                              uint32_t (&x)[kWords]) const {
#pragma unroll
    for (int j = 0; j < kWords; ++j) x[j] = otherwise;
    if (own && from.data != nullptr)
      load_words_now(static_cast<const uint16_t*>(from.data) + kGroup * threadIdx.x, x);
  }

  // Of every eight channels, four are in each half of the results. A zero where there is no
  // channel, and a NaN for one that is not there.
  __device__ __forceinline__ uint32_t own_place(int half) const {
    return results + kPairedEnd + 16 * (half * blockDim.x + threadIdx.x);
  }
  __device__ __forceinline__ void read_order() {
#pragma unroll
    for (int i = 0; i < kGroup; i += 4) {
      uint32_t four[4] = {kNoChannel, kNoChannel, kNoChannel, kNoChannel};
      if (kGroup * static_cast<int>(threadIdx.x) < mx::kBlock * out.blocks)
        load_words_now(out.order + kGroup * threadIdx.x + i, four);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const uint32_t c = four[j];
        places[i + j] = results + kPairedEnd + 16 * (c / 4 % 2 * blockDim.x + c / 8) + 4 * (c % 4);
        if (c >= static_cast<uint32_t>(k))
          places[i + j] = results + (c == kNoChannel ? kPairedZero : kPairedNan);
      }
    }
  }

  // The sums over the warp of both rows' values of the eight lanes whose number modulo 4 is its
  // eighth, of row lane % 2 in each of these.
  static __device__ __forceinline__ float sum_of_lanes(float first, float second) {
    const bool odd = threadIdx.x & 1;
    float sum = (odd ? second : first) + __shfl_xor_sync(kWarp, odd ? first : second, 9);
    sum += __shfl_xor_sync(kWarp, sum, 18);
    return sum + __shfl_xor_sync(kWarp, sum, 4);
  }
  __device__ __forceinline__ void add_statistics(const Words& x, int turn) const {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const Products first = products_of_lanes<kLayerNorm>(x[0], kBFloat16);
    const Products second = products_of_lanes<kLayerNorm>(x[1], kBFloat16);
    const float squares = sum_of_lanes(first.squares, second.squares);
    const float sum = kLayerNorm ? sum_of_lanes(first.sum, second.sum) : 0.0f;
    if (lane % 4 == lane / 8) {
      parts.squares[turn][lane % 2][warp] = squares;
      if constexpr (kLayerNorm) parts.sums[turn][lane % 2][warp] = sum;
    }
  }
  // The sum of the warps' parts, of row lane / 16.
  static __device__ __forceinline__ float sum_of_warps(const float (&parts)[kRows][kWarps]) {
    const int lane = threadIdx.x % 32;
    float sum = lane % 16 < static_cast<int>(blockDim.x) / 32 ? parts[lane / 16][lane % 16] : 0.0f;
#pragma unroll
    for (int lanes = 8; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(kWarp, sum, lanes);
    return sum;
  }
  // Every thread of the thread block, or none, comes here: the mean squares of the distances from
  // the means.
  __device__ __forceinline__ float distant(const Words& x, float mean, float inverse_k) const {
    __shared__ float far[kRows][kWarps];
    float squares[kRows] = {};
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const float of_row = __shfl_sync(kWarp, mean, 16 * i);
#pragma unroll
      for (int j = 0; j < kWords; ++j) {
        const float2 v = widen_pair(x[i][j], kBFloat16);
        const float low = v.x - of_row, high = v.y - of_row;
        if (own) squares[i] += low * low + high * high;
      }
      squares[i] = warp_sum(squares[i]);
      if (threadIdx.x % 32 == 0) far[i][threadIdx.x / 32] = squares[i];
    }
    __syncthreads();
    const float mean_square = sum_of_warps(far) * inverse_k;
    __syncthreads();
    return mean_square;
  }
  // Of row lane / 16.
  __device__ __forceinline__ Statistics statistics(const Words& x, int turn) const {
    const float inverse_k = 1.0f / static_cast<float>(k);
    const float mean_square = sum_of_warps(parts.squares[turn]) * inverse_k;
    if constexpr (kLayerNorm) {
      const float mean = sum_of_warps(parts.sums[turn]) * inverse_k;
      float variance = mean_square - mean * mean;
      const bool near = is_near_zero(mean, variance);
      if (!__all_sync(kWarp, near)) {
        const float exact = distant(x, mean, inverse_k);
        if (!near) variance = exact;
      }
      return layer_statistics(mean, variance, task.eps);
    } else {
      return {inverse_root(mean_square, task.eps)};
    }
  }

  struct Vectors {
    uint32_t weight[kWords], bias[kWords];
  };
  __device__ __forceinline__ Vectors load_vectors() const {
    constexpr uint32_t kOnes = kBFloat16 ? 0x3F803F80 : 0x3C003C00, kMinusZeros = 0x80008000;
    const bool added = kFunction == RowFunction::kRmsNorm && task.form == RmsForm::kOnePlusWeight;
    Vectors vectors{};
    load_vector(task.weight, added ? kMinusZeros : kOnes, vectors.weight);
    if constexpr (kLayerNorm) load_vector(task.bias, kMinusZeros, vectors.bias);
    return vectors;
  }
  __device__ __forceinline__ void normalise(Words& x, const Vectors& vectors,
                                            const Statistics& of_lane) const {
    const uint32_t (&weight)[kWords] = vectors.weight, (&bias)[kWords] = vectors.bias;
    const auto each = [&](auto f) {
#pragma unroll
      for (int i = 0; i < kRows; ++i)
#pragma unroll
        for (int j = 0; j < kWords; ++j) {
          const float2 v = widen_pair(x[i][j], kBFloat16), w = widen_pair(weight[j], kBFloat16);
          const float2 b = widen_pair(kLayerNorm ? bias[j] : 0u, kBFloat16);
          x[i][j] = narrow_pair(f(v.x, w.x, b.x, i), f(v.y, w.y, b.y, i), kBFloat16);
        }
    };
    float factor[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) factor[i] = __shfl_sync(kWarp, of_lane.factor, 16 * i);
    if constexpr (kFunction == RowFunction::kRmsNorm) {
      if (task.form == RmsForm::kWeightAfterCast) {
        each([&](float v, float, float, int i) { return v * factor[i]; });
#pragma unroll
        for (int i = 0; i < kRows; ++i)
#pragma unroll
          for (int j = 0; j < kWords; ++j)
            x[i][j] = product_of_pairs(x[i][j], weight[j], kBFloat16);
      } else {
        const float more = task.form == RmsForm::kOnePlusWeight ? 1.0f : -0.0f;
        each([&](float v, float w, float, int i) { return v * factor[i] * (w + more); });
      }
    } else {
      float from[kRows], plus[kRows];
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        from[i] = __shfl_sync(kWarp, of_lane.from, 16 * i);
        plus[i] = __shfl_sync(kWarp, of_lane.plus, 16 * i);
      }
      each([&](float v, float w, float b, int i) {
        return fmaf(fmaf(v - from[i], factor[i], plus[i]), w, b);
      });
    }
  }
  __device__ __forceinline__ void compute(Words& x, const Words& second) const {
    const auto each = [&](auto f) {
#pragma unroll
      for (int i = 0; i < kRows; ++i)
#pragma unroll
        for (int j = 0; j < kWords; ++j) x[i][j] = f(x[i][j], second[i][j]);
    };
    if (kTwo && task.function == Pointwise::kAdd)
      return each([](uint32_t a, uint32_t b) { return sum_of_pairs(a, b, kBFloat16); });
    if (task.function != Pointwise::kCast) {
      Values<kRows * kGroup> v;
#pragma unroll
      for (int i = 0; i < kRows * kWords; ++i) {
        const float2 pair = widen_pair(x[i / kWords][i % kWords], kBFloat16);
        v.v[2 * i] = pair.x, v.v[2 * i + 1] = pair.y;
      }
      activate<kBFloat16>(task.function, v);
#pragma unroll
      for (int i = 0; i < kRows * kWords; ++i)
        x[i / kWords][i % kWords] = narrow_pair(v.v[2 * i], v.v[2 * i + 1], kBFloat16);
    }
    if constexpr (kTwo)
      each([](uint32_t a, uint32_t b) { return product_of_pairs(a, b, kBFloat16); });
  }

  __device__ __forceinline__ void compute() {
    if (kOrdered && threadIdx.x == 0) {
      const uint32_t ends[4] = {0, 0, 0x7FFF7FFF, 0x7FFF7FFF};  // a NaN of any type
      store_shared(results, ends);
    }
    let_the_next_kernel_start();
    const int step = kRows * gridDim.x;
    int row = kRows * blockIdx.x;
    for (int r = row; r < min(row + kRows, count); ++r) {
      fetch_row<kTypes>(task.x, r, k);
      if constexpr (kTwo) fetch_row<kTypes>(task.second, r, k);
    }
    wait_for_the_kernel_before();
    Words x, second{};
    load(task.x, row, x);
    if constexpr (kTwo) load(task.second, row, second);
    if constexpr (kOrdered) read_order();
    Vectors vectors;
    if constexpr (kKeepsVectors) vectors = load_vectors();
    PairOutput to(out, row, step);

    for (int turn = 0; row < count; row += step, turn ^= 1) {
      Words next, next_second;
      if constexpr (kAhead) load(task.x, row + step, next);
      if constexpr (kSecondAhead) load(task.second, row + step, next_second);
      if constexpr (kNorm) {
        if constexpr (kTwo) {
#pragma unroll
          for (int i = 0; i < kRows; ++i) {
#pragma unroll
            for (int j = 0; j < kWords; ++j)
              x[i][j] = sum_of_pairs(x[i][j], second[i][j], kBFloat16);
            if (own && row + i < count)
              store_words(
                  static_cast<uint16_t*>(task.sum) + int64_t{row + i} * k + kGroup * threadIdx.x,
                  x[i]);
          }
        }
        add_statistics(x, turn);
        __syncthreads();  // and the results of the turn before have been read
        const Statistics of_lane = statistics(x, turn);
        if constexpr (!kKeepsVectors) vectors = load_vectors();
        normalise(x, vectors, of_lane);
      } else {
        compute(x, second);
        if constexpr (kOrdered) __syncthreads();  // as above
      }
      RowPair y;
#pragma unroll
      for (int j = 0; j < kWords; ++j) {
        y[2 * j] = permute_bytes<0x5410>(x[0][j], x[1][j]);
        y[2 * j + 1] = permute_bytes<0x7632>(x[0][j], x[1][j]);
      }
      if constexpr (kOrdered) {
        if (own) {
#pragma unroll
          for (int i = 0; i < 2; ++i)
            store_shared(own_place(i), {y[4 * i], y[4 * i + 1], y[4 * i + 2], y[4 * i + 3]});
        }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < kGroup; ++i)
          asm volatile("ld.shared.b32 %0, [%1];" : "=r"(y[i]) : "r"(places[i]) : "memory");
      }
      quantize_pair<kBFloat16>(to, row, min(kRows, count - row), y);
      to.advance();
      if constexpr (kAhead) {
        copy(next, x);
      } else {
        load(task.x, row + step, x);
      }
      if constexpr (kSecondAhead) {
        copy(next_second, second);
      } else if constexpr (kTwo) {
        load(task.second, row + step, second);
      }
    }
  }
};

template <RowFunction kFunction, Types kTypes, bool kOrdered, bool kTwo>
__global__ void __launch_bounds__(kPairedThreads, 1024 / kPairedThreads)
    paired_rows_kernel(const __grid_constant__ Rows rows) {
  extern __shared__ uint4 shared[];
  using Kernel = PairedRows<kFunction, kTypes, kOrdered, kTwo>;
  __shared__ typename Kernel::Parts parts;
  Kernel(rows, shared, parts).compute();
}

}  // namespace micromix::cuda
