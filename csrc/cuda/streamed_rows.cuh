// The row kernel for many regular rows of a 16-bit type, on sm_90 and later: thread blocks that
// stay.
//
// A thread block takes every n-th row. Bulk copies of its next rows to a ring in shared memory run
// behind its work, so memory is not idle for a norm's sums or an order's gathers, as it is where a
// block loads a row, works on it, and ends (rows.cuh). A thread has the same channels of every row:
// it reads the order, and a norm's weight and bias in that order, once. An order gathers from the
// operands; no result is staged. The statistics of a row are summed up while the row before it is
// quantised, with one barrier a row.
#pragma once

#include "quantize_group.cuh"
#include "row_functions.cuh"

namespace micromix::cuda {

// Shared memory by its own 32-bit addresses.
__device__ __forceinline__ void make_barrier(uint32_t barrier) {
  asm volatile("mbarrier.init.shared.b64 [%0], 1;" ::"r"(barrier) : "memory");
}
// One thread: the barrier's phase ends when so many bytes have come.
__device__ __forceinline__ void expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void copy_bulk(uint32_t to, const void* from, uint32_t bytes,
                                          uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(to),
      "l"(from), "r"(bytes), "r"(barrier)
      : "memory");
}
__device__ __forceinline__ void wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again%=:\n"
      "mbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n"
      "@!done bra again%=;\n"
      "}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}
__device__ __forceinline__ Narrow<8> load_shared(uint32_t from) {
  Narrow<8> x;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.word[0]), "=r"(x.word[1]), "=r"(x.word[2]), "=r"(x.word[3])
               : "r"(from));
  return x;
}
__device__ __forceinline__ void store_shared(uint32_t to, const uint32_t (&words)[4]) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(words[0]), "r"(words[1]),
               "r"(words[2]), "r"(words[3])
               : "memory");
}
__device__ __forceinline__ uint32_t load_shared_half(uint32_t from) {
  uint16_t x;
  asm volatile("ld.shared.b16 %0, [%1];" : "=h"(x) : "r"(from));
  return x;
}

struct WarpStatistics {  // by warp
  float sum[32], squares[32];
};

// What a thread block does. 16 bytes of a row are a piece. `kTwo`: there is a second operand.
template <RowFunction kFunction, Types kTypes, bool kOrdered, bool kTwo>
struct Stream {
  static constexpr bool kNorm = kFunction != RowFunction::kPointwise;
  static constexpr bool kBFloat16 = kTypes == Types::kBFloat16;
  static constexpr int kGroup = streamed_group(kOrdered), kPieces = kGroup / 8;
  static_assert(is_narrow(kTypes));
  using Block = Pairs<kGroup>;

  const Rows& rows;
  const RowTask& task;
  const Output& out;
  const int k;
  const uint32_t row_bytes, barriers, ring;    // of an operand in shared memory; its stages
  int own;                                     // pieces whose sums are this thread's
  uint32_t places[kOrdered ? kGroup / 2 : 1];  // of the values in a staged row, two in a word
  uint32_t padded = 0;                         // a bit for each channel that is padding
  float inverse_k;
  // Channels that this thread's warp, and the warp of its lane's number, sum up; at least 1.
  float inverse_count, count_of_lane, inverse_count_of_lane;

  // A norm's weight and bias lie behind the ring as each thread wants them. An order gathers them
  // from the last places of the ring, before rows need these.
  static constexpr int kOperands = kTwo ? 2 : 1;
  static constexpr int kParameters = streamed_parameters(kFunction);
  static constexpr int kStagedParameters = kOrdered ? kParameters : 0;
  static constexpr int kFirstRows =
      kStreamedStages - (kStagedParameters + kOperands - 1) / kOperands;
  __device__ __forceinline__ uint32_t staged_parameter(int i) const {
    return ring + (kStreamedStages * kOperands - 1 - i) * row_bytes;
  }
  __device__ __forceinline__ uint32_t place_of_parameter(int parameter, int i) const {
    return ring + kStreamedStages * kOperands * row_bytes +
           16 * ((parameter * kPieces + i) * blockDim.x + threadIdx.x);
  }
  __device__ __forceinline__ uint32_t stage(int i) const {
    return ring + i * kOperands * row_bytes;
  }
  static __device__ __forceinline__ uint32_t place_of(uint32_t piece) {
    return kStreamedEnd + 16 * piece;
  }

