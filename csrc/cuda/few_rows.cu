// The product of few rows: a weight is read once, packed, and decoded in registers.
//
// A thread block has a panel of the weight, 16 rows, or two, and its warps share out the steps of
// K, four blocks: one for each of the four lanes that hold a row in a matrix instruction of 16 x 8
// x 16. Which channels an instruction multiplies is free as long as both operands agree: a lane's
// are eight of its block, as they are decoded. Sums of the warps are added in their order. Layers
// that share the rows share a launch: the panels of one follow those of another.
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

// What a lane has of a chunk: a block of each of its two rows.
template <mx::ElementFormat kFormat>
struct LaneBlocks {
  BlockCodes<kFormat> codes[2];
  uint32_t factor[2];

  __device__ __forceinline__ LaneBlocks(const ChunkInMemory& chunk, int lane,
                                        const int (&largest)[2])
      : codes{{lane, 0, chunk}, {lane, 1, chunk}} {
    const uint32_t scales = chunk.template scales<kFormat>(lane);
    factor[0] = factor_of_block<kFormat>(scales & 0xFF, largest[0]);
    factor[1] = factor_of_block<kFormat>(scales >> 8, largest[1]);
  }
};

struct Task {
  LayerProduct layers[kMostProducts];
  unsigned first_blocks[kMostProducts];  // of a layer; of those that are not there: all of them
};

// kTogether: thread blocks that a multiprocessor is to have registers for; 0: left to the compiler.
template <int kTiles, int kWarps, int kPanels, int kTogether>
struct Product {
  static constexpr int kRows = kPanels * kPanelRows;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kSums = kTiles * kTokens * kRows;
  static constexpr int kOwn = (kSums + kThreads - 1) / kThreads;  // a thread's
  // What takes registers: two steps at once, and what the end needs on its way.
  static constexpr int kUnroll = kPanels == 1 && kTogether <= 2 ? 2 : 1;
  static constexpr bool kAhead = kOwn == 1 && kTogether <= 3;

  const Task& task;
  const PlacedRows& first;  // layer's: the steps of all are the same, and take no registers there
  int layer;                // the thread block's
  unsigned block;           // of those of the layer
  const int lane, row, quarter;  // the lane's first row of 16, and its block of four
  const uint8_t* panel;
  int to_last = 0;  // bytes from there to the last panel
  int largest[kPanels][2];
  const uint4* x[kTiles];
  float sums[kPanels][kTiles][4] = {};

  __device__ Product(const void* decoded, const Task& task)
      : task(task),
        first(task.layers[0].weight),
        lane(threadIdx.x % 32),
        row(lane / 4),
        quarter(lane % 4) {
    find_layer();
    panel = weight().panels + int64_t{kPanels} * block * first.steps.panel_bytes();
    // Columns of tokens that are not there may hold anything.
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      const int64_t token = min(int64_t{kTokens} * t + row, results().m - 1);
      x[t] = static_cast<const uint4*>(decoded) + token * first.steps.ends[2] * kGroups;
    }
#pragma unroll
    for (int i = 0; i < 2; ++i)
      largest[0][i] = __ldg(weight().largest + int64_t{kRows} * block + row + 8 * i);
    if constexpr (kPanels == 2) {
      // Of an odd number of panels the last one stands in for the one that is not there.
      const int64_t last = min(2 * int64_t{block} + 1, panels_of(weight().rows) - 1);
      to_last = static_cast<int>((last - 2 * int64_t{block}) * first.steps.panel_bytes());
#pragma unroll
      for (int i = 0; i < 2; ++i)
        largest[1][i] = __ldg(weight().largest + kPanelRows * last + row + 8 * i);
    }
  }

  // Anew after the products: so neither takes a register meanwhile.
  __device__ __forceinline__ void find_layer() {
    unsigned of_all;
    asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(of_all));
    layer = 0;
