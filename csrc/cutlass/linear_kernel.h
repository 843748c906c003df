// out = A W^T + bias for rows of three segments, MXFP4 | MXFP6 | MXFP8, in one float32 sum.
//
// A ring of stages in shared memory is filled by asynchronous copies and never drained between
// segments. A stage holds kRowBytes of every row of the tile, in chunks of 16 bytes: 32 codes of
// the MXFP4 segment (4 bits each), or 16 codes of the others (8, 6 or, of an MXFP4 weight, 4 bits
// each, at the start of the chunk, as load_matrices expects them). Chunks are swizzled, so that
// eight rows of one chunk lie in all banks. What is beyond a row, a column or a segment is zero,
// its scales included, so that no garbage can be a NaN.
//
// Scales of activations are rows of bytes of any length, so a stage takes the aligned words that
// its bytes lie in, and the reader shifts.
#pragma once

#include <type_traits>

#include "../mx/scales.h"
#include "arguments.h"
#include "atoms.h"
#include "tiles.h"

namespace micromix::blackwell {

template <int kFirst, int kLast, typename F>
MICROMIX_DEVICE void static_for(const F& f) {
  if constexpr (kFirst < kLast) {
    f(std::integral_constant<int, kFirst>{});
    static_for<kFirst + 1, kLast>(f);
  }
}

// The address of a chunk in a stage's rows.
template <typename T>
MICROMIX_DEVICE uint32_t chunk_at(int row, int chunk) {
  const int spread = T::kRowBytes == 128 ? row & 7 : row >> 1 & 3;
  return row * T::kRowBytes + ((chunk ^ spread) << 4);
}

// How a segment fills a stage of tile T, for formats F.
template <typename T, typename F, int kSegment>
struct Stage {
  static constexpr bool kPacked = kSegment == 0;
  static constexpr Element kA = F::a(kSegment), kB = F::b(kSegment);
  static constexpr int kBlocks = kPacked ? T::kBlocks4 : T::kBlocks8;
  static constexpr int kChunks = T::kRowBytes / 16;
};

// Copies a chunk: 16 bytes that start at a multiple of 8 at least, or 12 that start at one of 4.
template <int kBytes>
MICROMIX_DEVICE void copy_chunk(uint32_t to, const uint8_t* from, bool exists, bool aligned16) {
  if constexpr (kBytes == 16) {
    if (aligned16) {
      copy_async<16>(to, from, exists ? 16 : 0);
    } else {
      copy_async<8>(to, from, exists ? 8 : 0);
      copy_async<8>(to + 8, from + 8, exists ? 8 : 0);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kBytes; i += 4) copy_async<4>(to + i, from + i, exists ? 4 : 0);
  }
}

// Stage `t` of a segment's activations, from the rows as they are saved.
template <typename T, typename F, int kSegment>
MICROMIX_DEVICE void load_a(const LinearArguments& p, uint32_t stage, int t, int first_row) {
  using S = Stage<T, F, kSegment>;
  const SegmentArguments& segment = p.segments[kSegment];
  constexpr int kBytes = S::kPacked ? 16 : 2 * bits_of(S::kA);  // of a chunk
  constexpr int kTotal = T::kM * S::kChunks;
#pragma unroll
  for (int start = 0; start < kTotal; start += T::kThreads) {
    const int i = start + thread_index();
    if (kTotal % T::kThreads != 0 && i >= kTotal) break;
    const int row = i / S::kChunks, chunk = i % S::kChunks;
    const int block = t * S::kBlocks + (S::kPacked ? chunk : chunk / 2);
    const bool exists = first_row + row < p.m && block < segment.blocks;
    const int64_t at = (first_row + row) * p.row_bytes + segment.a +
                       (S::kPacked ? block : t * S::kChunks + chunk) * int64_t{kBytes};
    copy_chunk<kBytes>(stage + chunk_at<T>(row, chunk), p.data + (exists ? at : 0), exists,
                       p.aligned16);
  }
  constexpr int kWords = T::kM * T::kScaleWordsA;
#pragma unroll
  for (int start = 0; start < kWords; start += T::kThreads) {
    const int i = start + thread_index();
    if (kWords % T::kThreads != 0 && i >= kWords) break;
    const int row = i % T::kM, word = i / T::kM;
    const int64_t of_row = (first_row + row) * p.row_blocks + segment.first_block;
    const int64_t at = ((of_row + t * S::kBlocks) & ~int64_t{3}) + 4 * word;
    const int64_t left = first_row + row < p.m ? of_row + segment.blocks - at : 0;
    const int valid = left < 0 ? 0 : left > 4 ? 4 : static_cast<int>(left);
    copy_async<4>(stage + T::kOffsetScalesA + 4 * i, p.scales + (valid ? at : 0), valid);
  }
}

// Stage `t` of a segment's weight. The placed layout has it in the order of its copies.
template <typename T, typename F, int kSegment>
MICROMIX_DEVICE void load_b(const LinearArguments& p, const WeightArguments& weight, uint32_t stage,
                            int t, int first_column) {
  using S = Stage<T, F, kSegment>;
  const SegmentArguments& segment = p.segments[kSegment];
  constexpr int kBits = bits_of(S::kB);
  constexpr int kHalves = S::kPacked ? 1 : 2;  // chunks of a block
  constexpr int kTotal = T::kN * S::kChunks;
#pragma unroll
  for (int start = 0; start < kTotal; start += T::kThreads) {
    const int i = start + thread_index();
    if (kTotal % T::kThreads != 0 && i >= kTotal) break;
    const int half = i % kHalves, in_panel = i / kHalves % kPanelRows;
    const int block = i / (kHalves * kPanelRows) % S::kBlocks;
    const int panel = i / (kHalves * kPanelRows * S::kBlocks);
    const int column = first_column + panel * kPanelRows, row = panel * kPanelRows + in_panel;
    const bool exists = column < weight.n && t * S::kBlocks + block < segment.blocks;
    const uint8_t* const from =
        weight.placed + (exists ? column / kPanelRows * p.panel_bytes + segment.b +
                                      (t * S::kBlocks + block) * int64_t{4 * kBits * kPanelRows}
                                : 0);
    const uint32_t to = stage + T::kOffsetB + chunk_at<T>(row, block * kHalves + half);
    if constexpr (S::kPacked || kBits == 8) {
      copy_async<16>(to, from + (in_panel * kHalves + half) * 16, exists ? 16 : 0);
    } else {
      copy_async<8>(to, from + in_panel * 16 + half * 8, exists ? 8 : 0);
      if constexpr (kBits == 6)
        copy_async<4>(to + 8, from + kPanelRows * 16 + in_panel * 8 + half * 4, exists ? 4 : 0);
    }
  }
  constexpr int kCopies = T::kN / 4 * T::kScaleWordsB;  // of 4 rows' words
  const int i = thread_index();
  static_assert(kCopies <= T::kThreads);
  if (i < kCopies) {
    const int row = i * 4 % T::kN, word = t * S::kBlocks / kScaleWord + i / (T::kN / 4);
    const int column = first_column + row;
    const bool exists = column < weight.n && word * kScaleWord < segment.blocks;
    const uint8_t* const from =
        weight.placed +
        (exists ? column / kPanelRows * p.panel_bytes + segment.b_scales +
                      word * int64_t{kScaleWord * kPanelRows} + column % kPanelRows * kScaleWord
                : 0);
    copy_async<16>(stage + T::kOffsetScalesB + 16 * i, from, exists ? 16 : 0);
  }
}

// Where a warp and a lane work in the tile.
template <typename T>
struct Position {
  int lane, m, n, k;  // the warp's first row and column, and its place along K
};

template <typename T>
MICROMIX_DEVICE Position<T> position() {
  const int warp = thread_index() / 32;
  return {thread_index() % 32, warp % T::kWarpsM * (T::kM / T::kWarpsM),
          warp / T::kWarpsM % T::kWarpsN * (T::kN / T::kWarpsN), warp / (T::kWarpsM * T::kWarpsN)};
}

// Multiplies stage `t` of a segment.
template <typename T, typename F, int kSegment>
MICROMIX_DEVICE void multiply_stage(const LinearArguments& p,
                                    float (&sums)[T::kMmasM][T::kMmasN][4], uint32_t stage, int t,
                                    int first_row, const Position<T>& at) {
  using S = Stage<T, F, kSegment>;
  constexpr int kWords = (S::kBlocks + 3) / 4;  // of scales, once shifted
  const SegmentArguments& segment = p.segments[kSegment];
  const int lane = at.lane;

  // Each lane holds the scales of the row or column that `multiply` wants from it.
  uint32_t scales_a[T::kMmasM][kWords], scales_b[T::kMmasN][kWords];
#pragma unroll
  for (int i = 0; i < T::kMmasM; ++i) {
    const int row = at.m + i * 16 + (lane >> 2) + (lane & 1) * 8;
    const int start = static_cast<int>(
        ((first_row + row) * p.row_blocks + segment.first_block + t * S::kBlocks) & 3);
    uint32_t words[kWords + 1];
#pragma unroll
    for (int w = 0; w <= kWords; ++w)
      words[w] = load_shared(stage + T::kOffsetScalesA + (w * T::kM + row) * 4);
#pragma unroll
    for (int w = 0; w < kWords; ++w)
      scales_a[i][w] = funnel_shift(words[w], words[w + 1], 8 * start);
  }
#pragma unroll
  for (int j = 0; j < T::kMmasN; ++j) {
    const int column = at.n + j * 8 + (lane >> 2);
#pragma unroll
    for (int w = 0; w < kWords; ++w)
      scales_b[j][w] = load_shared(stage + T::kOffsetScalesB + (w * T::kN + column) * 4) >>
                       8 * (t * S::kBlocks % kScaleWord);
  }

  static_for<0, T::kSteps>([&](auto step) {
    if (T::kWarpsK > 1 && step % T::kWarpsK != at.k) return;
    uint32_t a[T::kMmasM][4], b[T::kMmasN][2];
#pragma unroll
    for (int i = 0; i < T::kMmasM; ++i) {
      const int row = at.m + i * 16 + (lane & 15), chunk = 2 * step + (lane >> 4);
      load_matrices<S::kPacked ? 8 : bits_of(S::kA)>(a[i], stage + chunk_at<T>(row, chunk));
    }
#pragma unroll
    for (int j = 0; j < T::kMmasN; j += 2) {
      const int row = at.n + j * 8 + (lane & 7) + (lane >> 4) * 8;
      const int chunk = 2 * step + (lane >> 3 & 1);
      uint32_t two[4];
      load_matrices<S::kPacked ? 8 : bits_of(S::kB)>(two,
                                                     stage + T::kOffsetB + chunk_at<T>(row, chunk));
      b[j][0] = two[0];
      b[j][1] = two[1];
      b[j + 1][0] = two[2];
      b[j + 1][1] = two[3];
    }
    constexpr int kBlock = (S::kPacked ? 2 : 1) * step;  // the step's first block in the stage
    constexpr int kWord = kBlock / 4, kShift = kBlock % 4 * 8;
#pragma unroll
    for (int i = 0; i < T::kMmasM; ++i)
#pragma unroll
      for (int j = 0; j < T::kMmasN; ++j)
        multiply<S::kPacked, S::kA, S::kB>(sums[i][j], a[i], b[j], scales_a[i][kWord] >> kShift,
                                           scales_b[j][kWord] >> kShift);
  });
}

MICROMIX_DEVICE float bias_at(const WeightArguments& weight, int n) {
  if (weight.bias == nullptr) return 0.0f;
  switch (weight.bias_dtype) {
    case Dtype::kFloat32:
      return static_cast<const float*>(weight.bias)[n];
    case Dtype::kFloat16:
      return from_float16(static_cast<const uint16_t*>(weight.bias)[n]);
    default:
      return as_float(uint32_t{static_cast<const uint16_t*>(weight.bias)[n]} << 16);
  }
}

// Adds the bias to 8 columns from n on, rounds once, and stores those below weight.n.
MICROMIX_DEVICE void store_outputs(const WeightArguments& weight, Dtype dtype, int64_t m, int n,
                                   float (&sums)[8]) {
#pragma unroll
  for (int i = 0; i < 8; ++i)
    if (n + i < weight.n) sums[i] += bias_at(weight, n + i);
  const int64_t at = m * weight.n + n;
  if (dtype == Dtype::kFloat32) {
    float* const out = static_cast<float*>(weight.out) + at;
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if (n + i < weight.n) out[i] = sums[i];
    return;
  }
  uint16_t* const out = static_cast<uint16_t*>(weight.out) + at;
  uint32_t rounded[8];
#pragma unroll
  for (int i = 0; i < 8; ++i)
    rounded[i] = dtype == Dtype::kFloat16 ? to_float16(sums[i]) : to_bfloat16(sums[i]);
  if (weight.n % 8 == 0) {
    Vector vector;
#pragma unroll
    for (int i = 0; i < 4; ++i) vector.words[i] = rounded[2 * i] | rounded[2 * i + 1] << 16;
    *reinterpret_cast<Vector*>(out) = vector;
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if (n + i < weight.n) out[i] = static_cast<uint16_t>(rounded[i]);
  }
}

// What one thread block does; `shared` is the address of T::kSharedBytes of shared memory.
template <typename T, typename F>
MICROMIX_DEVICE void linear_block(const LinearArguments& p, uint32_t shared) {
  int which = 0;
  while (which + 1 < p.weight_count && block_x() >= p.weights[which + 1].first_tile) ++which;
  const WeightArguments& weight = p.weights[which];
  const int first_row = block_y() * T::kM;
  const int first_column = (block_x() - weight.first_tile) * T::kN;
  const Position<T> at = position<T>();

  // The stages of K where each segment ends, and those of this block.
  int ends[3], stages = 0;
#pragma unroll
  for (int s = 0; s < 3; ++s) {
    const int in_stage = s == 0 ? T::kBlocks4 : T::kBlocks8;
    stages += (p.segments[s].blocks + in_stage - 1) / in_stage;
    ends[s] = stages;
  }
  const int first = static_cast<int>(int64_t{stages} * block_z() / p.splits);
  const int last = static_cast<int>(int64_t{stages} * (block_z() + 1) / p.splits);

  float sums[T::kMmasM][T::kMmasN][4];
#pragma unroll
  for (auto& row : sums)
#pragma unroll
    for (auto& tile : row)
#pragma unroll
      for (float& sum : tile) sum = 0.0f;

  int write = 0, read = 0;  // stages of the ring
  const auto load = [&](int t) {
    if (t < last) {
      const uint32_t stage = shared + write * T::kStageBytes;
      if (t < ends[0]) {
        load_a<T, F, 0>(p, stage, t, first_row);
        load_b<T, F, 0>(p, weight, stage, t, first_column);
      } else if (t < ends[1]) {
        load_a<T, F, 1>(p, stage, t - ends[0], first_row);
        load_b<T, F, 1>(p, weight, stage, t - ends[0], first_column);
      } else {
        load_a<T, F, 2>(p, stage, t - ends[1], first_row);
        load_b<T, F, 2>(p, weight, stage, t - ends[1], first_column);
      }
    }
    commit_copies();
    write = write + 1 == T::kStages ? 0 : write + 1;
  };
#pragma unroll 1
  for (int t = 0; t < T::kStages - 1; ++t) load(first + t);

  int t = first;
  static_for<0, 3>([&](auto segment) {
    constexpr int kSegment = segment;
    const int end = ends[kSegment] < last ? ends[kSegment] : last;
    const int start = kSegment == 0 ? 0 : ends[kSegment == 0 ? 0 : kSegment - 1];
#pragma unroll 1
    for (; t < end; ++t) {
      wait_copies<T::kStages - 2>();  // stage t has landed, for this thread
      barrier();                      // for all; and all are done with the stage to be filled
      load(t + T::kStages - 1);
      multiply_stage<T, F, kSegment>(p, sums, shared + read * T::kStageBytes, t - start, first_row,
                                     at);
      read = read + 1 == T::kStages ? 0 : read + 1;
    }
  });
  wait_copies<0>();
  barrier();

  // The sums of the warps along K are added in their order, in the stages' place.
  const auto sum_at = [&](int row, int column) {
    return shared + (row * T::kSumPitch + column) * 4;
  };
#pragma unroll 1
  for (int k = 0; k < T::kWarpsK; ++k) {
    if (k == at.k) {
#pragma unroll
      for (int i = 0; i < T::kMmasM; ++i)
#pragma unroll
        for (int j = 0; j < T::kMmasN; ++j)
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const uint32_t address = sum_at(at.m + i * 16 + (at.lane >> 2) + (e >> 1) * 8,
                                            at.n + j * 8 + (at.lane & 3) * 2 + (e & 1));
            const float before = k == 0 ? 0.0f : as_float(load_shared(address));
            store_shared(address, as_bits(before + sums[i][j][e]));
          }
    }
    barrier();
  }

#pragma unroll 1
  for (int i = thread_index(); i < T::kM * T::kN / 8; i += T::kThreads) {
    const int row = i / (T::kN / 8), column = i % (T::kN / 8) * 8;
    const int64_t m = first_row + row;
    const int n = first_column + column;
    if (m >= p.m || n >= weight.n) continue;
    float eight[8];
#pragma unroll
    for (int e = 0; e < 8; ++e) eight[e] = as_float(load_shared(sum_at(row, column + e)));
    if (p.splits > 1) {
      float* const to =
          p.partial + (block_z() * int64_t{p.m} + m) * p.columns + weight.first_column + n;
#pragma unroll
      for (int e = 0; e < 8; ++e) to[e] = eight[e];
    } else {
      store_outputs(weight, p.out_dtype, m, n, eight);
    }
  }
}

// Adds up the partial sums of 8 columns of a row, in the order of K.
MICROMIX_DEVICE void add_partial_sums(const LinearArguments& p, int64_t m, int column) {
  int which = 0;
  while (which + 1 < p.weight_count && column >= p.weights[which + 1].first_column) ++which;
  const WeightArguments& weight = p.weights[which];
  float sums[8] = {};
  for (int split = 0; split < p.splits; ++split) {
    const float* const from = p.partial + (split * int64_t{p.m} + m) * p.columns + column;
#pragma unroll
    for (int e = 0; e < 8; ++e) sums[e] += from[e];
  }
  store_outputs(weight, p.out_dtype, m, column - weight.first_column, sums);
}

}  // namespace micromix::blackwell
