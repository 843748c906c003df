// Eight neighbouring codes of a packed row to bfloat16, and what becomes of their products.
//
// Placed where a bfloat16 number has its exponent and its mantissa, a code is the element times
// 2^(the format's bias - 127), subnormals included. One packed product by the scale and what that
// is short of gives the element under its scale, exactly.
#pragma once

#include "arranged_codes.h"
#include "decode.h"
#include "vectors.cuh"

namespace micromix::cuda {

constexpr int kGroups = mx::kBlock / 8;  // of eight channels in a block

// The factor, in both halves, of a block with this scale byte in a row whose largest is `largest`:
// bfloat16's exponent of the power of two. Zero where that is too small for a normal number, which
// is 2^246 and more below the row's largest.
template <mx::ElementFormat kFormat>
__device__ __forceinline__ uint32_t factor_of_block(int scale, int largest) {
  constexpr uint32_t kUnits = 0x00800080;  // of the exponents
  const int exponent = max(2 * mx::kFloat32Bias - kFormat.bias + scale - largest, 0);
  return scale == mx::kNanScale ? 0x7FFF7FFF : static_cast<uint32_t>(exponent) * kUnits;
}

// Channels i and i + 4 in the halves of word i: the order of Pairs. All operands of a product have
// their channels in the same order.
using Eight = uint4;

// What is placed where bfloat16 has it, under a factor.
__device__ __forceinline__ Eight scaled(const uint32_t (&placed)[4], uint32_t factor) {
  return {product_of_pairs(placed[0], factor, true), product_of_pairs(placed[1], factor, true),
          product_of_pairs(placed[2], factor, true), product_of_pairs(placed[3], factor, true)};
}

__device__ __forceinline__ Eight decode_e2m1(uint32_t codes, uint32_t factor) {
  constexpr uint32_t kMagnitudes = 0x01C001C0, kSigns = 0x80008000;
  const uint32_t placed[4] = {(codes << 6 & kMagnitudes) | (codes << 12 & kSigns),
                              (codes << 2 & kMagnitudes) | (codes << 8 & kSigns),
                              (codes >> 2 & kMagnitudes) | (codes << 4 & kSigns),
                              (codes >> 6 & kMagnitudes) | (codes & kSigns)};
  return scaled(placed, factor);
}

// E2M3 or E3M2: four codes in the lower 24 bits of either word.
template <mx::ElementFormat kFormat>
__device__ __forceinline__ Eight decode_mxfp6(uint32_t lower, uint32_t upper, uint32_t factor) {
  uint32_t placed[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t codes = permute_bytes<0x5410>(lower >> (6 * i), upper >> (6 * i));
    placed[i] = (codes & 0x001F001F) << (7 - kFormat.mantissa_bits) | (codes & 0x00200020) << 10;
  }
  return scaled(placed, factor);
}

// Four codes in either word.
__device__ __forceinline__ Eight decode_e4m3(uint32_t lower, uint32_t upper, uint32_t factor) {
  const auto place = [](uint32_t codes) {  // in the upper bytes of both halves
    return (codes >> 4 & 0x07F007F0) | (codes & 0x80008000);
  };
  const uint32_t placed[4] = {
      place(permute_bytes<0x4000>(lower, upper)), place(permute_bytes<0x5010>(lower, upper)),
      place(permute_bytes<0x6020>(lower, upper)), place(permute_bytes<0x7030>(lower, upper))};
  Eight y = scaled(placed, factor);
  const auto nans = [](uint32_t codes) { return (codes & 0x7F7F7F7F) + 0x01010101 & 0x80808080; };
  if (nans(lower) | nans(upper)) [[unlikely]] {
    const auto mark = [](uint32_t& word, uint32_t placed) {
      word |= ((placed & 0x07F007F0) + 0x00100010 >> 11 & 0x00010001) * 0x7FFF;
    };
    mark(y.x, placed[0]), mark(y.y, placed[1]), mark(y.z, placed[2]), mark(y.w, placed[3]);
  }
  return y;
}

// The codes of a block as it is placed, decoded in groups of eight.
template <mx::ElementFormat kFormat>
struct BlockCodes {
  static constexpr int kWords = kFormat.bits;  // of 32 bits
  static constexpr int kParts = kWords > 4 ? 2 : 1;
  uint32_t word[kWords];

  // `load`: 16 or 8 bytes of a chunk, from there on, to words.
  template <typename Load>
  __device__ __forceinline__ BlockCodes(int lane, int row, const Load& load) {
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      const int from = place_in_chunk(kFormat.bits, lane, row, part);
      if (4 * part + 4 <= kWords) {
        const uint4 four = load.template words<uint4>(from);
        word[4 * part] = four.x, word[4 * part + 1] = four.y;
        word[4 * part + 2] = four.z, word[4 * part + 3] = four.w;
      } else {
        const uint2 two = load.template words<uint2>(from);
        word[4 * part] = two.x, word[4 * part + 1] = two.y;
      }
    }
  }
  __device__ __forceinline__ Eight decode(int g, uint32_t factor) const {
    constexpr int kOfUnit = kUnitRegisters<kFormat> / 4;
    const uint32_t* const unit = word + g / kOfUnit * kUnitWords<kFormat>;
    uint32_t placed[4] = {};
    if (g % kOfUnit == 0) {
      take_registers<kFormat, 0>(unit, placed);
    } else {
      take_registers<kFormat, 4>(unit, placed);
    }
    return scaled(placed, factor);
  }
};

// From a chunk in memory that no kernel running now writes.
struct ChunkInMemory {
  const uint8_t* chunk;