#pragma unroll
    for (int i = 1; i < kMostProducts; ++i) layer += of_all >= task.first_blocks[i];
    block = of_all - task.first_blocks[layer];
  }
  __device__ __forceinline__ const PlacedRows& weight() const { return task.layers[layer].weight; }
  __device__ __forceinline__ const Results& results() const { return task.layers[layer].results; }

  // A segment's steps [begin, last) of this warp: every n-th of all.
  template <mx::ElementFormat kFormat>
  __device__ __forceinline__ void add_segment(int begin, int last) {
    const int warp = threadIdx.x / 32;
    const uint8_t* const chunks = panel + first.steps.chunk_start(begin);
    const auto [first_block, last_block] = first.steps.blocks_of(begin);
#pragma unroll(kUnroll)
    for (int step = begin + (warp + kWarps - begin % kWarps) % kWarps; step < last;
         step += kWarps) {
      const ChunkInMemory chunk{chunks + (step - begin) * chunk_bytes(kFormat.bits)};
      const LaneBlocks<kFormat> blocks(chunk, lane, largest[0]);
      const LaneBlocks<kFormat> others =
          kPanels == 1 ? blocks
                       : LaneBlocks<kFormat>({chunk.chunk + to_last}, lane, largest[kPanels - 1]);
      // The last block's activations stand in for those beyond it, times zeros: where one of them
      // is NaN, so is the sum.
      const int of_lane = min(first_block + kStepBlocks * (step - begin) + quarter, last_block - 1);
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
        Eight w[kPanels][2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          w[0][i] = blocks.codes[i].decode(g, blocks.factor[i]);
          if constexpr (kPanels == 2) w[1][i] = others.codes[i].decode(g, others.factor[i]);
        }
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
          const Eight v = __ldg(x[t] + int64_t{of_lane} * kGroups + g);
#pragma unroll
          for (int p = 0; p < kPanels; ++p) {
            multiply(sums[p][t], w[p][0].x, w[p][1].x, w[p][0].y, w[p][1].y, v.x, v.y);
            multiply(sums[p][t], w[p][0].z, w[p][1].z, w[p][0].w, w[p][1].w, v.z, v.w);
          }
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
    const int i = threadIdx.x + j * kThreads, token = i / kRows, r = i % kRows;
    const int64_t n = int64_t{kRows} * block + r;
    return {min(token, static_cast<int>(results().m) - 1), r, min(n, weight().rows - 1),
            i < kSums && token < results().m && n < weight().rows};
  }

  __device__ __forceinline__ void run() {
    __shared__ float parts[kWarps][kTiles][kTokens][kRows];
    // Where a thread has one result, what that needs may be there before the sums are.
    Finish ahead;
    if constexpr (kAhead) ahead = load_finish(results(), place_of(0).token, place_of(0).n);
    const int32_t (&ends)[3] = first.steps.step_ends;
    add_segment<mx::E2M1>(0, ends[0]);
    if (first.e3m2) {
      add_segment<mx::E3M2>(ends[0], ends[1]);
    } else {
      add_segment<mx::E2M3>(ends[0], ends[1]);
    }
    add_segment<mx::E4M3>(ends[1], ends[2]);
#pragma unroll
    for (int p = 0; p < kPanels; ++p)
#pragma unroll
      for (int t = 0; t < kTiles; ++t)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          parts[threadIdx.x / 32][t][2 * quarter + i % 2][kPanelRows * p + row + i / 2 * 8] =
              sums[p][t][i];
    __syncthreads();
    find_layer();
#pragma unroll
    for (int j = 0; j < kOwn; ++j) {
      const Place p = place_of(j);
      if (!p.there) continue;
      float sum = 0.0f;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) sum += parts[w][p.token / kTokens][p.token % kTokens][p.row];
      const Finish finish = kAhead ? ahead : load_finish(results(), p.token, p.n);
      store_finished(results(), sum, finish, p.token, p.n);
    }
  }
};

template <int kTiles, int kWarps, int kPanels, int kTogether>
__global__ void __launch_bounds__(32 * kWarps, kTogether)
    few_rows_kernel(const void* x, const __grid_constant__ Task task) {
  let_the_next_kernel_start();
  wait_for_the_kernel_before();
  Product<kTiles, kWarps, kPanels, kTogether>(x, task).run();
}

template <int kTiles, int kWarps, int kPanels, int kTogether>
cudaError_t launch(const void* x, std::span<const LayerProduct> layers, const Launcher& on) {
  Task task{};
  unsigned blocks = 0;
  for (size_t i = 0; i < kMostProducts; ++i) {
    task.first_blocks[i] = blocks;
    if (i >= layers.size()) continue;
    task.layers[i] = layers[i];
    blocks += static_cast<unsigned>((panels_of(layers[i].weight.rows) + kPanels - 1) / kPanels);
  }
  return launch_early(few_rows_kernel<kTiles, kWarps, kPanels, kTogether>, blocks, 32 * kWarps, 0,
                      on.stream, on.early, x, task);
}

}  // namespace

cudaError_t launch_few_rows(const void* x, std::span<const LayerProduct> layers,
                            const Launcher& on) {
  static_assert(kFewRows == 2 * kTokens);
  int64_t panels = 0;
  for (const LayerProduct& layer : layers) panels += panels_of(layer.weight.rows);
  // More warps have shorter loops. As long as it is possible all thread blocks run at once: a few
  // that come after the others take as long as these.
  const int64_t each = (panels + on.multiprocessors - 1) / on.multiprocessors;
  const auto of_one_tile = each <= 2   ? launch<1, 8, 1, 2>
                           : each <= 3 ? launch<1, 8, 1, 3>
                           : each <= 4 ? launch<1, 8, 1, 4>
                                       : launch<1, 4, 1, 0>;
  // Two tiles of tokens are more to read than a panel, so two panels share them.
  const auto of_two_tiles = each <= 2   ? launch<2, 16, 2, 1>
                            : each <= 4 ? launch<2, 8, 2, 2>
                                        : launch<2, 4, 2, 4>;
  return (layers[0].results.m <= kTokens ? of_one_tile : of_two_tiles)(x, layers, on);
}

}  // namespace micromix::cuda
