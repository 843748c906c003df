// The row kernel: one thread block computes a row and quantises it.
//
// A thread has a group of neighbouring channels at a time: 16 where they are quantised from
// registers (two threads a block of 32), 8 elsewhere. A row is read from memory once. It waits in
// shared memory where it is needed again: by a norm, between its sums and its values, and by an
// order, which gathers from it.
//
// Types::kAny also takes rows that begin anywhere and any number of channels; the others need
// 16-byte alignment and a multiple of 16.
#pragma once

#include <type_traits>

#include "quantize_group.cuh"
#include "row_functions.cuh"

namespace micromix::cuda {

// How many thread blocks of the largest size have registers on a multiprocessor: 64 of them for
// each thread of a 16-bit type, where that spills nothing.
constexpr int least_blocks(RowFunction function, Types types, Placement placement) {
  if (!is_narrow(types)) return 1;
  if (placement != Placement::kDirect) return 2;
  return function == RowFunction::kLayerNorm ? 3 : 4;
}
constexpr unsigned kNan = 0x7FC00000;

// The sum over a thread block, the same in every thread; always in the same order.
__device__ __forceinline__ float block_sum(float x) {
  __shared__ float of_warp[32];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  x = warp_sum(x);
  __syncthreads();  // the sums before these have been read
  if (lane == 0) of_warp[warp] = x;
  __syncthreads();
  return warp_sum(lane < static_cast<int>(blockDim.x) / 32 ? of_warp[lane] : 0.0f);
}

// The row of a thread block, as a thread sees it.
template <RowFunction kFunction, Types kTypes, Placement kPlacement>
struct Block {
  static constexpr bool kNorm = kFunction != RowFunction::kPointwise;
  static constexpr bool kWhole = kTypes != Types::kAny;  // aligned, and whole groups
  static constexpr bool kBFloat16 = kTypes == Types::kBFloat16;
  static constexpr bool kDirect = kPlacement == Placement::kDirect;
  static constexpr int kGroup = kDirect && kWhole ? 16 : 8;
  static constexpr int kSlotBytes = slot_bytes(kTypes);
  using Group = Values<kGroup>;
  using KeptGroup = Kept<kTypes, kGroup>;

  const Rows& rows;
  const RowTask& task;
  const int k;
  const int64_t row;
  char* const slots;  // of channel 0

  __device__ Block(const Rows& rows, void* shared)
      : rows(rows),
        task(rows.task),
        k(rows.k),
        row(blockIdx.x),
        slots(static_cast<char*>(shared) + kFirstSlot * kSlotBytes) {}

  __device__ bool has(int group) const { return kGroup * group < k; }

  __device__ KeptGroup load(const RowInput& from, int group) const {
    const int64_t i = row * from.stride + kGroup * group;
    if constexpr (is_narrow(kTypes)) {
      KeptGroup x;
      load_words(static_cast<const uint16_t*>(from.data) + i, x.bits.word);
      return x;
    } else if constexpr (kWhole) {
      return KeptGroup(load_aligned<kGroup>(from.data, type_of<kTypes>(from.dtype), i));
    } else {
      return KeptGroup(load_any<kGroup>(from.data, from.dtype, i, k - kGroup * group));
    }
  }
  __device__ Group load_vector(const RowInput& vector, int group) const {
    if (vector.data == nullptr) return {};
    if constexpr (kWhole) return load_aligned<kGroup>(vector.data, vector.dtype, kGroup * group);
    return load_any<kGroup>(vector.data, vector.dtype, kGroup * group, k - kGroup * group);
  }
  __device__ void store(void* to, Dtype dtype, int group, const KeptGroup& x) const {
    const int64_t i = row * k + kGroup * group;
    if constexpr (is_narrow(kTypes)) {
      store_words(static_cast<uint16_t*>(to) + i, x.bits.word);
    } else if constexpr (kWhole) {
      uint32_t words[kGroup];
#pragma unroll
      for (int j = 0; j < kGroup; ++j) words[j] = __float_as_uint(x.x.v[j]);
      store_words(static_cast<float*>(to) + i, words);
    } else {
      store_any(to, type_of<kTypes>(dtype), i, k - kGroup * group, x.x);
    }
  }

