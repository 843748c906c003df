// Eight neighbouring channels of two rows, as a thread quantises them together: a word has a
// channel of both.
#pragma once

#include "quantize_group.cuh"

namespace micromix::cuda {

using RowPair = uint32_t[8];

// Where a thread's codes of two rows go, and a scale of the first or the second row in the first
// two threads of a block.
struct PairOutput {
  const Output& out;
  const int group, block, part;
  const bool exchanges;  // codes between the threads of the warp
  const uint32_t data_step, scale_step;
  uint8_t* data;
  uint8_t* scale;

  // `step` rows from one pair to the next.
  __device__ __forceinline__ PairOutput(const Output& out, int row, int step)
      : out(out),
        group(threadIdx.x),
        block(group / 4),
        part(group % 4),
        exchanges(group / 32 * 8 < out.end6 && group / 32 * 8 + 8 > out.end4),
        data_step(static_cast<uint32_t>(step * out.row_bytes)),
        scale_step(static_cast<uint32_t>(step * out.blocks)) {
    const int at = block < out.end4    ? 4 * group
                   : block >= out.end6 ? out.start8 + 8 * (group - 4 * out.end6)
                                       : out.start6 + 24 * (block - out.end4) + 8 * part;
    data = out.data + row * out.row_bytes + at;
    scale = out.scales + (int64_t{row} + part) * out.blocks + block;
  }
  __device__ __forceinline__ void advance() {
    data += data_step;
    scale += scale_step;
  }

  // Of the first `count` rows. All threads of a warp call it.
  __device__ __forceinline__ void store(const Codes (&codes)[2], uint32_t bytes, int count) const {
    Codes next[2] = {};  // of the next thread: see store_part
    if (exchanges) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        next[i].low = __shfl_down_sync(kWarp, codes[i].low, 1);
        next[i].high = __shfl_down_sync(kWarp, codes[i].high, 1);
      }
    }
    if (block >= out.blocks) return;
    if (part < count) *scale = static_cast<uint8_t>(bytes >> 16 * (part % 2));
    const auto each = [&](auto store) {
      if (count > 0) store(data, 0);
      if (count > 1) store(data + out.row_bytes, 1);
    };
    if (block < out.end4) {
      each([&](uint8_t* at, int i) { *reinterpret_cast<uint32_t*>(at) = codes[i].low; });
    } else if (block >= out.end6) {
      each([&](uint8_t* at, int i) {
        *reinterpret_cast<uint2*>(at) = {codes[i].low, codes[i].high};
      });
    } else if (part < 3) {
      each([&](uint8_t* at, int i) { store_mxfp6(at, part, codes[i], next[i]); });
    }
  }
};

// The scales of two MXFP4 blocks of bfloat16 values, one in either half, and their inverses as
// bfloat16.
struct PairScales {
  uint32_t bytes, inverse;

  // `amax`: the largest magnitudes. They have zeros where an increment's last 16 bits are. The few
  // blocks with scale 0, whose slopes leave the range, become 2^64 times as large; those with a NaN
  // become zeros.
  __device__ __forceinline__ PairScales(uint32_t amax, uint32_t increment, RowPair& y) {
    constexpr uint32_t kEmax = mx::E2M1.emax, kBoth = 0x00010001;
    const uint32_t exponents = (amax + (increment >> 16) * kBoth) & 0x7F80 * kBoth;
    bytes = (exponents - (kEmax << 7) * kBoth) >> 7 & 0xFF * kBoth;
    inverse = ((254 + kEmax) << 7) * kBoth - exponents;
    const uint32_t tiny = exponents - ((kEmax + 1) << 7) * kBoth, nan = amax + (1 << 7) * kBoth;
    if ((tiny | nan) & 0x8000 * kBoth) [[unlikely]] {
      constexpr uint32_t kOne = 0x3F80, kLarge = 0x5F80;  // 2^64
      uint32_t keep = 0, factors = 0;
      bytes = inverse = 0;
#pragma unroll
      for (int shift = 0; shift < 32; shift += 16) {
        const uint32_t byte = mx::scale_byte((amax >> shift & 0x7FFF) << 16, increment, kEmax);
        const bool there = byte != mx::kNanScale;
        bytes |= byte << shift;
        keep |= (there ? 0xFFFFu : 0u) << shift;
        factors |= (byte == 0 ? kLarge : kOne) << shift;
        inverse |= (there ? (254 - byte - (byte == 0 ? 64 : 0)) << 7 : 0u) << shift;
      }
#pragma unroll
      for (int i = 0; i < 8; ++i) y[i] = product_of_pairs(y[i] & keep, factors, true);
    }
  }
};

// Quantises a group of eight channels of the first `count` rows. All threads of a warp call it,
// with neighbouring groups, the first of them the first of a block.
template <bool kBFloat16>
__device__ __forceinline__ void quantize_pair(const PairOutput& to, int row, int count,
                                              RowPair& y) {
  const Output& out = to.out;
  const auto values = [&](int i) {
    Values<8> v;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const float2 both = widen_pair(y[j], kBFloat16);
      v.v[j] = i == 0 ? both.x : both.y;
    }
    return v;
  };
  if (out.rotated != 0 && __any_sync(kWarp, rotates(out, to.block))) {
#pragma unroll 1
    for (int i = 0; i < count; ++i) quantize_group<8>(OutputRow(out, row + i), to.group, values(i));
    return;
  }
  uint32_t amax = y[0];
#pragma unroll
  for (int i = 1; i < 8; ++i) amax = largest_pair(amax, y[i], kBFloat16);
#pragma unroll
  for (int lanes = 1; lanes < 4; lanes *= 2)
    amax = largest_pair(amax, __shfl_xor_sync(kWarp, amax, lanes), kBFloat16);
  amax &= 0x7FFF7FFF;
  Codes codes[2] = {};
  uint32_t bytes;
  with_format(out, to.block, [&]<mx::ElementFormat kFormat>(uint32_t increment) {
    if constexpr (kFormat == mx::E2M1 && kBFloat16 && !MICROMIX_HAS_MX_CASTS) {
      const PairScales scales(amax, increment, y);
      const Slopes slopes(scales.inverse);
      const uint32_t low = encode_e2m1_of_bfloat16(y, slopes);
      const uint32_t high = encode_e2m1_of_bfloat16(y + 4, slopes);
      codes[0].low = permute_bytes<0x5410>(low, high);
      codes[1].low = permute_bytes<0x7632>(low, high);
      bytes = scales.bytes;
    } else {
      const float2 both = widen_pair(amax, kBFloat16);
      const auto encode_row = [&](int i, float of_row) {
        const int byte = mx::scale_byte(__float_as_uint(of_row), increment, kFormat.emax);
        if (byte != mx::kNanScale) codes[i] = encode<kFormat>(values(i).v, of_row, byte);
        return static_cast<uint32_t>(byte);
      };
      bytes = encode_row(0, both.x);
      bytes |= encode_row(1, both.y) << 16;
    }
  });
  to.store(codes, bytes, count);
}

}  // namespace micromix::cuda
