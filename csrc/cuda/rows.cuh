// The row kernel: one thread block computes one or two rows and quantises them for every output.
//
// A thread has a group of neighbouring channels at a time: 16 where they are quantised from
// registers (two threads a block of 32), 8 elsewhere. A row is read from memory once. It waits in
// shared memory where it is needed again: by a norm, between its sums and its values, and by an
// order, which gathers from it. Two rows of a 16-bit type lie interleaved there, so that one load
// of a gather, one index and one load of a norm's weight serve both.
//
// Types::kAny also takes rows that begin anywhere and any number of channels; the others need
// 16-byte alignment and a multiple of 16.
#pragma once

#include <type_traits>

#include "activations.cuh"
#include "vectors.cuh"

namespace micromix::cuda {

// How many thread blocks of the largest size have registers on a multiprocessor: 64 of them for
// each thread of a 16-bit type, where that spills nothing.
constexpr int least_blocks(RowFunction function, Types types, Placement placement) {
  if (!is_narrow(types)) return 1;
  if (placement != Placement::kDirect) return 2;
  return function == RowFunction::kLayerNorm ? 3 : 4;
}
constexpr unsigned kWarp = 0xFFFFFFFF;
constexpr unsigned kNan = 0x7FC00000;

__device__ __forceinline__ float largest(float a, float b) {  // NaN if one of them is
  float c;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(c) : "f"(a), "f"(b));
  return c;
}

// The largest magnitude of each block of 32, in all of its threads.
template <int kGroup>
__device__ __forceinline__ float block_amax(const Values<kGroup>& y) {
  float amax = fabsf(y.v[0]);
#pragma unroll
  for (int i = 1; i < kGroup; ++i) amax = largest(amax, fabsf(y.v[i]));
#pragma unroll
  for (int lanes = 1; lanes < mx::kBlock / kGroup; lanes *= 2)
    amax = largest(amax, __shfl_xor_sync(kWarp, amax, lanes));
  return amax;
}
// The same in pairs: of the two halves of all words.
template <int kLanes, int kWords>
__device__ __forceinline__ uint32_t block_amax_pair(const uint32_t (&words)[kWords],
                                                    bool bfloat16) {
  uint32_t amax = words[0] & 0x7FFF7FFF;
#pragma unroll
  for (int i = 1; i < kWords; ++i) amax = largest_pair(amax, words[i] & 0x7FFF7FFF, bfloat16);
#pragma unroll
  for (int lanes = 1; lanes < kLanes; lanes *= 2)
    amax = largest_pair(amax, __shfl_xor_sync(kWarp, amax, lanes), bfloat16);
  return amax;
}

// Where a row of an output goes.
struct OutputRow {
  const Output& out;
  uint8_t* const data;
  uint8_t* const scales;

  __device__ OutputRow(const Output& out, int64_t row)
      : out(out), data(out.data + row * out.row_bytes), scales(out.scales + row * out.blocks) {}
};

