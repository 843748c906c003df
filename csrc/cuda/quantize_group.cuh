// A group of neighbouring channels of a row, as a thread quantises it: the rotation and the scale
// of its block, its codes, and where they go.
#pragma once

#include "vectors.cuh"

namespace micromix::cuda {

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
template <bool kBFloat16, int kGroup>
__device__ __forceinline__ float block_amax(const Pairs<kGroup>& y) {
  uint32_t amax = y.word[0];
#pragma unroll
  for (int i = 1; i < kGroup / 2; ++i) amax = largest_pair(amax, y.word[i], kBFloat16);
#pragma unroll
  for (int lanes = 1; lanes < mx::kBlock / kGroup; lanes *= 2)
    amax = largest_pair(amax, __shfl_xor_sync(kWarp, amax, lanes), kBFloat16);
  amax &= 0x7FFF7FFF;
  const float2 halves = widen_pair(amax, kBFloat16);
  return largest(halves.x, halves.y);
}

// mx::hadamard of a block that lies in neighbouring threads: the same sums in the same order.
template <int kGroup>
__device__ __forceinline__ Values<kGroup> rotated(Values<kGroup> y) {
#pragma unroll
  for (int distance = 1; distance < kGroup; distance *= 2) {
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      if (i & distance) continue;
      const float low = y.v[i], high = y.v[i + distance];
      y.v[i] = low + high;
      y.v[i + distance] = low - high;
    }
  }
#pragma unroll
  for (int lanes = 1; lanes < mx::kBlock / kGroup; lanes *= 2) {
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      const float other = __shfl_xor_sync(kWarp, y.v[i], lanes);
      y.v[i] = threadIdx.x & lanes ? other - y.v[i] : y.v[i] + other;
    }
  }
#pragma unroll
  for (int i = 0; i < kGroup; ++i) y.v[i] *= mx::kHadamardNorm;
  return y;
}

// Where a row of an output goes.
struct OutputRow {
  const Output& out;
  uint8_t* const data;
  uint8_t* const scales;

  __device__ OutputRow(const Output& out, int64_t row)
      : out(out), data(out.data + row * out.row_bytes), scales(out.scales + row * out.blocks) {}
};

// Calls `cast` with the format of a block and the increment of its scale, as constants.
template <typename Cast>
__device__ __forceinline__ void with_format(const Output& out, int block, Cast cast) {
  if (block < out.end4) {
    cast.template operator()<mx::E2M1>(out.increment4);
  } else if (block >= out.end6) {
    cast.template operator()<mx::E4M3>(out.increment8);
  } else if (out.e3m2) {
    cast.template operator()<mx::E3M2>(out.increment6);
  } else {
    cast.template operator()<mx::E2M3>(out.increment6);
  }
}

// Stores eight bytes of a block of MXFP6 whose four threads have six bytes each: the first three
// begin at bytes 0, 2 and 4 of theirs, and end with those of the `next`.
__device__ __forceinline__ void store_mxfp6(void* to, int part, const Codes& codes,
                                            const Codes& next) {
  constexpr uint32_t kFirst = 0x3210, kMiddle = 0x5432, kEnds = 0x5410;  // of two words
  const bool first = part == 0, last = part == 2;
  const uint32_t begin = __byte_perm(last ? codes.high : codes.low, last ? next.low : codes.high,
                                     first  ? kFirst
                                     : last ? kEnds
                                            : kMiddle);
  const uint32_t end = __byte_perm(first ? codes.high : next.low, first ? next.low : next.high,
                                   first  ? kEnds
                                   : last ? kMiddle
                                          : kFirst);
  *static_cast<uint2*>(to) = {begin, end};
}

