// The product of few rows: a weight is read once, packed, and decoded in registers.
//
// A thread block has a panel of the weight, 16 rows, and its warps share out the steps of K, four
// blocks: one for each of the four lanes that hold a row in a matrix instruction of 16 x 8 x 16.
// Which channels an instruction multiplies is free as long as both operands agree: a lane's are
// eight of its block, as they are decoded. Sums of the warps are added in their order.
#include "decode.cuh"
#include "early_launch.h"

namespace micromix::cuda {
namespace {

constexpr int kTokens = 8;

__device__ __forceinline__ void multiply(float (&sums)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                         uint32_t a3, uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

template <int kTiles, int kWarps>
struct Product {
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kSums = kTiles * kTokens * kPanelRows;
  static constexpr int kOwn = (kSums + kThreads - 1) / kThreads;  // a thread's

  const PlacedRows& weight;
  const Results& results;
  const int lane, row, quarter;  // the lane's first row of 16, and its block of four
  const uint8_t* const panel;
  int largest[2];
  const uint4* x[kTiles];
  float sums[kTiles][4] = {};

  __device__ Product(const void* decoded, const PlacedRows& weight, const Results& results)
      : weight(weight),
        results(results),
        lane(threadIdx.x % 32),
        row(lane / 4),
        quarter(lane % 4),
        panel(weight.panels + blockIdx.x * weight.steps.panel_bytes()) {
    // Columns of tokens that are not there may hold anything.
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      const int64_t token = min(int64_t{kTokens} * t + row, results.m - 1);
      x[t] = static_cast<const uint4*>(decoded) + token * weight.steps.ends[2] * kGroups;
    }
#pragma unroll
    for (int i = 0; i < 2; ++i)
      largest[i] = __ldg(weight.largest + int64_t{kPanelRows} * blockIdx.x + row + 8 * i);
  }

  // A segment's steps [first, last) of this warp: every n-th of all.
  template <mx::ElementFormat kFormat>
  __device__ __forceinline__ void add_segment(int first, int last) {
    const int warp = threadIdx.x / 32;
    const uint8_t* const chunks = panel + weight.steps.chunk_start(first);
    const auto [first_block, last_block] = weight.steps.blocks_of(first);
#pragma unroll 2
    for (int step = first + (warp + kWarps - first % kWarps) % kWarps; step < last;
         step += kWarps) {
      const ChunkInMemory chunk{chunks + (step - first) * chunk_bytes(kFormat.bits)};
      const BlockCodes<kFormat> codes[2] = {{lane, 0, chunk}, {lane, 1, chunk}};
      const uint32_t scales = chunk.template scales<kFormat>(lane);
      const uint32_t factor[2] = {factor_of_block<kFormat>(scales & 0xFF, largest[0]),
                                  factor_of_block<kFormat>(scales >> 8, largest[1])};
      // The last block's activations stand in for those beyond it, times zeros: where one of them
      // is NaN, so is the sum.
      const int block = min(first_block + kStepBlocks * (step - first) + quarter, last_block - 1);
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
        const Eight w[2] = {codes[0].decode(g, factor[0]), codes[1].decode(g, factor[1])};
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
          const Eight v = __ldg(x[t] + int64_t{block} * kGroups + g);
          multiply(sums[t], w[0].x, w[1].x, w[0].y, w[1].y, v.x, v.y);
          multiply(sums[t], w[0].z, w[1].z, w[0].w, w[1].w, v.z, v.w);
        }
      }
    }
  }

  // The thread's j-th result, if there is one; else another that is.
  struct Place {
    int token, row;
    int64_t n;
    bool there;
  };
  __device__ __forceinline__ Place place_of(int j) const {
    const int i = threadIdx.x + j * kThreads, token = i / kPanelRows, r = i % kPanelRows;
    const int64_t n = int64_t{kPanelRows} * blockIdx.x + r;
    return {min(token, static_cast<int>(results.m) - 1), r, min(n, weight.rows - 1),
            i < kSums && token < results.m && n < weight.rows};
  }

  __device__ __forceinline__ void run() {
    __shared__ float parts[kWarps][kTiles][kTokens][kPanelRows];
    // Where a thread has one result, what that needs is there before the sums are.
    Finish ahead;
    if constexpr (kOwn == 1) ahead = load_finish(results, place_of(0).token, place_of(0).n);
    const int32_t (&ends)[3] = weight.steps.step_ends;
    add_segment<mx::E2M1>(0, ends[0]);
    if (weight.e3m2) {
      add_segment<mx::E3M2>(ends[0], ends[1]);
    } else {
      add_segment<mx::E2M3>(ends[0], ends[1]);
    }
    add_segment<mx::E4M3>(ends[1], ends[2]);
#pragma unroll
    for (int t = 0; t < kTiles; ++t)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        parts[threadIdx.x / 32][t][2 * quarter + i % 2][row + i / 2 * 8] = sums[t][i];
    __syncthreads();
#pragma unroll
    for (int j = 0; j < kOwn; ++j) {
      const Place p = place_of(j);
      if (!p.there) continue;
      float sum = 0.0f;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) sum += parts[w][p.token / kTokens][p.token % kTokens][p.row];
      const Finish finish = kOwn == 1 ? ahead : load_finish(results, p.token, p.n);
      store_finished(results, sum, finish, p.token, p.n);
    }
  }
};

// Eight warps have registers for all that they load, and lie two thread blocks to a multiprocessor.
template <int kTiles, int kWarps>
__global__ void __launch_bounds__(32 * kWarps, kWarps == 8 ? 2 : 0)
    few_rows_kernel(const void* x, const __grid_constant__ PlacedRows weight,
                    const __grid_constant__ Results results) {
  let_the_next_kernel_start();
  wait_for_the_kernel_before();
  Product<kTiles, kWarps>(x, weight, results).run();
}

template <int kWarps>
cudaError_t launch(const void* x, const PlacedRows& weight, const Results& results, unsigned blocks,
                   const Launcher& on) {
  static_assert(kFewRows == 2 * kTokens);
  const auto kernel =
      results.m <= kTokens ? few_rows_kernel<1, kWarps> : few_rows_kernel<2, kWarps>;
  return launch_early(kernel, blocks, 32 * kWarps, 0, on.stream, on.early, x, weight, results);
}

}  // namespace

cudaError_t launch_few_rows(const void* x, const PlacedRows& weight, const Results& results,
                            const Launcher& on) {
  const auto blocks = static_cast<unsigned>(panels_of(weight.rows));
  // Fewer warps have longer loops, more of them fill the device where thread blocks are few.
  constexpr unsigned kManyBlocks = 512;
  return blocks >= kManyBlocks ? launch<4>(x, weight, results, blocks, on)
                               : launch<8>(x, weight, results, blocks, on);
}

}  // namespace micromix::cuda