  __device__ Stream(const Rows& rows, void* shared)
      : rows(rows),
        task(rows.task),
        out(rows.output),
        k(rows.k),
        row_bytes(static_cast<uint32_t>(streamed_operand_bytes(rows.k))),
        barriers(static_cast<uint32_t>(__cvta_generic_to_shared(shared))),
        ring(barriers + kStreamedBarriers),
        own((k / 8 - static_cast<int>(threadIdx.x) + static_cast<int>(blockDim.x) - 1) /
            static_cast<int>(blockDim.x)),
        inverse_k(1.0f / static_cast<float>(rows.k)) {
    if constexpr (kFunction == RowFunction::kLayerNorm) {
      inverse_count = 1.0f / channels_of_warp(threadIdx.x / 32);
      count_of_lane = channels_of_warp(threadIdx.x % 32);
      inverse_count_of_lane = 1.0f / count_of_lane;
    }
  }

  // What is the same for every row.
  __device__ __forceinline__ void prepare() {
    const int block = threadIdx.x / (mx::kBlock / kGroup);
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const int piece = kPieces * threadIdx.x + i;
      int channels[8];
      if (kOrdered && block < out.blocks) {
        uint32_t words[8];
        load_words(out.order + 8 * piece, words);
#pragma unroll
        for (int j = 0; j < 8; ++j) channels[j] = static_cast<int>(words[j]);
      } else {
#pragma unroll
        for (int j = 0; j < 8; ++j) channels[j] = 8 * piece + j < k ? 8 * piece + j : -1;
      }
      if constexpr (kOrdered) {
        uint32_t place[8];
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          // A zero at -1, and a NaN for any other channel that is not there.
          const auto c = static_cast<unsigned>(channels[j]);
          place[j] = c < static_cast<unsigned>(k) ? place_of(c / 8) + 2 * (c % 8)
                     : c == 0xFFFFFFFF            ? kStreamedZero
                                                  : kStreamedNan;
          padded |= (c == 0xFFFFFFFF) << (8 * i + j);
        }
#pragma unroll
        for (int j = 0; j < 4; ++j) places[4 * i + j] = place[j] | place[j + 4] << 16;
      }
    }
  }
  // Puts a norm's weight or bias where `parameter` finds it; without one, what changes nothing.
  __device__ __forceinline__ void place_parameter(int which, const RowInput& from,
                                                  uint32_t otherwise) {
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const uint32_t piece = kPieces * threadIdx.x + i;
      Pairs<8> x{otherwise, otherwise, otherwise, otherwise};
      if (from.data != nullptr) {
        if constexpr (kOrdered) {
          x = read(staged_parameter(which), i);
        } else if (8 * piece < k) {
          uint32_t words[4];
          load_words(static_cast<const uint16_t*>(from.data) + 8 * piece, words);
          x = paired(words);
        }
      }
      store_shared(place_of_parameter(which, i), x.word);
    }
  }
  __device__ __forceinline__ void place_parameters() {
    constexpr uint32_t kOne = kBFloat16 ? 0x3F803F80 : 0x3C003C00, kMinusZero = 0x80008000;
    const bool added = kFunction == RowFunction::kRmsNorm && task.form == RmsForm::kOnePlusWeight;
    place_parameter(0, task.weight, added ? kMinusZero : kOne);
    if constexpr (kFunction == RowFunction::kLayerNorm) place_parameter(1, task.bias, kMinusZero);
  }
  __device__ __forceinline__ Pairs<8> parameter(int which, int i) const {
    const Narrow<8> x = load_shared(place_of_parameter(which, i));
    return {x.word[0], x.word[1], x.word[2], x.word[3]};
  }

  // The first thread's: a row to a stage.
  __device__ __forceinline__ void copy(int64_t row, int to) const {
    if (threadIdx.x != 0 || row >= rows.count) return;
    const uint32_t bytes = 2 * k, barrier = barriers + 8 * to;
    expect(barrier, kOperands * bytes);
    copy_bulk(stage(to) + kStreamedEnd,
              static_cast<const uint16_t*>(task.x.data) + row * task.x.stride, bytes, barrier);
    if constexpr (kTwo)
      copy_bulk(stage(to) + row_bytes + kStreamedEnd,
                static_cast<const uint16_t*>(task.second.data) + row * task.second.stride, bytes,
                barrier);
  }
  __device__ __forceinline__ void copy_parameters() const {
    if (threadIdx.x != 0) return;
    const uint32_t bytes = 2 * k, barrier = barriers + 8 * kStreamedStages;
    const bool weighted = task.weight.data != nullptr, biased = task.bias.data != nullptr;
    expect(barrier, (weighted + biased) * bytes);
    if (weighted) copy_bulk(staged_parameter(0) + kStreamedEnd, task.weight.data, bytes, barrier);
    if (biased) copy_bulk(staged_parameter(1) + kStreamedEnd, task.bias.data, bytes, barrier);
  }

  // A warp's part of a row's statistics, to be read after the next barrier, of the pieces that its
  // threads have: the sum of squares; or the sum, and the squares of the distances from the warp's
  // mean. Adds the residual first, where there is one.
  __device__ __forceinline__ void statistics_of_warp(int64_t row, uint32_t x, WarpStatistics& to) {
    float sums[4] = {};
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      if (i >= own) continue;
      const uint32_t place = x + place_of(threadIdx.x + i * blockDim.x);
      Narrow<8> bits = load_shared(place);
      Values<8> v = unpack(bits, kBFloat16);
      if constexpr (kTwo) {
        const Values<8> w = unpack(load_shared(place + row_bytes), kBFloat16);
#pragma unroll
        for (int j = 0; j < 8; ++j) v.v[j] += w.v[j];
        bits = pack(v, kBFloat16);
        store_shared(place, bits.word);
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");  // before the next row comes
        store_words(static_cast<uint16_t*>(task.sum) + row * k + 8 * (threadIdx.x + i * blockDim.x),
                    bits.word);
        v = unpack(bits, kBFloat16);
      }
#pragma unroll
      for (int j = 0; j < 8; ++j)
        sums[j % 4] += kFunction == RowFunction::kRmsNorm ? v.v[j] * v.v[j] : v.v[j];
    }
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const float sum = warp_sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
    if (lane == 0) to.sum[warp] = sum;
    if constexpr (kFunction == RowFunction::kLayerNorm) {
      const float mean = sum * inverse_count;
      float parts[4] = {};
#pragma unroll
      for (int i = 0; i < kPieces; ++i) {
        if (i >= own) continue;
        const Values<8> v =
            unpack(load_shared(x + place_of(threadIdx.x + i * blockDim.x)), kBFloat16);
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          const float off = v.v[j] - mean;
          parts[j % 4] += off * off;
        }
      }
      const float squares = warp_sum((parts[0] + parts[1]) + (parts[2] + parts[3]));
      if (lane == 0) to.squares[warp] = squares;
    }
  }
  __device__ __forceinline__ float channels_of_warp(int warp) const {
    int pieces = 0;
#pragma unroll
    for (int i = 0; i < kPieces; ++i)
      pieces += max(0, min(32, k / 8 - (32 * warp + i * static_cast<int>(blockDim.x))));
    return static_cast<float>(max(1, 8 * pieces));
  }
  // The same in every thread, and always from the same sums in the same order.
  __device__ __forceinline__ Statistics statistics(const WarpStatistics& from) const {
    const int lane = threadIdx.x % 32;
    const bool there = lane < static_cast<int>(blockDim.x) / 32;
    const float sum = there ? from.sum[lane] : 0.0f;
    float total = warp_sum(sum), mean = 0.0f;
    if constexpr (kFunction == RowFunction::kLayerNorm) {
      mean = total * inverse_k;
      const float off = sum * inverse_count_of_lane - mean;
      total = warp_sum(there ? from.squares[lane] + count_of_lane * off * off : 0.0f);
    }
    return {mean, inverse_root(total * inverse_k, task.eps)};
  }

  __device__ __forceinline__ Pairs<8> read(uint32_t row, int i) const {
    Pairs<8> x{};
    if constexpr (kOrdered) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const uint32_t both = places[4 * i + j];
        x.word[j] = permute_bytes<0x5410>(load_shared_half(row + (both & 0xFFFF)),
                                          load_shared_half(row + (both >> 16)));
      }
    } else {
      const uint32_t piece = kPieces * threadIdx.x + i;
      if (8 * piece < k) x = paired(load_shared(row + place_of(piece)).word);
    }
    return x;
  }
  // The whole block, `f(i)` eight channels at a time.
  template <typename Function>
  static __device__ __forceinline__ Block block_of(Function f) {
    Block y;
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const Pairs<8> part = f(i);
#pragma unroll
      for (int j = 0; j < 4; ++j) y.word[4 * i + j] = part.word[j];
    }
    return y;
  }

  __device__ __forceinline__ Block results(uint32_t row, const Statistics& of_row) const {
    if constexpr (kFunction == RowFunction::kPointwise) {
      if (task.function == Pointwise::kCast)
        return block_of([&](int i) {
          const Pairs<8> x = read(row, i);
          return kTwo ? product(x, read(row + row_bytes, i), kBFloat16) : x;
        });
      if (kTwo && task.function == Pointwise::kAdd)
        return block_of([&](int i) {
          Values<8> v = unpack(read(row, i), kBFloat16);
          const Values<8> w = unpack(read(row + row_bytes, i), kBFloat16);
#pragma unroll
          for (int j = 0; j < 8; ++j) v.v[j] += w.v[j];
          return pack_pairs(v, kBFloat16);
        });
      return block_of([&](int i) {
        Values<8> v = unpack(read(row, i), kBFloat16);
        activate(task.function, v);
        const Pairs<8> y = pack_pairs(v, kBFloat16);
        return kTwo ? product(y, read(row + row_bytes, i), kBFloat16) : y;
      });
    } else if constexpr (kFunction == RowFunction::kRmsNorm) {
      const auto scaled = [&](int i) {
        Values<8> v = unpack(read(row, i), kBFloat16);
#pragma unroll
        for (int j = 0; j < 8; ++j) v.v[j] *= of_row.factor;
        return v;
      };
      if (task.form == RmsForm::kWeightAfterCast)
        return block_of([&](int i) {
          return product(pack_pairs(scaled(i), kBFloat16), parameter(0, i), kBFloat16);
        });
      const float more = task.form == RmsForm::kOnePlusWeight ? 1.0f : -0.0f;
      return block_of([&](int i) {
        Values<8> v = scaled(i);
        const Values<8> w = unpack(parameter(0, i), kBFloat16);
#pragma unroll
        for (int j = 0; j < 8; ++j) v.v[j] *= w.v[j] + more;
        return pack_pairs(v, kBFloat16);
      });
    } else {
      return block_of([&](int i) {
        Values<8> v = unpack(read(row, i), kBFloat16);
        const Values<8> w = unpack(parameter(0, i), kBFloat16);
        const Values<8> b = unpack(parameter(1, i), kBFloat16);
#pragma unroll
        for (int j = 0; j < 8; ++j)
          v.v[j] = __fadd_rn(__fmul_rn((v.v[j] - of_row.mean) * of_row.factor, w.v[j]), b.v[j]);
        return pack_pairs(v, kBFloat16);
      });
    }
  }

  // Keeps the compiler from unpacking what is the same for every row once, into twice the
  // registers.
  __device__ __forceinline__ void keep_packed() {
#pragma unroll
    for (int i = 0; i < kGroup / 2; ++i) {
      if constexpr (kOrdered) asm volatile("" : "+r"(places[i]));
    }
  }

  __device__ __forceinline__ void compute() {
    if constexpr (kOrdered) {
      for (uint32_t i = threadIdx.x; i < kStreamedStages * kOperands; i += blockDim.x)
        asm volatile("st.shared.b32 [%0], %1;" ::"r"(ring + i * row_bytes), "r"(0x7FFF0000)
                     : "memory");  // kStreamedZero, and at kStreamedNan one of any type
    }
    __shared__ WarpStatistics of_warps[2];
    const auto after = [&](int64_t row, int i) { return row + i * int64_t{gridDim.x}; };
    int64_t row = blockIdx.x;
    if (threadIdx.x == 0) {
#pragma unroll
      for (int i = 0; i <= kStreamedStages; ++i) make_barrier(barriers + 8 * i);
      asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    if constexpr (kStagedParameters > 0) copy_parameters();
#pragma unroll
    for (int i = 0; i < kFirstRows; ++i) copy(after(row, i), i);
    prepare();
    __syncthreads();
    if constexpr (kStagedParameters > 0) wait(barriers + 8 * kStreamedStages, 0);
    if constexpr (kNorm) place_parameters();
    if constexpr (kStagedParameters > 0) {
      __syncthreads();
#pragma unroll
      for (int i = kFirstRows; i < kStreamedStages; ++i) copy(after(row, i), i);
    }

    wait(barriers, 0);
    if constexpr (kNorm) {
      statistics_of_warp(row, stage(0), of_warps[0]);
      __syncthreads();
    }
    uint32_t phase = 0;
    int now = 0, turn = 0;
    while (true) {
      Statistics of_row{};
      if constexpr (kNorm) of_row = statistics(of_warps[turn]);
      keep_packed();
      Block y = results(stage(now), of_row);
      if (padded != 0) {
#pragma unroll
        for (int i = 0; i < kGroup / 2; ++i) {
          const int channel = i / 4 * 8 + i % 4;
          if (padded >> channel & 1) y.word[i] &= 0xFFFF0000;
          if (padded >> (channel + 4) & 1) y.word[i] &= 0xFFFF;
        }
      }
      quantize_group<kBFloat16>(OutputRow(out, row), threadIdx.x, y);

      const int64_t next = after(row, 1);
      if (next >= rows.count) break;
      const int left = now;
      now = now + 1 == kStreamedStages ? 0 : now + 1;
      phase ^= now == 0;
      turn ^= 1;
      wait(barriers + 8 * now, phase);
      if constexpr (kNorm) statistics_of_warp(next, stage(now), of_warps[turn]);
      __syncthreads();  // the next row is there, its statistics too, and this one is done with
      copy(after(row, kStreamedStages), left);
      row = next;
    }
  }
};

#ifdef __CUDA_ARCH__
constexpr int kCapability = __CUDA_ARCH__ / 100;
#else
constexpr int kCapability = 9;  // the host's code has no bounds
#endif

template <RowFunction kFunction, Types kTypes, bool kOrdered, bool kTwo>
__global__ void __launch_bounds__(streamed_threads(kOrdered, kCapability), 1)
    streamed_rows_kernel(const __grid_constant__ Rows rows) {
#if __CUDA_ARCH__ >= 900  // bulk copies
  extern __shared__ uint4 shared[];
  Stream<kFunction, kTypes, kOrdered, kTwo>(rows, shared).compute();
#endif
}

}  // namespace micromix::cuda