// Quantises a group of a block with the largest magnitude `amax`. All threads of a warp call it,
// with neighbouring groups, the first of them the first of a block.
template <bool kBFloat16, int kGroup>
__device__ __forceinline__ void quantize_group(const OutputRow& to, bool stores, int group,
                                               const Values<kGroup>& y, float amax) {
  constexpr int kThreads = mx::kBlock / kGroup;  // of a block
  const Output& out = to.out;
  const int block = group / kThreads, part = group % kThreads;
  const uint32_t bits = __float_as_uint(amax);
  Codes codes[kGroup / 8];
  int byte;
  const auto cast = [&]<mx::ElementFormat kFormat>(uint32_t increment) {
    byte = mx::scale_byte(bits, increment, kFormat.emax);
#pragma unroll
    for (int i = 0; i < kGroup / 8; ++i)
      codes[i] = encode<kFormat, kBFloat16>(y.v + 8 * i, amax, byte);
  };
  if (block < out.end4) {
    cast.template operator()<mx::E2M1>(out.increment4);
  } else if (block >= out.end6) {
    cast.template operator()<mx::E4M3>(out.increment8);
  } else if (out.e3m2) {
    cast.template operator()<mx::E3M2>(out.increment6);
  } else {
    cast.template operator()<mx::E2M3>(out.increment6);
  }
  if (byte == mx::kNanScale) {
#pragma unroll
    for (int i = 0; i < kGroup / 8; ++i) codes[i] = {};
  }

  // A block of MXFP6 is 24 bytes, stored 8 at a time by its first threads, with the codes of the
  // next.
  Codes next{};
  if (out.end6 > out.end4) {
    next.low = __shfl_down_sync(kWarp, codes[0].low, 1);
    if constexpr (kGroup == 8) next.high = __shfl_down_sync(kWarp, codes[0].high, 1);
  }
  if (block >= out.blocks || !stores) return;
  if (part == 0) to.scales[block] = static_cast<uint8_t>(byte);
  if (block < out.end4) {
    if constexpr (kGroup == 8) {
      *reinterpret_cast<uint32_t*>(to.data + 4 * group) = codes[0].low;
    } else {
      *reinterpret_cast<uint2*>(to.data + 8 * group) = {codes[0].low, codes[1].low};
    }
  } else if (block >= out.end6) {
    uint8_t* const at = to.data + out.start8 + kGroup * (group - kThreads * out.end6);
    if constexpr (kGroup == 16) {
      if (out.aligned8) {
        *reinterpret_cast<uint4*>(at) = {codes[0].low, codes[0].high, codes[1].low, codes[1].high};
        return;
      }
    }
#pragma unroll
    for (int i = 0; i < kGroup / 8; ++i)
      reinterpret_cast<uint2*>(at)[i] = {codes[i].low, codes[i].high};
  } else {
    auto* const at = reinterpret_cast<uint2*>(to.data + out.start6 + 24 * (block - out.end4));
    if constexpr (kGroup == 8) {
      // Six bytes a thread: the first three threads begin at bytes 0, 2 and 4 of theirs.
      const uint64_t own = codes[0].low | static_cast<uint64_t>(codes[0].high) << 32;
      const uint64_t after = next.low | static_cast<uint64_t>(next.high) << 32;
      const uint64_t eight = own >> (16 * part) | after << (48 - 16 * part);
      if (part < 3) at[part] = {static_cast<uint32_t>(eight), static_cast<uint32_t>(eight >> 32)};
    } else {
      const uint32_t middle = codes[0].high | codes[1].low << 16;
      const uint32_t last = codes[1].low >> 16 | codes[1].high << 16;
      if (part == 0) {
        at[0] = {codes[0].low, middle};
        at[1] = {last, next.low};
      } else {
        at[2] = {middle, last};
      }
    }
  }
}

// The sums over a thread block, the same in every thread; always in the same order.
template <int kRows>
__device__ __forceinline__ void block_sums(float (&x)[kRows]) {
  __shared__ float of_warp[kRows][32];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const auto warp_sum = [](float v) {
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) v += __shfl_xor_sync(kWarp, v, lanes);
    return v;
  };
#pragma unroll
  for (int r = 0; r < kRows; ++r) x[r] = warp_sum(x[r]);
  __syncthreads();  // the sums before these have been read
#pragma unroll
  for (int r = 0; r < kRows; ++r)
    if (lane == 0) of_warp[r][warp] = x[r];
  __syncthreads();
#pragma unroll
  for (int r = 0; r < kRows; ++r)
    x[r] = warp_sum(lane < static_cast<int>(blockDim.x) / 32 ? of_warp[r][lane] : 0.0f);
}

struct Statistics {
  float mean, factor;
};

// What a row function makes of a group: of x (of a norm: x + residual), the other operand, and the
// norm's vectors. Not rounded to the result's type.
template <RowFunction kFunction, Types kTypes, int kGroup>
__device__ __forceinline__ Values<kGroup> finish(const RowTask& task, Values<kGroup> y,
                                                 const Values<kGroup>& second,
                                                 const Values<kGroup>& weight,
                                                 const Values<kGroup>& bias,
                                                 const Statistics& of_row) {
  const Dtype x_type = type_of<kTypes>(task.x.dtype);
  const auto each = [&](auto f) {
#pragma unroll
    for (int i = 0; i < kGroup; ++i) y.v[i] = f(y.v[i], i);
  };
  if constexpr (kFunction == RowFunction::kPointwise) {
    activate(task.function, y);
    if (task.second.data == nullptr) return y;
    if (task.function == Pointwise::kAdd) {
      each([&](float v, int i) { return v + second.v[i]; });
      return y;
    }
    // An activation has a value of its own in the model, of x's type.
    if (task.function != Pointwise::kCast) y = rounded(y, x_type);
    each([&](float v, int i) { return v * second.v[i]; });
  } else if constexpr (kFunction == RowFunction::kRmsNorm) {
    each([&](float v, int) { return v * of_row.factor; });
    if (task.form == RmsForm::kWeightAfterCast) y = rounded(y, x_type);
    if (task.weight.data == nullptr) return y;
    if (task.form == RmsForm::kOnePlusWeight)
      each([&](float v, int i) { return v * (weight.v[i] + 1.0f); });
    else
      each([&](float v, int i) { return v * weight.v[i]; });
  } else {
    each([&](float v, int) { return (v - of_row.mean) * of_row.factor; });
    if (task.weight.data != nullptr) each([&](float v, int i) { return v * weight.v[i]; });
    if (task.bias.data != nullptr) each([&](float v, int i) { return v + bias.v[i]; });
  }
  return y;
}

