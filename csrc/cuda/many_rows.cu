// The product of many rows on Hopper: the weight stays packed, and is decoded in registers.
//
// A thread block has 128 rows of the weight and a tile of tokens. Either of its two warpgroups
// multiplies 64 rows, the registers' operand of a warpgroup's matrix instruction, by the tokens,
// which come to a ring in shared memory by bulk copies, a slice of 64 channels at a time. Which
// channels an instruction multiplies is free as long as both operands agree, so a lane decodes
// blocks of its own, as in few_rows.cu; a step is four blocks of a row, one for each lane that has
// it. Their codes come by the lane's own copies, steps ahead, to a ring that no other thread reads.
//
// With few tiles K is cut as well: the thread blocks of a cluster have a part of it each, and add
// up their sums in its order.
#include "bulk_copies.cuh"
#include "decode.cuh"
#include "warpgroups.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define MICROMIX_HAS_WARPGROUPS 1
#else
#define MICROMIX_HAS_WARPGROUPS 0
#endif

namespace micromix::cuda {
namespace {

constexpr int kRows = 128;     // of the weight
constexpr int kThreads = 256;  // two warpgroups
constexpr int kGroups = mx::kBlock / 8;
constexpr int kMostParts = 8;  // of K: what any cluster may have

struct Task {
  const uint8_t* x;
  Tiles tiles;
  PackedRows weight;
  Results results;
  int32_t token_tiles;
  bool aligned;  // the weight's rows, to 16 bytes
};

template <int kTokens>
struct Shape {
  static constexpr int kThreadBlocks = kTokens <= 64 ? 2 : 1;  // of a multiprocessor
  static constexpr int kSliceBytes = kTokens * Tiles::kSliceBytes;
  static constexpr int kSlices = kTokens <= 32 ? 8 : kTokens <= 64 ? 5 : kTokens <= 128 ? 6 : 5;
  // A lane's codes of two rows of a step, at most 32 bytes each.
  static constexpr int kCodeBytes = kThreads * 64;
  static constexpr int kCodes = kTokens <= 128 ? 4 : 3;
  // The sums as they are added up: a row of the weight and another bank for each token.
  static constexpr int kSumStride = kRows + 4;
  static constexpr int kRings = kSlices * kSliceBytes + kCodes * kCodeBytes;
  static constexpr int kSumBytes = kTokens * kSumStride * 4;
  static constexpr int kBytes = kRings > kSumBytes ? kRings : kSumBytes;
  static constexpr int kColumns = kTokens < 128 ? kTokens : 128;  // of an instruction
};

template <int kTokens>
struct Product : Shape<kTokens> {
  using S = Shape<kTokens>;
  using S::kCodeBytes, S::kCodes, S::kColumns, S::kSliceBytes, S::kSlices;
  static constexpr int kPieces = kTokens / kColumns;

  const Task& task;
  const PackedRows& weight;
  const uint32_t shared, barriers;
  const int part, parts;    // of K
  const int64_t token;      // the first
  const int64_t first_row;  // of the weight

  int begin, end;  // steps

  __device__ Product(const Task& task, uint32_t shared, uint32_t barriers)
      : task(task),
        weight(task.weight),
        shared(shared),
        barriers(barriers),
        part(blockIdx.y),
        parts(gridDim.y),
        token(int64_t{kTokens} * (blockIdx.x % task.token_tiles)),
        first_row(int64_t{kRows} * (blockIdx.x / task.token_tiles)) {
    const int steps = task.tiles.all_steps();
    begin = steps * part / parts, end = steps * (part + 1) / parts;
  }

  __device__ __forceinline__ uint32_t slice(int i) const { return shared + i * kSliceBytes; }
  __device__ __forceinline__ uint32_t codes(int i) const {
    return shared + kSlices * kSliceBytes + i * kCodeBytes;
  }
  __device__ __forceinline__ uint32_t full(int i) const { return barriers + 8 * i; }
  __device__ __forceinline__ uint32_t empty(int i) const { return barriers + 8 * (kSlices + i); }