  // x, or x + residual rounded to x's type as the model has it.
  __device__ KeptGroup load_sum(int group) const {
    const KeptGroup kept = load(task.x, group);
    if (!kNorm || task.second.data == nullptr) return kept;
    Group x = kept.values();
    const Group second = load(task.second, group).values();
#pragma unroll
    for (int i = 0; i < kGroup; ++i) x.v[i] += second.v[i];
    return KeptGroup(rounded(x, type_of<kTypes>(task.x.dtype)));
  }

  // The words of a norm's group wait 16 bytes at a time: where the results of the same channels are
  // staged later, or, where none are, such that neighbouring threads have neighbouring places.
  static constexpr int kWaitingWords = kGroup * kSlotBytes / 4;
  __device__ uint4* waiting_place(int group, int i) const {
    constexpr int kPieces = kWaitingWords / 4;
    return reinterpret_cast<uint4*>(slots) +
           (kDirect ? i * (k / kGroup + 1) + group : group * kPieces + i);
  }
  __device__ void wait(int group, const KeptGroup& x) const {
    uint32_t words[kWaitingWords];
#pragma unroll
    for (int i = 0; i < kWaitingWords; ++i) {
      if constexpr (is_narrow(kTypes)) {
        words[i] = x.bits.word[i];
      } else {
        words[i] = __float_as_uint(x.x.v[i]);
      }
    }
#pragma unroll
    for (int i = 0; i < kWaitingWords / 4; ++i)
      *waiting_place(group, i) = {words[4 * i], words[4 * i + 1], words[4 * i + 2],
                                  words[4 * i + 3]};
  }
  __device__ KeptGroup waiting(int group) const {
    if constexpr (kPlacement == Placement::kRecomputed) {
      return load_sum(group);
    } else {
      KeptGroup x;
#pragma unroll
      for (int i = 0; i < kWaitingWords / 4; ++i) {
        const uint4 four = *waiting_place(group, i);
        const uint32_t words[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          if constexpr (is_narrow(kTypes)) {
            x.bits.word[4 * i + j] = words[j];
          } else {
            x.x.v[4 * i + j] = __uint_as_float(words[j]);
          }
        }
      }
      return x;
    }
  }

  __device__ Statistics statistics() const {
    float sum = 0.0f;
#pragma unroll 2
    for (int group = threadIdx.x; has(group); group += blockDim.x) {
      const KeptGroup x = load_sum(group);
      if (task.sum != nullptr) store(task.sum, task.x.dtype, group, x);
      if constexpr (kPlacement != Placement::kRecomputed) wait(group, x);
      const Group y = x.values();
#pragma unroll
      for (int i = 0; i < kGroup; ++i)
        sum += kFunction == RowFunction::kRmsNorm ? y.v[i] * y.v[i] : y.v[i];
    }
    sum = block_sum(sum);
    const float inverse_k = 1.0f / static_cast<float>(k);
    if constexpr (kFunction == RowFunction::kRmsNorm) {
      return {inverse_root(sum * inverse_k, task.eps)};
    } else {
      const float mean = sum * inverse_k;
      float squares = 0.0f;
      for (int group = threadIdx.x; has(group); group += blockDim.x) {
        Group x = waiting(group).values();
        if constexpr (!kWhole) pad(group, x, mean);
#pragma unroll
        for (int i = 0; i < kGroup; ++i) squares += (x.v[i] - mean) * (x.v[i] - mean);
      }
      return layer_statistics(mean, block_sum(squares) * inverse_k, task.eps);
    }
  }

  // The result of a group, rounded to its type, and stored where it is kept.
  __device__ KeptGroup result(int group, const Statistics& of_row) const {
    const Dtype dtype = type_of<kTypes>(task.dtype);
    KeptGroup y = kNorm ? waiting(group) : load(task.x, group);
    const bool nothing =
        !kNorm && kWhole && task.function == Pointwise::kCast && task.second.data == nullptr;
    if (!nothing) {
      Group weight{}, bias{}, second{};
      if constexpr (kNorm) {
        weight = load_vector(task.weight, group);
        bias = load_vector(task.bias, group);
      } else if (task.second.data != nullptr) {
        second = load(task.second, group).values();
      }
      y = KeptGroup(
          rounded(finish<kFunction, kTypes, kGroup>(task, y.values(), second, weight, bias, of_row),
                  is_narrow(kTypes) ? Dtype::kFloat32 : dtype));
    }
    if (task.kept != nullptr) store(task.kept, dtype, group, y);
    return y;
  }