// The rows of a thread block, as a thread sees them.
template <RowFunction kFunction, Types kTypes, Placement kPlacement, int kRows>
struct Block {
  static constexpr bool kNorm = kFunction != RowFunction::kPointwise;
  static constexpr bool kWhole = kTypes != Types::kAny;  // aligned, and whole groups
  static constexpr bool kBFloat16 = kTypes == Types::kBFloat16;
  static constexpr bool kDirect = kPlacement == Placement::kDirect;
  static constexpr int kGroup = kDirect && kWhole ? 16 : 8;
  static constexpr int kSlotBytes = slot_bytes(kTypes, kRows);
  static_assert(kRows == 1 || (is_narrow(kTypes) && kPlacement == Placement::kStaged));
  using Group = Values<kGroup>;
  using KeptGroup = Kept<kTypes, kGroup>;

  const Rows& rows;
  const RowTask& task;
  const int k;
  const int64_t first_row;
  char* const slots;  // of channel 0

  __device__ Block(const Rows& rows, void* shared)
      : rows(rows),
        task(rows.task),
        k(rows.k),
        first_row(int64_t{blockIdx.x} * kRows),
        slots(static_cast<char*>(shared) + kFirstSlot * kSlotBytes) {}

  __device__ bool has_row(int r) const { return r == 0 || first_row + r < rows.count; }
  __device__ bool has(int group) const { return kGroup * group < k; }