  // One thread: slice i of this part of K.
  __device__ __forceinline__ void copy_slice(int i) const {
    if (i >= 2 * (end - begin)) return;
    const int at = i % kSlices, turn = i / kSlices;
    if (turn > 0) wait(empty(at), (turn - 1) % 2);
    expect(full(at), kSliceBytes);
    const int64_t row = (2 * begin + i) * task.tiles.padded + token;
    copy_bulk(slice(at), task.x + row * Tiles::kSliceBytes, kSliceBytes, full(at));
  }

  // A lane of a warpgroup: two rows of the weight, eight apart, and a block of each step.
  struct Lane {
    const Product& p;
    const int thread, quarter;
    const uint8_t *data[2], *scales[2];
    int largest[2];
    int scale[2][2];  // of this step's blocks and the next one's
    uint32_t operand[2][2][4];
    float sums[kTokens / 2];
    int used;  // slices

    __device__ explicit Lane(const Product& p)
        : p(p), thread(threadIdx.x), quarter(threadIdx.x % 4), used(0) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        // The last row stands in for those beyond it.
        const int64_t n =
            min(p.first_row + 16 * (thread / 32) + thread % 32 / 4 + 8 * i, p.weight.rows - 1);
        data[i] = p.weight.data + n * p.weight.row_bytes;
        scales[i] = p.weight.scales + n * p.weight.blocks;
        largest[i] = p.weight.largest[n];
      }
#pragma unroll
      for (int i = 0; i < kTokens / 2; ++i) sums[i] = 0.0f;
    }

    struct Where {
      int segment, first, last;  // a step's first block, and the end of its segment
    };
    __device__ __forceinline__ Where where(int step) const {
      const Tiles& tiles = p.task.tiles;
      const int steps4 = tiles.steps(0), steps6 = steps4 + tiles.steps(1);
      if (step < steps4) return {0, Tiles::kStepBlocks * step, tiles.ends[0]};
      if (step < steps6)
        return {1, tiles.ends[0] + Tiles::kStepBlocks * (step - steps4), tiles.ends[1]};
      return {2, tiles.ends[1] + Tiles::kStepBlocks * (step - steps6), tiles.ends[2]};
    }
    // The last block of a segment stands in for those beyond it, times zero: where that is NaN, so
    // is the sum.
    __device__ __forceinline__ int own_block(const Where& at) const {
      return min(at.first + quarter, at.last - 1);
    }

    template <int kBytes>
    __device__ __forceinline__ uint32_t place(int stage, int i) const {
      return p.codes(stage) + (i * kThreads + thread) * kBytes;
    }
    __device__ __forceinline__ void fetch(int step) {
      if (step < p.end) {
        const Where at = where(step);
        const int stage = (step - p.begin) % kCodes, own = own_block(at);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          if (at.segment == 0) {
            copy_16(place<16>(stage, i), data[i] + own * 16);
          } else if (at.segment == 1) {
            const uint8_t* from = data[i] + p.weight.start6 + (own - p.task.tiles.ends[0]) * 24;
#pragma unroll
            for (int j = 0; j < 3; ++j) copy_own<8>(place<8>(stage, 3 * i + j), from + 8 * j);
          } else {
            const uint8_t* from = data[i] + p.weight.start8 + (own - p.task.tiles.ends[1]) * 32;
#pragma unroll
            for (int j = 0; j < 2; ++j) copy_16(place<16>(stage, 2 * i + j), from + 16 * j);
          }
        }
      }
      commit_own_copies();
    }
    __device__ __forceinline__ void copy_16(uint32_t to, const uint8_t* from) const {
      if (p.task.aligned) {
        copy_own<16>(to, from);
      } else {
        copy_own<8>(to, from), copy_own<8>(to + 8, from + 8);
      }
    }
    __device__ __forceinline__ void fetch_scales(int step, int (&to)[2]) const {
      const int own = own_block(where(min(step, p.end - 1)));
#pragma unroll
      for (int i = 0; i < 2; ++i) to[i] = __ldg(scales[i] + own);
    }

