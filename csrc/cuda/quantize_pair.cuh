// Eight neighbouring channels of two rows, as a thread quantises them together: a word has a
// channel of both.
#pragma once

#include "quantize_group.cuh"

namespace micromix::cuda {

using RowPair = uint32_t[8];

// The values of the first or the second row.
template <bool kBFloat16>
__device__ __forceinline__ Values<8> values_of_row(const RowPair& y, int row) {
  Values<8> v;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float2 both = widen_pair(y[i], kBFloat16);
    v.v[i] = row == 0 ? both.x : both.y;
  }
  return v;
}

// What a thread is to do, which does not change from row to row, a bit each in one register. The
// first five bits are how far its row's scale lies in those of both rows.
struct Roles {
  static constexpr uint32_t kValues = 0x100, kSquares = 0x200, kExchanges = 0x400, kMxfp4 = 0x800;
  static constexpr uint32_t kCodes = 0x1000, kFirstScale = 0x2000, kSecondScale = 0x4000;
  static constexpr uint32_t kUpper = 0x8000;  // half of its eight lanes
  static constexpr uint32_t kOdd = 0x80000000;
  uint32_t bits;
  __device__ __forceinline__ bool operator()(uint32_t role) const {
    return role == kOdd ? static_cast<int32_t>(bits) < 0 : bits & role;
  }
};

// Where a thread's codes of two rows go, and in the first two threads of a block the scale of the
// first and of the second row.
template <bool kKept>
struct PairOutput {
  const Rows& rows;
  const Output& out;
  Roles roles;
  uint8_t* data;    // of the first row
  uint8_t* scales;  // of the first row, or of the second in the second thread of a block

  // For two rows, from `row` on.
  __device__ __forceinline__ PairOutput(const Rows& rows, int row) : rows(rows), out(rows.output) {
    find(row);
    const int first = threadIdx.x / 32 * 8;  // block of the warp
    // Codes between the threads of a warp, where it has a block of MXFP6.
    const bool exchanges = first < out.end6 && first + 8 > out.end4, there = block() < out.blocks;
    const uint32_t lane = threadIdx.x % 32;
    const auto role = [](bool is, uint32_t bit) { return is ? bit : 0; };
    roles.bits = kept_in_register<kKept>(
        role(part() & 1, 16) | role(lane & 1, Roles::kOdd) | role(lane & 4, Roles::kUpper) |
        role(lane % 4 == lane / 8, Roles::kSquares) |
        role((lane % 4 ^ 1) == lane / 8, Roles::kValues) | role(exchanges, Roles::kExchanges) |
        role(block() < out.end4, Roles::kMxfp4) | role(there, Roles::kCodes) |
        role(there && part() == 0, Roles::kFirstScale) |
        role(there && part() == 1, Roles::kSecondScale));
  }
  static __device__ __forceinline__ int block() { return threadIdx.x / 4; }
  static __device__ __forceinline__ int part() { return threadIdx.x % 4; }  // of a block

  __device__ __forceinline__ void find(int row) {
    const int group = threadIdx.x;
    const int at = block() < out.end4    ? 4 * group
                   : block() >= out.end6 ? out.start8 + 8 * (group - 4 * out.end6)
                                         : out.start6 + 24 * (block() - out.end4) + 8 * part();
    data = out.data + rows.data.before(row) + at;
    scales = out.scales + rows.scales.before(row + part()) + block();
  }
  // To the rows of the next turn: a third of the instructions that it takes to find them.
  __device__ __forceinline__ void go_on() { data += rows.data.turn, scales += rows.scales.turn; }
  // Of the first row and, where `both`, the second.
  __device__ __forceinline__ void store_scale(uint32_t bytes, bool both) const {
    if (roles(both ? Roles::kFirstScale | Roles::kSecondScale : Roles::kFirstScale))
      *scales = static_cast<uint8_t>(__funnelshift_r(bytes, 0, roles.bits));
  }
  // Calls `store` with the place of this thread's codes and the number of the row.
  template <typename Store>
  __device__ __forceinline__ void each_row(bool both, Store store) const {
    if (roles(Roles::kCodes)) store(data, 0);
    if (roles(Roles::kCodes) && both) store(data + rows.data.row, 1);
  }
  __device__ __forceinline__ void store4(const Codes (&codes)[2], bool both) const {
    each_row(both, [&](uint8_t* at, int i) { *reinterpret_cast<uint32_t*>(at) = codes[i].low; });
  }
  __device__ __forceinline__ void store8(const Codes (&codes)[2], bool both) const {
    each_row(both, [&](uint8_t* at, int i) {
      *reinterpret_cast<uint2*>(at) = {codes[i].low, codes[i].high};
    });
  }
};

// The scales of two blocks of bfloat16 values, one in either half, and their inverses as bfloat16.
template <mx::ElementFormat kFormat>
struct PairScales {
  uint32_t bytes, inverse;

