// The tiles that a thread block computes, and which formats a kernel is compiled for.
#pragma once

#include "elements.h"

namespace micromix::blackwell {

// A block of kM rows by kN columns, by kWarpsM x kWarpsN warps; kWarpsK warps share out the
// channels of each stage. A stage holds kRowBytes of every row of both operands.
template <int M, int N, int WarpsM, int WarpsN, int WarpsK, int RowBytes, int Stages>
struct Tile {
  static constexpr int kM = M, kN = N;
  static constexpr int kWarpsM = WarpsM, kWarpsN = WarpsN, kWarpsK = WarpsK;
  static constexpr int kRowBytes = RowBytes, kStages = Stages;
  static constexpr int kThreads = WarpsM * WarpsN * WarpsK * 32;
  static constexpr int kSteps = RowBytes / 32;  // MMAs along K in a stage
  static constexpr int kMmasM = M / WarpsM / 16, kMmasN = N / WarpsN / 8;

  // Blocks of 32 channels in a stage: packed 4-bit codes, and codes that take a byte each.
  static constexpr int kBlocks4 = RowBytes / 16, kBlocks8 = RowBytes / 32;
  // Words of scales a row: those of activations start anywhere, those of weights at a word.
  static constexpr int kScaleWordsA = kBlocks4 == 8 ? 3 : 2, kScaleWordsB = kBlocks4 == 8 ? 2 : 1;

  static constexpr int kOffsetB = M * RowBytes;
  static constexpr int kOffsetScalesA = kOffsetB + N * RowBytes;
  static constexpr int kOffsetScalesB = kOffsetScalesA + M * 4 * kScaleWordsA;
  static constexpr int kStageBytes = (kOffsetScalesB + N * 4 * kScaleWordsB + 127) / 128 * 128;
  static constexpr int kSumPitch = N + 4;  // of the float32 sums, which take the stages' place
  static constexpr int kSharedBytes =
      kStageBytes * Stages > M * kSumPitch * 4 ? kStageBytes * Stages : M * kSumPitch * 4;

  static_assert(M % (16 * WarpsM) == 0 && N % (16 * WarpsN) == 0 && kSteps % WarpsK == 0);
  static_assert(RowBytes == 64 || RowBytes == 128);
  static_assert(kSharedBytes <= 99 * 1024);
};

// 16 rows are the least that an MMA has. Few rows: many stages in flight, and warps along K.
using Tile16 = Tile<16, 64, 1, 2, 4, 128, 8>;
using Tile32 = Tile<32, 64, 1, 2, 4, 128, 7>;
using Tile64 = Tile<64, 64, 2, 2, 2, 128, 5>;
using Tile128 = Tile<128, 128, 2, 4, 1, 64, 5>;

// The MXFP6 format, and whether the weight is MXFP4 in every segment.
template <Element Six, bool WeightIsMxfp4>
struct Formats {
  static constexpr Element a(int segment) {
    return segment == 0 ? Element::kE2M1 : segment == 1 ? Six : Element::kE4M3;
  }
  static constexpr Element b(int segment) { return WeightIsMxfp4 ? Element::kE2M1 : a(segment); }
};

}  // namespace micromix::blackwell