    template <mx::ElementFormat kFormat>
    __device__ __forceinline__ BlockCodes<kFormat> block_codes(int stage, int i) const {
      BlockCodes<kFormat> block;
      if constexpr (kFormat.bits == 6) {
#pragma unroll
        for (int j = 0; j < 3; ++j)
          asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];"
                       : "=r"(block.word[2 * j]), "=r"(block.word[2 * j + 1])
                       : "r"(place<8>(stage, 3 * i + j)));
      } else {
        constexpr int kWords = kFormat.bits, kPieces = kWords / 4;
#pragma unroll
        for (int j = 0; j < kPieces; ++j) {
          const Narrow<8> four = load_shared(place<16>(stage, kPieces * i + j));
#pragma unroll
          for (int w = 0; w < 4; ++w) block.word[4 * j + w] = four.word[w];
        }
      }
      return block;
    }

    template <mx::ElementFormat kFormat>
    __device__ __forceinline__ void multiply_step(int step) {
      const Where at = where(step);
      wait_for_own_copies<kCodes - 2>();
      const int stage = (step - p.begin) % kCodes;
      const BlockCodes<kFormat> block[2] = {block_codes<kFormat>(stage, 0),
                                            block_codes<kFormat>(stage, 1)};
      uint32_t factor[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t of_block = factor_of_block<kFormat>(scale[0][i], largest[i]);
        factor[i] = at.first + quarter < at.last ? of_block : 0u;
        scale[0][i] = scale[1][i];
      }
      fetch(step + kCodes - 1);
      fetch_scales(step + 2, scale[1]);
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
        const Eight a = block[0].decode(g, factor[0]), b = block[1].decode(g, factor[1]);
        uint32_t (&own)[2][4] = operand[g % 2];
        own[0][0] = a.x, own[0][1] = b.x, own[0][2] = a.y, own[0][3] = b.y;
        own[1][0] = a.z, own[1][1] = b.z, own[1][2] = a.w, own[1][3] = b.w;
        const int slice = used % kSlices;
        if (g % 2 == 0) {
          // The place of the slice before the last: the other warpgroup may be late by one.
          if (thread == 0 && used > 1) p.copy_slice(used - 2 + kSlices);
          __syncwarp();
          wait(p.full(slice), used / kSlices % 2);
        }
        before_matrix_instructions();
        const uint64_t tokens = swizzled_rows(p.slice(slice));
#pragma unroll
        for (int j = 0; j < 2; ++j)
#pragma unroll
          for (int piece = 0; piece < kPieces; ++piece)
            multiply<kColumns>(
                sums + piece * kColumns / 2, own[j],
                tokens + piece * (kColumns * Tiles::kSliceBytes / 16) + 2 * (2 * (g % 2) + j));
        commit_matrix_instructions();
        wait_for_matrix_instructions<1>();
        if (g % 2 == 0 && used > 0) arrive_as_warp(p.empty((used - 1) % kSlices));
        used += g % 2;
      }
    }

    __device__ __forceinline__ void run() {
      for (int i = 0; i < kCodes - 1; ++i) fetch(p.begin + i);
      if (p.begin < p.end) {
        fetch_scales(p.begin, scale[0]);
        fetch_scales(p.begin + 1, scale[1]);
      }
      const int end4 = p.task.tiles.steps(0), end6 = end4 + p.task.tiles.steps(1);
      int step = p.begin;
      for (; step < min(p.end, end4); ++step) multiply_step<mx::E2M1>(step);
      if (p.weight.e3m2) {
        for (; step < min(p.end, end6); ++step) multiply_step<mx::E3M2>(step);
      } else {
        for (; step < min(p.end, end6); ++step) multiply_step<mx::E2M3>(step);
      }
      for (; step < p.end; ++step) multiply_step<mx::E4M3>(step);
      wait_for_matrix_instructions<0>();
      // Nothing of the sums is read before.
#pragma unroll
      for (int i = 0; i < kTokens / 2; ++i) asm volatile("" : "+f"(sums[i])::"memory");
    }

    // Rows of the weight side by side, for each token.
    __device__ __forceinline__ void leave_sums() const {
      const int row = 16 * (thread / 32) + thread % 32 / 4;
#pragma unroll
      for (int i = 0; i < kTokens / 2; ++i) {
        const int column = i / 4 * 8 + 2 * quarter + i % 2;
        const uint32_t to = p.shared + 4 * (column * S::kSumStride + row + i / 2 % 2 * 8);
        asm volatile("st.shared.f32 [%0], %1;" ::"r"(to), "f"(sums[i]) : "memory");
      }
    }
  };

  // The part's tokens of the tile: sums of all parts, in their order, to results.
  __device__ __forceinline__ void finish_tokens() const {
    const int warp = threadIdx.x / 32, row = threadIdx.x % 32 * 4;
    const int64_t n = first_row + row;
    const Results& to = task.results;
    for (int t = kTokens * part / parts + warp; t < kTokens * (part + 1) / parts;
         t += kThreads / 32) {
      if (token + t >= to.m) break;
      float sum[4] = {};
      for (int from = 0; from < parts; ++from) {
        const uint32_t there = shared + 4 * (t * S::kSumStride + row);
        const float4 four = load_from_cluster(in_thread_block(there, from));
        sum[0] += four.x, sum[1] += four.y, sum[2] += four.z, sum[3] += four.w;
      }
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (n + i < weight.rows) finish(to, sum[i], token + t, n + i);
    }
  }

  __device__ __forceinline__ void run() {
    if (threadIdx.x == 0) {
      for (int i = 0; i < kSlices; ++i)
        make_barrier(full(i), 1), make_barrier(empty(i), kThreads / 32 * kArrivalsOfWarp);
      show_barriers();
      for (int i = 0; i < kSlices; ++i) copy_slice(i);
    }
    __syncthreads();
    Lane lane(*this);
    lane.run();
    // All of the thread block's slices and codes have been read: sums take their place.
    __syncthreads();
    lane.leave_sums();
    meet_cluster();
    finish_tokens();
    meet_cluster();  // others read this one's sums
  }
};