  // The same of a row function of 16-bit values, as they are quantised.
  __device__ Pairs<kGroup> result_pairs(int group) const {
    const KeptGroup x = load(task.x, group);
    KeptGroup second;
    if (task.second.data != nullptr) second = load(task.second, group);
    Pairs<kGroup> y;
    if (task.function == Pointwise::kAdd) {
#pragma unroll
      for (int i = 0; i < kGroup / 2; ++i)
        second.bits.word[i] = sum_of_pairs(x.bits.word[i], second.bits.word[i], kBFloat16);
      y = paired(second.bits.word);
    } else {
      if (task.function == Pointwise::kCast) {
        y = paired(x.bits.word);
      } else {
        Group v = x.values();
        activate<kBFloat16>(task.function, v);
        y = pack_pairs(v, kBFloat16);
      }
      if (task.second.data != nullptr) y = product(y, paired(second.bits.word), kBFloat16);
    }
    if (task.kept != nullptr) {
      KeptGroup kept;
      kept.bits = unpaired(y);
      store(task.kept, task.dtype, group, kept);
    }
    return y;
  }

  __device__ void pad(int group, Group& y, float with) const {  // beyond the last channel
#pragma unroll
    for (int i = 0; i < kGroup; ++i)
      if (kGroup * group + i >= k) y.v[i] = with;
  }

  __device__ void stage(int group, KeptGroup y) const {
    if constexpr (!kWhole) pad(group, y.x, __uint_as_float(kNan));
    wait(group, y);
  }
  __device__ void stage_ends() const {  // what -1 reads, and what is out of range
    if (threadIdx.x != 0) return;
    for (int i = 0; i < kSlotBytes; i += 2) {
      *reinterpret_cast<uint16_t*>(slots - kSlotBytes + i) = 0;
      // A NaN in every type; part of a group has it already.
      if (k % kGroup == 0) *reinterpret_cast<uint16_t*>(slots + k * kSlotBytes + i) = 0x7FFF;
    }
  }

  // The channels that a group of an output wants: by its order, or as they are.
  __device__ void channels_of(const Output& out, int group, int (&channels)[8]) const {
    if (out.order == nullptr || group >= 4 * out.blocks) {
#pragma unroll
      for (int i = 0; i < 8; ++i) channels[i] = 8 * group + i < k ? 8 * group + i : -1;
    } else if (kWhole || out.order_aligned) {
      uint32_t words[8];
      load_words(out.order + 8 * group, words);
#pragma unroll
      for (int i = 0; i < 8; ++i) channels[i] = static_cast<int>(words[i]);
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i) channels[i] = __ldg(out.order + 8 * group + i);
    }
  }

  __device__ void quantize_staged(const Output& out, int group, const int (&channels)[8]) const {
    uint32_t words[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const unsigned slot = min(static_cast<unsigned>(channels[i]) + 1u, k + 1u);
      const char* const at = slots - kSlotBytes + slot * kSlotBytes;
      words[i] = kSlotBytes == 4 ? *reinterpret_cast<const uint32_t*>(at)
                                 : *reinterpret_cast<const uint16_t*>(at);
    }
    const OutputRow to(out, row);
    if constexpr (is_narrow(kTypes)) {
      Pairs<8> y;
#pragma unroll
      for (int i = 0; i < 4; ++i) y.word[i] = permute_bytes<0x5410>(words[i], words[i + 4]);
      quantize_group<kBFloat16>(to, group, y);
    } else {
      Values<8> y;
#pragma unroll
      for (int i = 0; i < 8; ++i) y.v[i] = __uint_as_float(words[i]);
      quantize_group(to, group, y);
    }
  }