  // `amax`: the largest magnitudes. `increments`: the upper half of the format's, in both halves;
  // the lower one would be added to zeros. The few blocks with scales below kLeast, whose slopes
  // leave the range, become 2^64 times as large; those with a NaN become zeros.
  __device__ __forceinline__ PairScales(uint32_t amax, uint32_t increments, RowPair& y) {
    constexpr uint32_t kEmax = kFormat.emax, kBoth = 0x00010001;
    constexpr uint32_t kLeast = Lines<kFormat.mantissa_bits>::kLeastScale;
    const uint32_t exponents = (amax + increments) & 0x7F80 * kBoth;
    bytes = (exponents - (kEmax << 7) * kBoth) >> 7 & 0xFF * kBoth;
    inverse = ((254 + kEmax) << 7) * kBoth - exponents;
    const uint32_t tiny = exponents - ((kEmax + kLeast) << 7) * kBoth,
                   nan = amax + (1 << 7) * kBoth;
    if ((tiny | nan) & 0x8000 * kBoth) [[unlikely]] {
      constexpr uint32_t kOne = 0x3F80, kLarge = 0x5F80;  // 2^64
      uint32_t keep = 0, factors = 0;
      bytes = inverse = 0;
#pragma unroll
      for (int shift = 0; shift < 32; shift += 16) {
        const uint32_t byte =
            mx::scale_byte((amax >> shift & 0x7FFF) << 16, increments << 16, kEmax);
        const bool there = byte != mx::kNanScale, small = byte < kLeast;
        bytes |= byte << shift;
        keep |= (there ? 0xFFFFu : 0u) << shift;
        factors |= (small ? kLarge : kOne) << shift;
        inverse |= (there ? (254 - byte - (small ? 64 : 0)) << 7 : 0u) << shift;
      }
#pragma unroll
      for (int i = 0; i < 8; ++i) y[i] = product_of_pairs(y[i] & keep, factors, true);
    }
  }
};

// The codes of two rows' values of a format, and their scales.
template <bool kBFloat16, mx::ElementFormat kFormat>
__device__ __forceinline__ uint32_t encode_pair(const Output& out, uint32_t increment,
                                                uint32_t amax, RowPair& y, Codes (&codes)[2]) {
  constexpr bool kPacked = kBFloat16 && !MICROMIX_HAS_MX_CASTS;
  if constexpr (kFormat == mx::E2M1 && kPacked) {
    const PairScales<kFormat> scales(amax, out.increments4, y);
    const Lines<1> lines(scales.inverse);
    const uint32_t low = encode_e2m1_of_bfloat16(y, lines);
    const uint32_t high = encode_e2m1_of_bfloat16(y + 4, lines);
    codes[0].low = permute_bytes<0x5410>(low, high);
    codes[1].low = permute_bytes<0x7632>(low, high);
    return scales.bytes;
  } else if constexpr (kFormat == mx::E2M3 && kPacked) {
    const PairScales<kFormat> scales(amax, out.increments6, y);
    encode_e2m3_of_bfloat16(y, Lines<3>(scales.inverse), codes);
    return scales.bytes;
  } else {
    const float2 both = widen_pair(amax, kBFloat16);
    const auto encode_row = [&](int i, float of_row) {
      const int byte = mx::scale_byte(__float_as_uint(of_row), increment, kFormat.emax);
      if (byte != mx::kNanScale)
        codes[i] = encode<kFormat>(values_of_row<kBFloat16>(y, i).v, of_row, byte);
      return static_cast<uint32_t>(byte);
    };
    const uint32_t byte = encode_row(0, both.x);
    return byte | encode_row(1, both.y) << 16;
  }
}

// Quantises a group of eight channels of a row and the next. All threads of a thread block call it,
// each with the group of its number.
template <bool kBFloat16, bool kKept>
__device__ __forceinline__ void quantize_pair(const PairOutput<kKept>& to, int row, int count,
                                              RowPair& y) {
  const Output& out = to.out;
  if (out.rotated != 0 && __any_sync(kWarp, rotates(out, to.block()))) {
#pragma unroll 1
    for (int i = 0; i < min(2, count - row); ++i)
      quantize_group<8>(OutputRow(out, row + i), threadIdx.x, values_of_row<kBFloat16>(y, i));
    return;
  }
  const bool both = row + 1 < count;
  uint32_t amax = y[0];
#pragma unroll
  for (int i = 1; i < 8; ++i) amax = largest_pair(amax, y[i], kBFloat16);
#pragma unroll
  for (int lanes = 1; lanes < 4; lanes *= 2)
    amax = largest_pair(amax, __shfl_xor_sync(kWarp, amax, lanes), kBFloat16);
  amax &= 0x7FFF7FFF;
  Codes codes[2] = {};
  if (!to.roles(Roles::kExchanges)) {  // the warp has no MXFP6
    if (to.roles(Roles::kMxfp4)) {
      to.store_scale(encode_pair<kBFloat16, mx::E2M1>(out, out.increment4, amax, y, codes), both);
      to.store4(codes, both);
    } else {
      to.store_scale(encode_pair<kBFloat16, mx::E4M3>(out, out.increment8, amax, y, codes), both);
      to.store8(codes, both);
    }
    return;
  }
  with_format(out, to.block(), [&]<mx::ElementFormat kFormat>(uint32_t increment) {
    to.store_scale(encode_pair<kBFloat16, kFormat>(out, increment, amax, y, codes), both);
  });
  Codes next[2];  // of the next thread: see store_part
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    next[i].low = __shfl_down_sync(kWarp, codes[i].low, 1);
    next[i].high = __shfl_down_sync(kWarp, codes[i].high, 1);
  }
  if (to.block() < out.end4) {
    to.store4(codes, both);
  } else if (to.block() >= out.end6) {
    to.store8(codes, both);
  } else if (to.part() < 3) {
    to.each_row(both, [&](uint8_t* at, int i) { store_mxfp6(at, to.part(), codes[i], next[i]); });
  }
}

}  // namespace micromix::cuda