  __device__ KeptGroup load(const RowInput& from, int r, int group) const {
    const int64_t i = (first_row + r) * from.stride + kGroup * group;
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
  __device__ void store(void* to, Dtype dtype, int r, int group, const KeptGroup& x) const {
    const int64_t i = (first_row + r) * k + kGroup * group;
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
  __device__ KeptGroup load_sum(int r, int group) const {
    const KeptGroup kept = load(task.x, r, group);
    if (!kNorm || task.second.data == nullptr) return kept;
    Group x = kept.values();
    const Group second = load(task.second, r, group).values();
#pragma unroll
    for (int i = 0; i < kGroup; ++i) x.v[i] += second.v[i];
    return KeptGroup(rounded(x, type_of<kTypes>(task.x.dtype)));
  }

  // The words of a norm's group wait 16 bytes at a time: where the results of the same channels are
  // staged later, or, where none are, such that neighbouring threads have neighbouring places.
  static constexpr int kWaitingWords = kGroup * kSlotBytes / kRows / 4;
  __device__ uint4* waiting_place(int r, int group, int i) const {
    constexpr int kPieces = kWaitingWords / 4;
    const int piece =
        kDirect ? (r * kPieces + i) * (k / kGroup + 1) + group : (group * kRows + r) * kPieces + i;
    return reinterpret_cast<uint4*>(slots) + piece;
  }
  __device__ void wait(int r, int group, const KeptGroup& x) const {
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
      *waiting_place(r, group, i) = {words[4 * i], words[4 * i + 1], words[4 * i + 2],
                                     words[4 * i + 3]};
  }
  __device__ KeptGroup waiting(int r, int group) const {
    if constexpr (kPlacement == Placement::kRecomputed) {
      return load_sum(r, group);
    } else {
      KeptGroup x;
#pragma unroll
      for (int i = 0; i < kWaitingWords / 4; ++i) {
        const uint4 four = *waiting_place(r, group, i);
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

  __device__ void statistics(Statistics (&of_rows)[kRows]) const {
    float sum[kRows] = {};
#pragma unroll 2
    for (int group = threadIdx.x; has(group); group += blockDim.x) {
      KeptGroup x[kRows];
#pragma unroll
      for (int r = 0; r < kRows; ++r)
        if (has_row(r)) x[r] = load_sum(r, group);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (task.sum != nullptr && has_row(r)) store(task.sum, task.x.dtype, r, group, x[r]);
        if constexpr (kPlacement != Placement::kRecomputed) wait(r, group, x[r]);
        const Group y = x[r].values();
#pragma unroll
        for (int i = 0; i < kGroup; ++i)
          sum[r] += kFunction == RowFunction::kRmsNorm ? y.v[i] * y.v[i] : y.v[i];
      }
    }
    block_sums(sum);
    const auto inverse_root = [&](float total) {
      return 1.0f / sqrtf(total / static_cast<float>(k) + task.eps);
    };
    if constexpr (kFunction == RowFunction::kRmsNorm) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) of_rows[r] = {0.0f, inverse_root(sum[r])};
    } else {
      float squares[kRows] = {};
#pragma unroll
      for (int r = 0; r < kRows; ++r) of_rows[r].mean = sum[r] / static_cast<float>(k);
      for (int group = threadIdx.x; has(group); group += blockDim.x) {
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          Group x = waiting(r, group).values();
          if constexpr (!kWhole) pad(group, x, of_rows[r].mean);
#pragma unroll
          for (int i = 0; i < kGroup; ++i) {
            const float d = x.v[i] - of_rows[r].mean;
            squares[r] += d * d;
          }
        }
      }
      block_sums(squares);
#pragma unroll
      for (int r = 0; r < kRows; ++r) of_rows[r].factor = inverse_root(squares[r]);
    }
  }

  // The results of a group, rounded to their type, and stored where they are kept.
  __device__ void results(int group, const Statistics (&of_rows)[kRows],
                          KeptGroup (&y)[kRows]) const {
    const Dtype dtype = type_of<kTypes>(task.dtype);
    Group weight{}, bias{};
    if constexpr (kNorm) {
      weight = load_vector(task.weight, group);
      bias = load_vector(task.bias, group);
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (!has_row(r)) continue;
      Group second{};
      const KeptGroup x = kNorm ? waiting(r, group) : load(task.x, r, group);
      if (!kNorm && kWhole && task.function == Pointwise::kCast && task.second.data == nullptr) {
        y[r] = x;  // nothing to compute
        if (task.kept != nullptr) store(task.kept, dtype, r, group, y[r]);
        continue;
      }
      if (!kNorm && task.second.data != nullptr) second = load(task.second, r, group).values();
      y[r] = KeptGroup(rounded(
          finish<kFunction, kTypes, kGroup>(task, x.values(), second, weight, bias, of_rows[r]),
          is_narrow(kTypes) ? Dtype::kFloat32 : dtype));
      if (task.kept != nullptr) store(task.kept, dtype, r, group, y[r]);
    }
  }

  __device__ void pad(int group, Group& y, float with) const {  // beyond the last channel
#pragma unroll
    for (int i = 0; i < kGroup; ++i)
      if (kGroup * group + i >= k) y.v[i] = with;
  }

  __device__ void stage(int group, KeptGroup (&y)[kRows]) const {
    if constexpr (kRows == 2) {
      uint32_t pairs[kGroup];
#pragma unroll
      for (int i = 0; i < kGroup / 2; ++i) {
        pairs[2 * i] = permute_bytes<0x5410>(y[0].bits.word[i], y[1].bits.word[i]);
        pairs[2 * i + 1] = permute_bytes<0x7632>(y[0].bits.word[i], y[1].bits.word[i]);
      }
      store_words(slots + kGroup * group * kSlotBytes, pairs);
    } else {
      if constexpr (!kWhole) pad(group, y[0].x, __uint_as_float(kNan));
      wait(0, group, y[0]);
    }
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
    if constexpr (kRows == 2) {
      const float2 amax = widen_pair(block_amax_pair<4>(words, kBFloat16), kBFloat16);
      Values<8> y[2];
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const float2 pair = widen_pair(words[i], kBFloat16);
        y[0].v[i] = pair.x, y[1].v[i] = pair.y;
      }
      quantize_group<kBFloat16>(OutputRow(out, first_row), true, group, y[0], amax.x);
      quantize_group<kBFloat16>(OutputRow(out, first_row + 1), has_row(1), group, y[1], amax.y);
    } else {
      Values<8> y;
#pragma unroll
      for (int i = 0; i < 8; ++i)
        y.v[i] = kSlotBytes == 4 ? __uint_as_float(words[i])
                                 : widen(static_cast<uint16_t>(words[i]), kBFloat16);
      quantize_group<kBFloat16>(OutputRow(out, first_row), true, group, y, block_amax(y));
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
        if (there(i))
          x.v[i] = load_one(from.data, from.dtype, first_row * from.stride + channels[i]);
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
    quantize_group<false>(OutputRow(out, first_row), true, group, y, block_amax(y));
  }

  __device__ void compute_direct(const Statistics (&of_rows)[kRows]) const {
    const Output& out = rows.output[0];
    const int groups = out.blocks * (mx::kBlock / kGroup);
    for (int first = 0; first < groups; first += blockDim.x) {
      const int group = first + threadIdx.x;
      KeptGroup kept[kRows];
      if (has(group)) results(group, of_rows, kept);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const OutputRow to(out, first_row + r);
        if constexpr (is_narrow(kTypes)) {
          const uint32_t halves =
              block_amax_pair<mx::kBlock / kGroup>(kept[r].bits.word, kBFloat16);
          const float2 amax = widen_pair(halves, kBFloat16);
          quantize_group<kBFloat16>(to, has_row(r), group, kept[r].values(),
                                    largest(amax.x, amax.y));
        } else {
          Group y = kept[r].values();
          if constexpr (!kWhole) pad(group, y, 0.0f);
          quantize_group<false>(to, true, group, y, block_amax(y));
        }
      }
    }
  }

