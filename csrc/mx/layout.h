// The device-neutral packed row: k4 channels of MXFP4, then k6 of MXFP6, then k8 of MXFP8, packed
// side by side, and one scale byte per 32 channels. micromix_compile/mx/{layout,bits}.py say the
// same in torch.
#pragma once

#include <array>

#include "scales.h"

namespace mx {

// Consecutive blocks of one element format. `byte_start` is where their elements begin in a row.
struct Segment {
  ElementFormat format;
  ScaleRule rule;
  int64_t first_block;
  int64_t blocks;
  int64_t byte_start;
  bool hadamard;  // the blocks are rotated before they are cast
};

MX_HOST_DEVICE constexpr int64_t block_bytes(ElementFormat format) {
  return format.bits * kBlock / 8;
}

// The layout that the operators' arguments (k4, k6, k8, format) name. See MixedLayout.code.
struct MixedLayout {
  int64_t k4, k6, k8;
  int code;

  static constexpr int kFormat6Bit = 0b01;
  static constexpr int kWeightIsMxfp4Bit = 0b10;
  static constexpr int kHadamardShift = 9;  // one bit a segment; bit 8 is ops.EMULATED
  // Of place_weight and the weight-only products; no matter of the layout.
  static constexpr int kWeightOnlyBit = 1 << 12;
  static constexpr int kCodes = 1 << 13;

  MX_HOST_DEVICE constexpr bool valid() const {
    if (k4 < 0 || k6 < 0 || k8 < 0 || code < 0 || code >= kCodes || code & 1 << 8) return false;
    if (k4 % kBlock || k6 % kBlock || k8 % kBlock) return false;
    return rule_code(0) <= 2 && rule_code(1) <= 2 && rule_code(2) <= 2;
  }
  MX_HOST_DEVICE constexpr int rule_code(int segment) const {
    return (code >> (2 + 2 * segment)) & 0b11;
  }
  MX_HOST_DEVICE constexpr bool hadamard(int segment) const {
    return (code >> (kHadamardShift + segment)) & 1;
  }
  MX_HOST_DEVICE constexpr bool rotates_any() const {
    return (k4 && hadamard(0)) || (k6 && hadamard(1)) || (k8 && hadamard(2));
  }
  MX_HOST_DEVICE constexpr ElementFormat format6() const {
    return code & kFormat6Bit ? E3M2 : E2M3;
  }
  MX_HOST_DEVICE constexpr int64_t channels() const { return k4 + k6 + k8; }
  MX_HOST_DEVICE constexpr int64_t blocks() const { return channels() / kBlock; }
  MX_HOST_DEVICE constexpr int64_t row_bytes() const { return k4 / 2 + k6 / 4 * 3 + k8; }

  // The three segments of a row, empty ones included.
  MX_HOST_DEVICE constexpr std::array<Segment, 3> segments() const {
    const auto rule = [this](int i) { return static_cast<ScaleRule>(rule_code(i)); };
    return {{{E2M1, rule(0), 0, k4 / kBlock, 0, hadamard(0)},
             {format6(), rule(1), k4 / kBlock, k6 / kBlock, k4 / 2, hadamard(1)},
             {E4M3, rule(2), (k4 + k6) / kBlock, k8 / kBlock, k4 / 2 + k6 / 4 * 3, hadamard(2)}}};
  }

  // The weight's own layout: MXFP4 in every segment where the format code says so.
  MX_HOST_DEVICE constexpr MixedLayout weight() const {
    return code & kWeightIsMxfp4Bit ? MixedLayout{channels(), 0, 0, code} : *this;
  }
  MX_HOST_DEVICE constexpr ElementFormat weight_format(const Segment& segment) const {
    return code & kWeightIsMxfp4Bit ? E2M1 : segment.format;
  }
};

// One block of 32 codes from and to its packed bytes: two codes a byte, the even one in the low
// nibble; four 6-bit codes in three bytes, little-endian; or one a byte.
MX_HOST_DEVICE inline void unpack_block(const uint8_t* packed, int bits, uint8_t* codes) {
  if (bits == 4) {
    for (int i = 0; i < kBlock / 2; ++i) {
      codes[2 * i] = packed[i] & 0xF;
      codes[2 * i + 1] = packed[i] >> 4;
    }
  } else if (bits == 6) {
    for (int i = 0; i < kBlock / 4; ++i) {
      const uint32_t four = packed[3 * i] | packed[3 * i + 1] << 8 | packed[3 * i + 2] << 16;
      for (int j = 0; j < 4; ++j) codes[4 * i + j] = (four >> (6 * j)) & 0x3F;
    }
  } else {
    for (int i = 0; i < kBlock; ++i) codes[i] = packed[i];
  }
}

MX_HOST_DEVICE inline void pack_block(const uint8_t* codes, int bits, uint8_t* packed) {
  if (bits == 4) {
    for (int i = 0; i < kBlock / 2; ++i) packed[i] = codes[2 * i] | codes[2 * i + 1] << 4;
  } else if (bits == 6) {
    for (int i = 0; i < kBlock / 4; ++i) {
      const uint32_t four =
          codes[4 * i] | codes[4 * i + 1] << 6 | codes[4 * i + 2] << 12 | codes[4 * i + 3] << 18;
      for (int j = 0; j < 3; ++j) packed[3 * i + j] = static_cast<uint8_t>(four >> (8 * j));
    }
  } else {
    for (int i = 0; i < kBlock; ++i) packed[i] = codes[i];
  }
}

}  // namespace mx