// Stores the codes of part of a block; the first part stores its scale too.
template <int kGroup>
__device__ __forceinline__ void store_part(const OutputRow& to, int group,
                                           const Codes (&codes)[kGroup / 8], int byte) {
  constexpr int kThreads = mx::kBlock / kGroup;  // of a block
  const Output& out = to.out;
  const int block = group / kThreads, part = group % kThreads;
  // A block of MXFP6 is 24 bytes, stored 8 at a time by its first threads, with the codes of the
  // next.
  Codes next{};
  const int first = block - threadIdx.x % 32 / kThreads;  // block of the warp
  if (first < out.end6 && first + 32 / kThreads > out.end4) {
    next.low = __shfl_down_sync(kWarp, codes[0].low, 1);
    if constexpr (kGroup == 8) next.high = __shfl_down_sync(kWarp, codes[0].high, 1);
  }
  if (block >= out.blocks) return;
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
      if (part < 3) store_mxfp6(at + part, part, codes[0], next);
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

// Stores the codes of a group, and the scale of its block. All threads of a warp call it.
template <int kGroup>
__device__ __forceinline__ void store_codes(const OutputRow& to, int group,
                                            Codes (&codes)[kGroup / 8], int byte) {
  const Output& out = to.out;
  const int block = group / (mx::kBlock / kGroup);
  if (byte == mx::kNanScale) {
#pragma unroll
    for (int i = 0; i < kGroup / 8; ++i) codes[i] = {};
  }

  if constexpr (kGroup == mx::kBlock) {
    if (block >= out.blocks) return;
    to.scales[block] = static_cast<uint8_t>(byte);
    // 16 bytes at a time where rows are aligned to that, else 8.
    const auto store = [&]<int kWords>(uint8_t* at, bool aligned, const uint32_t (&words)[kWords]) {
      if (aligned) {
        store_words(at, words);
      } else {
#pragma unroll
        for (int i = 0; i < kWords / 2; ++i)
          reinterpret_cast<uint2*>(at)[i] = {words[2 * i], words[2 * i + 1]};
      }
    };
    if (block < out.end4) {
      const uint32_t words[4] = {codes[0].low, codes[1].low, codes[2].low, codes[3].low};
      store(to.data + 16 * block, out.aligned4, words);
    } else if (block >= out.end6) {
      const uint32_t words[8] = {codes[0].low, codes[0].high, codes[1].low, codes[1].high,
                                 codes[2].low, codes[2].high, codes[3].low, codes[3].high};
      store(to.data + out.start8 + 32 * (block - out.end6), out.aligned8, words);
    } else {
      const auto three = [](const Codes& a, const Codes& b, uint32_t* words) {
        words[0] = a.low;
        words[1] = a.high | b.low << 16;
        words[2] = b.low >> 16 | b.high << 16;
      };
      uint32_t words[6];
      three(codes[0], codes[1], words);
      three(codes[2], codes[3], words + 3);
      store(to.data + out.start6 + 24 * (block - out.end4), false, words);
    }
  } else {
    store_part<kGroup>(to, group, codes, byte);
  }
}

__device__ __forceinline__ bool rotates(const Output& out, int block) {
  return out.rotated >> (block < out.end4 ? 0 : block < out.end6 ? 1 : 2) & 1;
}

// Quantises a group. All threads of a warp call it, with neighbouring groups, the first of them the
// first of a block.
template <int kGroup>
__device__ __forceinline__ void quantize_group(const OutputRow& to, int group, Values<kGroup> y) {
  const int block = group / (mx::kBlock / kGroup);
  const bool turns = to.out.rotated != 0 && rotates(to.out, block);
  if (to.out.rotated != 0 && __any_sync(kWarp, turns)) {
    const Values<kGroup> turned = rotated(y);
    if (turns) y = turned;
  }
  const float amax = block_amax(y);
  Codes codes[kGroup / 8];
  int byte;
  with_format(to.out, block, [&]<mx::ElementFormat kFormat>(uint32_t increment) {
    byte = mx::scale_byte(__float_as_uint(amax), increment, kFormat.emax);
#pragma unroll
    for (int i = 0; i < kGroup / 8; ++i) codes[i] = encode<kFormat>(y.v + 8 * i, amax, byte);
  });
  store_codes<kGroup>(to, group, codes, byte);
}
template <bool kBFloat16, int kGroup>
__device__ __forceinline__ void quantize_group(const OutputRow& to, int group,
                                               const Pairs<kGroup>& y) {
  const int block = group / (mx::kBlock / kGroup);
  if (to.out.rotated != 0 && __any_sync(kWarp, rotates(to.out, block)))
    return quantize_group<kGroup>(to, group, unpack(y, kBFloat16));
  const float amax = block_amax<kBFloat16>(y);
  Codes codes[kGroup / 8];
  int byte;
  with_format(to.out, block, [&]<mx::ElementFormat kFormat>(uint32_t increment) {
    byte = mx::scale_byte(__float_as_uint(amax), increment, kFormat.emax);
    if constexpr (kFormat == mx::E2M1 && kBFloat16 && !MICROMIX_HAS_MX_CASTS) {
      if (byte >= Lines<1>::kLeastScale) [[likely]] {
        const auto lines = Lines<1>::of_block(byte);
#pragma unroll
        for (int i = 0; i < kGroup / 8; ++i)
          codes[i] = {encode_e2m1_of_bfloat16(y.word + 4 * i, lines), 0};
        return;
      }
    }
    if constexpr (kFormat == mx::E2M3 && kBFloat16 && !MICROMIX_HAS_MX_CASTS) {
      if (byte >= Lines<3>::kLeastScale) [[likely]] {
        const auto lines = Lines<3>::of_block(byte);
#pragma unroll
        for (int i = 0; i < kGroup / 8; ++i)
          codes[i] = encode_e2m3_of_bfloat16(y.word + 4 * i, lines);
        return;
      }
    }
    const Values<kGroup> wide = unpack(y, kBFloat16);
#pragma unroll
    for (int i = 0; i < kGroup / 8; ++i) codes[i] = encode<kFormat>(wide.v + 8 * i, amax, byte);
  });
  store_codes<kGroup>(to, group, codes, byte);
}

}  // namespace micromix::cuda