  __device__ void compute() const {
    Statistics of_rows[kRows] = {};
    if constexpr (kNorm) statistics(of_rows);
    if constexpr (kDirect) {
      compute_direct(of_rows);
    } else {
      for (int group = threadIdx.x; has(group); group += blockDim.x) {
        KeptGroup y[kRows];
        results(group, of_rows, y);
        if constexpr (kPlacement == Placement::kStaged) stage(group, y);
      }
      if constexpr (kPlacement == Placement::kStaged) {
        stage_ends();
        __syncthreads();
      }
      for (int o = 0; o < rows.outputs; ++o) {
        const Output out = rows.output[o];
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
            quantize_recomputed(out, group, channels, of_rows[0]);
          }
        }
      }
    }
  }
};

template <RowFunction kFunction, Types kTypes, Placement kPlacement, int kRows>
__global__ void __launch_bounds__(max_threads(kPlacement),
                                  least_blocks(kFunction, kTypes, kPlacement))
    rows_kernel(const __grid_constant__ Rows rows) {
  extern __shared__ uint4 shared[];
  Block<kFunction, kTypes, kPlacement, kRows>(rows, shared).compute();
}

template <RowFunction kFunction>
cudaError_t launch(const Rows& rows, const Launch& launch) {
  using Kernel = void (*)(Rows);
  constexpr auto kDirect = Placement::kDirect, kStaged = Placement::kStaged;
  constexpr auto kBFloat16 = Types::kBFloat16, kFloat16 = Types::kFloat16;
  constexpr auto kFloat32 = Types::kFloat32, kAny = Types::kAny;
  // By type: direct, staged, and staged with two rows.
  static constexpr Kernel kKernels[4][3] = {
      {rows_kernel<kFunction, kBFloat16, kDirect, 1>, rows_kernel<kFunction, kBFloat16, kStaged, 1>,
       rows_kernel<kFunction, kBFloat16, kStaged, 2>},
      {rows_kernel<kFunction, kFloat16, kDirect, 1>, rows_kernel<kFunction, kFloat16, kStaged, 1>,
       rows_kernel<kFunction, kFloat16, kStaged, 2>},
      {rows_kernel<kFunction, kFloat32, kDirect, 1>, rows_kernel<kFunction, kFloat32, kStaged, 1>},
      {rows_kernel<kFunction, kAny, kDirect, 1>, rows_kernel<kFunction, kAny, kStaged, 1>}};
  const Kernel kernel = launch.placement == Placement::kRecomputed
                            ? rows_kernel<kFunction, kAny, Placement::kRecomputed, 1>
                            : kKernels[static_cast<int>(launch.types)]
                                      [launch.placement == kDirect ? 0 : launch.rows_each];
  if (launch.bytes > 48 * 1024) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, launch.bytes);
    if (error != cudaSuccess) return error;
  }
  const unsigned blocks = (rows.count + launch.rows_each - 1) / launch.rows_each;
  kernel<<<blocks, launch.threads, launch.bytes, launch.stream>>>(rows);
  return cudaGetLastError();
}

}  // namespace micromix::cuda