  template <typename Words>
  __device__ __forceinline__ Words words(int from) const {
    return __ldg(reinterpret_cast<const Words*>(chunk + from));
  }
  // Of the lane's two rows, in the lower two bytes.
  template <mx::ElementFormat kFormat>
  __device__ __forceinline__ uint32_t scales(int lane) const {
    return __ldg(reinterpret_cast<const uint16_t*>(chunk + place_of_scale(kFormat.bits, lane, 0)));
  }
};

// Eight neighbouring codes of a packed row, group g of a block, as they were loaded, and its scale.
struct PackedGroup {
  uint32_t codes[3] = {}, scale = 0;  // zeros
};
__device__ __forceinline__ PackedGroup load_group(const PackedRows& rows, int64_t row, int block,
                                                  int g) {
  const uint8_t* const data = rows.data + row * rows.row_bytes;
  PackedGroup x;
  x.scale = __ldg(rows.scales + row * rows.blocks + block);
  if (block < rows.end4) {
    x.codes[0] = __ldg(reinterpret_cast<const uint32_t*>(data) + block * kGroups + g);
  } else if (block < rows.end6) {
    const auto* const halves = reinterpret_cast<const uint16_t*>(data + rows.start6) +
                               3 * ((block - rows.end4) * kGroups + g);
#pragma unroll
    for (int i = 0; i < 3; ++i) x.codes[i] = __ldg(halves + i);
  } else {
    const uint2 two = __ldg(reinterpret_cast<const uint2*>(data + rows.start8) +
                            (block - rows.end6) * kGroups + g);
    x.codes[0] = two.x, x.codes[1] = two.y;
  }
  return x;
}
// In a row whose largest scale is `largest`.
__device__ __forceinline__ Eight decode_group(const PackedRows& rows, const PackedGroup& x,
                                              int block, int largest) {
  const int scale = static_cast<int>(x.scale);
  if (block < rows.end4) return decode_e2m1(x.codes[0], factor_of_block<mx::E2M1>(scale, largest));
  if (block < rows.end6) {
    const uint32_t low = x.codes[0] | x.codes[1] << 16;
    const uint32_t upper = __funnelshift_r(low, x.codes[2], 24);
    return rows.e3m2
               ? decode_mxfp6<mx::E3M2>(low, upper, factor_of_block<mx::E3M2>(scale, largest))
               : decode_mxfp6<mx::E2M3>(low, upper, factor_of_block<mx::E2M3>(scale, largest));
  }
  return decode_e4m3(x.codes[0], x.codes[1], factor_of_block<mx::E4M3>(scale, largest));
}

// Group g of the four blocks of a step, of one row, to the tiles that many_rows.cu reads: the four
// lanes' operands of two matrix instructions, which are pieces of 16 bytes. In a slice a piece lies
// where a swizzle of 128 bytes has it.
__device__ __forceinline__ void store_tile_group(uint4* tiles, int64_t padded, int64_t row,
                                                 int step, int g,
                                                 const Eight (&of_blocks)[kStepBlocks]) {
  const auto& [a, b, c, d] = of_blocks;
  const uint4 pieces[4] = {
      {a.x, b.x, c.x, d.x}, {a.y, b.y, c.y, d.y}, {a.z, b.z, c.z, d.z}, {a.w, b.w, c.w, d.w}};
  constexpr int kPieces = kSliceBytes / 16;
  uint4* const slice = tiles + ((2 * step + g / 2) * padded + row) * kPieces;
#pragma unroll
  for (int i = 0; i < 4; ++i) slice[(4 * (g % 2) + i) ^ (row % kPieces)] = pieces[i];
}

// The largest of a row's scales that are numbers, found by the lanes of a warp.
__device__ __forceinline__ int largest_scale(const uint8_t* scales, int blocks, int first,
                                             int apart) {
  int largest = 0;
  for (int b = first; b < blocks; b += apart) {
    const int scale = __ldg(scales + b);
    if (scale != mx::kNanScale) largest = max(largest, scale);
  }
  return __reduce_max_sync(kWarp, largest);
}

// 2^(largest - 127) as the product of two powers of two: that of a row and a column may be beyond
// the type.
struct Power {
  float a, b;

  __device__ __forceinline__ explicit Power(int largest) {
    const int power = largest - mx::kFloat32Bias;
    a = power_of_two(power / 2), b = power_of_two(power - power / 2);
  }
  // Halves that are not of one size meet each other's: both products are numbers.
  __device__ __forceinline__ Power(const Power& x, const Power& y) : a(x.a * y.b), b(x.b * y.a) {}
  // x times the power of two, plus y, rounded once.
  __device__ __forceinline__ float times(float x, float y) const { return fmaf(x * a, b, y); }
};

// What a sum needs to become result [m, n]; it can be loaded before the sum is there.
struct Finish {
  int largest_of_row, largest_of_column;
  float added;
};
__device__ __forceinline__ Finish load_finish(const Results& to, int64_t m, int64_t n) {
  return {__ldg(to.largest_of_rows + m), __ldg(to.largest_of_columns + n),
          to.bias ? load_one(to.bias, to.bias_dtype, n) : 0.0f};
}
__device__ __forceinline__ void store_finished(const Results& to, float sum, const Finish& finish,
                                               int64_t m, int64_t n) {
  const Power power(Power(finish.largest_of_row), Power(finish.largest_of_column));
  store_any<1>(to.out, to.out_dtype, m * to.stride + n, 1, {power.times(sum, finish.added)});
}

}  // namespace micromix::cuda