  // A row that does not fit in shared memory: its values are computed where an output wants them.
  __device__ void quantize_recomputed(const Output& out, int group, const int (&channels)[8],
                                      const Statistics& of_row) const {
    const auto there = [&](int i) {
      return static_cast<unsigned>(channels[i]) < static_cast<unsigned>(k);
    };
    const auto read = [&](const RowInput& from) {
      Values<8> x{};
      if (from.data == nullptr) return x;
#pragma unroll
      for (int i = 0; i < 8; ++i)
        if (there(i)) x.v[i] = load_one(from.data, from.dtype, row * from.stride + channels[i]);
      return x;
    };
    Values<8> x = read(task.x);
    const Values<8> second = read(task.second);
    if (kNorm && task.second.data != nullptr) {
#pragma unroll
      for (int i = 0; i < 8; ++i) x.v[i] += second.v[i];
      x = rounded(x, task.x.dtype);
    }
    Values<8> y =
        finish<kFunction, kTypes, 8>(task, x, second, read(task.weight), read(task.bias), of_row);
    y = rounded(y, task.dtype);
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if (!there(i)) y.v[i] = channels[i] == -1 ? 0.0f : __uint_as_float(kNan);
    quantize_group(OutputRow(out, row), group, y);
  }

  __device__ void compute_direct(const Statistics& of_row) const {
    const Output& out = rows.output;
    const OutputRow to(out, row);
    const int groups = out.blocks * (mx::kBlock / kGroup);
    // Several thread blocks share out a row where there are few.
    for (int first = blockIdx.y * blockDim.x; first < groups; first += gridDim.y * blockDim.x) {
      const int group = first + threadIdx.x;
      if constexpr (is_narrow(kTypes)) {
        Pairs<kGroup> y{};
        if (has(group)) {
          if constexpr (kNorm) {
            y = paired(result(group, of_row).bits.word);
          } else {
            y = result_pairs(group);
          }
        }
        quantize_group<kBFloat16>(to, group, y);
      } else {
        KeptGroup kept;
        if (has(group)) kept = result(group, of_row);
        Group y = kept.values();
        if constexpr (!kWhole) pad(group, y, 0.0f);
        quantize_group(to, group, y);
      }
    }
  }

  __device__ void compute() const {
    Statistics of_row{};
    if constexpr (kNorm) of_row = statistics();
    if constexpr (kDirect) {
      compute_direct(of_row);
    } else {
      for (int group = threadIdx.x; has(group); group += blockDim.x) {
        const KeptGroup y = result(group, of_row);
        if constexpr (kPlacement == Placement::kStaged) stage(group, y);
      }
      if constexpr (kPlacement == Placement::kStaged) {
        stage_ends();
        __syncthreads();
      }
      const Output& out = rows.output;
      const int groups = 4 * out.blocks;
      int channels[8], next[8];
      channels_of(out, threadIdx.x, next);
      for (int first = 0; first < groups; first += blockDim.x) {
        const int group = first + threadIdx.x;
#pragma unroll
        for (int i = 0; i < 8; ++i) channels[i] = next[i];
        channels_of(out, group + blockDim.x, next);  // there in time for the next turn
        if constexpr (kPlacement == Placement::kStaged) {
          quantize_staged(out, group, channels);
        } else {
          quantize_recomputed(out, group, channels, of_row);
        }
      }
    }
  }
};

template <RowFunction kFunction, Types kTypes, Placement kPlacement>
__global__ void __launch_bounds__(max_threads(kPlacement),
                                  least_blocks(kFunction, kTypes, kPlacement))
    rows_kernel(const __grid_constant__ Rows rows) {
  extern __shared__ uint4 shared[];
  let_the_next_kernel_start();
  if constexpr (kTypes != Types::kAny) {
    if (blockIdx.x < rows.fetched) {
      fetch_row<kTypes>(rows.task.x, blockIdx.x, rows.k);
      fetch_row<kTypes>(rows.task.second, blockIdx.x, rows.k);
    }
    if (blockIdx.x == 0) {
      fetch_vector(rows.task.weight, rows.k);
      fetch_vector(rows.task.bias, rows.k);
      fetch_lines(rows.output.order, int64_t{4 * mx::kBlock} * rows.output.blocks);
    }
  }
  wait_for_the_kernel_before();
  Block<kFunction, kTypes, kPlacement>(rows, shared).compute();
}

}  // namespace micromix::cuda