// On other devices there is an empty kernel, with other bounds: has_many_rows tells them apart.
template <int kTokens>
__global__ void __launch_bounds__(MICROMIX_HAS_WARPGROUPS ? kThreads : 32,
                                  Shape<kTokens>::kThreadBlocks)
    many_rows_kernel(const __grid_constant__ Task task) {
#if MICROMIX_HAS_WARPGROUPS
  extern __shared__ __align__(1024) uint8_t shared[];
  __shared__ uint64_t barriers[2 * Shape<kTokens>::kSlices];
  const auto address = [](const void* p) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(p));
  };
  Product<kTokens>(task, address(shared), address(barriers)).run();
#endif
}

template <int kTokens>
cudaError_t launch(Task& task, int multiprocessors, cudaStream_t stream) {
  using S = Shape<kTokens>;
  const auto kernel = many_rows_kernel<kTokens>;
  task.token_tiles = static_cast<int32_t>((task.results.m + kTokens - 1) / kTokens);
  const int64_t tiles = task.token_tiles * ((task.weight.rows + kRows - 1) / kRows);
  unsigned parts = 1;
  while (parts < kMostParts && 2 * parts * tiles <= S::kThreadBlocks * multiprocessors) parts *= 2;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, S::kBytes);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {1, parts, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = {static_cast<unsigned>(tiles), parts, 1};
  config.blockDim = kThreads;
  config.dynamicSmemBytes = S::kBytes;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, task);
}

}  // namespace

bool has_many_rows() {
  cudaFuncAttributes attributes;
  if (cudaFuncGetAttributes(&attributes, many_rows_kernel<64>) != cudaSuccess) {
    cudaGetLastError();  // there is no code that this device runs, which is no error
    return false;
  }
  return attributes.maxThreadsPerBlock == kThreads;
}

int64_t padded_rows(int64_t m) {
  const int64_t tile = m <= 32 ? 32 : m <= 64 ? 64 : m <= 128 ? 128 : 256;
  return (m + tile - 1) / tile * tile;
}

cudaError_t launch_many_rows(const void* x, const Tiles& tiles, const PackedRows& weight,
                             const Results& results, int multiprocessors, cudaStream_t stream) {
  Task task{};
  task.x = static_cast<const uint8_t*>(x);
  task.tiles = tiles;
  task.weight = weight;
  task.results = results;
  task.aligned = weight.row_bytes % 16 == 0;
  const auto run = results.m <= 32    ? launch<32>
                   : results.m <= 64  ? launch<64>
                   : results.m <= 128 ? launch<128>
                                      : launch<256>;
  return run(task, multiprocessors, stream);
}

}  // namespace micromix::cuda
