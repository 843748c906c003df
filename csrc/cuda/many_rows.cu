// The product of many rows on Hopper: the weight stays packed, and is decoded in registers.
//
// A thread block has 128 rows of the weight and a tile of tokens. Either of its two warpgroups
// multiplies 64 rows, the registers' operand of a warpgroup's matrix instruction, by the tokens,
// which come to a ring in shared memory by bulk copies, a slice of 64 channels at a time. Which
// channels an instruction multiplies is free as long as both operands agree, so a lane decodes
// blocks of its own, as in few_rows.cu. A warp has a panel of the weight, whose chunks come, steps
// ahead, to a ring that no other warp reads.
//
// Thread blocks of a cluster either share tokens, of which each copies a part to both, or, where
// there are few tiles, have a part of K each, and add up their sums in its order.
#include <array>
#include <atomic>

#include "bulk_copies.cuh"
#include "decode.cuh"
#include "early_launch.h"
#include "warpgroups.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define MICROMIX_HAS_WARPGROUPS 1
#else
#define MICROMIX_HAS_WARPGROUPS 0
#endif

namespace micromix::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;  // two warpgroups
constexpr int kRows = kWarps * kPanelRows;             // of the weight
constexpr int kMostParts = 8;                          // of K: what any cluster may have
constexpr int kLeastSteps = 8;                         // of a part
constexpr int kSharers = 2;                            // of tokens

struct Task {
  const uint8_t* tiles;
  PlacedRows weight;
  Results results;
  int64_t padded;  // tokens
  int32_t token_tiles;
};

template <int kTokens>
struct Shape {
  static constexpr int kThreadBlocks = kTokens <= 128 ? 2 : 1;  // of a multiprocessor
  // A step's two slices of tokens are there together, or one after the other.
  static constexpr int kStagesOfStep = kTokens >= 64 ? 2 : 1;
  static constexpr int kSlice = kTokens * kSliceBytes, kStage = 2 * kSlice / kStagesOfStep;
  static constexpr int kStages = 4, kChunks = kTokens == 128 ? 2 : 4;
  static constexpr int kChunk = chunk_bytes(8);  // the largest
  // The sums as they are added up: of a token in a row, which begins in another bank.
  static constexpr int kSumStride = kRows + 4;
  static constexpr int kRings = kStages * kStage + kWarps * kChunks * kChunk;
  static constexpr int kSumBytes = kTokens * kSumStride * 4;
  static constexpr int kBytes = kRings > kSumBytes ? kRings : kSumBytes;
};

#if MICROMIX_HAS_WARPGROUPS || !defined(__CUDA_ARCH__)

// From a chunk in shared memory.
struct SharedChunk {
  uint32_t chunk;

  template <typename Words>
  __device__ __forceinline__ Words words(int from) const {
    if constexpr (sizeof(Words) == 16) {
      const Narrow<8> x = load_shared(chunk + from);
      return {x.word[0], x.word[1], x.word[2], x.word[3]};
    } else {
      Words x;
      asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(x.x), "=r"(x.y) : "r"(chunk + from));
      return x;
    }
  }
  template <mx::ElementFormat kFormat>
  __device__ __forceinline__ uint32_t scales(int lane) const {
    return load_shared_half(chunk + place_of_scale(kFormat.bits, lane, 0));
  }
};

// What a thread block does.
template <int kTokens, bool kShared>
struct Product : Shape<kTokens> {
  using S = Shape<kTokens>;
  using S::kChunk, S::kChunks, S::kSlice, S::kStage, S::kStages, S::kStagesOfStep, S::kSumStride;
  static constexpr int kColumns = kTokens < 128 ? kTokens : 128;  // of an instruction
  static constexpr int kPieces = kTokens / kColumns;
  static constexpr int kCopies = kShared ? kSharers : 1;  // of a slice

  const Task& task;
  const PlacedRows& weight;
  const uint32_t shared, barriers;
  const int warp, lane;
  const int rank, part, parts;     // of those that share tokens; of K
  int64_t token, first_row;        // the tile's first
  int begin, end;                  // steps
  const uint8_t *tokens, *chunks;  // of the first step
  int largest[2];                  // of the lane's rows, eight apart
  float sums[kTokens / 2];

  __device__ Product(const Task& task, uint32_t shared, uint32_t barriers)
      : task(task),
        weight(task.weight),
        shared(shared),
        barriers(barriers),
        warp(__shfl_sync(kWarp, threadIdx.x / 32, 0)),  // the compiler sees that all have the same
        lane(threadIdx.x % 32),
        rank(kShared ? blockIdx.x % kSharers : 0),
        part(kShared ? 0 : blockIdx.y),
        parts(kShared ? 1 : gridDim.y) {
    const int pair = blockIdx.x / kCopies;
    token = int64_t{kTokens} * (pair % task.token_tiles);
    first_row = int64_t{kRows} * (pair / task.token_tiles * kCopies + rank);
    const int steps = weight.steps.count();
    begin = steps * part / parts, end = steps * (part + 1) / parts;
    tokens =
        task.tiles + (2 * begin * task.padded + token) * kSliceBytes + rank * (kSlice / kCopies);
    // The last panel stands in for those beyond it.
    const int64_t panel = min(first_row / kPanelRows + warp, panels_of(weight.rows) - 1);
    chunks = weight.panels + panel * weight.steps.panel_bytes() + weight.steps.chunk_start(begin);
  }

  // The tokens of stage i of all are in place i % kStages, the warp's chunk of step i in place
  // i % kChunks.
  __device__ __forceinline__ uint32_t stage(int i) const { return shared + i % kStages * kStage; }
  __device__ __forceinline__ uint32_t chunk(int i) const {
    return shared + kStages * kStage + (warp * kChunks + i % kChunks) * kChunk;
  }
  // They are there; all have read them; the chunk is there.
  __device__ __forceinline__ uint32_t full(int i) const { return barriers + 8 * (i % kStages); }
  __device__ __forceinline__ uint32_t empty(int i) const { return full(i) + 8 * kStages; }
  __device__ __forceinline__ uint32_t chunk_full(int i) const {
    return barriers + 8 * (2 * kStages + warp * kChunks + i % kChunks);
  }

  // One thread: the tokens of a stage, or this thread block's part of them, to all that share them.
  __device__ __forceinline__ void copy_stage(int i) const {
    if (i >= kStagesOfStep * (end - begin)) return;
    if (i >= kStages) wait(empty(i), (i / kStages - 1) % 2);
    constexpr int kSlices = 2 / kStagesOfStep, kBytes = kSlice / kCopies;
    expect(full(i), kStage);
#pragma unroll
    for (int j = 0; j < kSlices; ++j) {
      const uint8_t* const from = tokens + (kSlices * i + j) * task.padded * kSliceBytes;
      const uint32_t to = stage(i) + j * kSlice + rank * kBytes;
      if constexpr (kShared) {
        copy_bulk_to_cluster(to, from, kBytes, full(i), (1 << kSharers) - 1);
      } else {
        copy_bulk(to, from, kBytes, full(i));
      }
    }
  }
  __device__ __forceinline__ void release_stage(int i) const {
    if constexpr (kShared) {
#pragma unroll
      for (int r = 0; r < kSharers; ++r) arrive_in_cluster_as_warp(in_thread_block(empty(i), r));
    } else {
      arrive_as_warp(empty(i));
    }
  }

  // The warp: the chunk of a step.
  __device__ __forceinline__ void copy_chunk(int i) {
    if (begin + i >= end) return;
    const uint32_t bytes = chunk_bytes(weight.steps.bits_of(begin + i));
    if (lane == 0) {
      expect(chunk_full(i), bytes);
      copy_bulk(chunk(i), chunks, bytes, chunk_full(i));
    }
    chunks += bytes;
  }

  template <mx::ElementFormat kFormat>
  __device__ __forceinline__ void multiply_step(int step) {
    wait(chunk_full(step), step / kChunks % 2);
    const SharedChunk from{chunk(step)};
    const uint32_t scales = from.template scales<kFormat>(lane);
    const BlockCodes<kFormat> block[2] = {{lane, 0, from}, {lane, 1, from}};
    const uint32_t factor[2] = {factor_of_block<kFormat>(scales & 0xFF, largest[0]),
                                factor_of_block<kFormat>(scales >> 8, largest[1])};
    __syncwarp();
    copy_chunk(step + kChunks);  // to where all of the warp have read
#pragma unroll
    for (int s = 0; s < kStagesOfStep; ++s) {
      const int i = kStagesOfStep * step + s;
      wait(full(i), i / kStages % 2);
      constexpr int kOfStage = kGroups / kStagesOfStep;
#pragma unroll
      for (int g = 0; g < kOfStage; ++g) {
        const Eight a = block[0].decode(kOfStage * s + g, factor[0]);
        const Eight b = block[1].decode(kOfStage * s + g, factor[1]);
        const uint32_t operand[2][4] = {{a.x, b.x, a.y, b.y}, {a.z, b.z, a.w, b.w}};
        const uint64_t columns = swizzled_rows(stage(i));
        before_matrix_instructions();
#pragma unroll
        for (int j = 0; j < 2; ++j)
#pragma unroll
          for (int piece = 0; piece < kPieces; ++piece)
            multiply<kColumns>(sums + piece * kColumns / 2, operand[j],
                               columns + (g / 2 * kSlice + piece * kColumns * kSliceBytes +
                                          32 * (2 * (g % 2) + j)) /
                                             16);
        commit_matrix_instructions();
        wait_for_matrix_instructions<1>();
        if (g == 0 && i > 0) release_stage(i - 1);
      }
      // To the place of the stage before: the other warpgroups have had some time.
      if (threadIdx.x == 0 && i > 0) copy_stage(i - 1 + kStages);
      __syncwarp();
    }
  }

  __device__ __forceinline__ void multiply_all() {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t row = first_row + kPanelRows * warp + lane / 4 + 8 * i;
      largest[i] = row < weight.rows ? __ldg(weight.largest + row) : 0;
    }
#pragma unroll
    for (int i = 0; i < kTokens / 2; ++i) sums[i] = 0.0f;
    settle_sums();
    const int32_t (&ends)[3] = weight.steps.step_ends;
    multiply_segment<mx::E2M1>(begin, min(end, ends[0]));
    if (weight.e3m2) {
      multiply_segment<mx::E3M2>(max(begin, ends[0]), min(end, ends[1]));
    } else {
      multiply_segment<mx::E2M3>(max(begin, ends[0]), min(end, ends[1]));
    }
    multiply_segment<mx::E4M3>(max(begin, ends[1]), end);
  }
  template <mx::ElementFormat kFormat>
  __device__ __forceinline__ void multiply_segment(int first, int last) {
#pragma unroll 1
    for (int step = first; step < last; ++step) multiply_step<kFormat>(step - begin);
    wait_for_matrix_instructions<0>();
    settle_sums();
  }
  // The compiler neither reads nor moves the sums across this; where it does beside a matrix
  // instruction, ptxas makes each of them wait for the one before.
  __device__ __forceinline__ void settle_sums() {
#pragma unroll
    for (int i = 0; i < kTokens / 2; ++i) asm volatile("" : "+f"(sums[i])::"memory");
  }

  // Rows of the weight side by side, for each token.
  __device__ __forceinline__ void leave_sums() const {
    const int row = kPanelRows * warp + lane / 4;
#pragma unroll
    for (int i = 0; i < kTokens / 2; ++i) {
      const int column = i / 4 * 8 + 2 * (lane % 4) + i % 2;
      const uint32_t to = shared + 4 * (column * kSumStride + row + i / 2 % 2 * 8);
      asm volatile("st.shared.f32 [%0], %1;" ::"r"(to), "f"(sums[i]) : "memory");
    }
  }

  // What four rows' results have in common, for each token.
  struct Columns {
    int64_t n;
    int row, count;
    Power power[4] = {Power(0), Power(0), Power(0), Power(0)};
    Values<4> bias{};

    __device__ __forceinline__ explicit Columns(const Product& p)
        : n(p.first_row + 4 * p.lane), row(4 * p.lane) {
      count = static_cast<int>(max(min(p.weight.rows - n, int64_t{4}), int64_t{0}));
      const Results& to = p.task.results;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (i >= count) continue;
        power[i] = Power(__ldg(p.weight.largest + n + i));
        if (to.bias) bias.v[i] = load_one(to.bias, to.bias_dtype, n + i);
      }
    }
  };
  // The warp's tokens, of the part's; each lane has the largest scale of one of them.
  struct Tokens {
    int first, stop, largest_of_own;

    __device__ __forceinline__ explicit Tokens(const Product& p)
        : first(kTokens * p.part / p.parts + p.warp) {
      const Results& to = p.task.results;
      stop = static_cast<int>(min(int64_t{kTokens} * (p.part + 1) / p.parts, to.m - p.token));
      static_assert(kTokens <= kWarps * 32);
      const int own = first + kWarps * p.lane;
      largest_of_own = own < stop ? __ldg(to.largest_of_rows + p.token + own) : 0;
    }
  };
  // The results of the part's tokens: the sums of all parts, in their order.
  __device__ __forceinline__ void finish_tokens(const Columns& columns,
                                                const Tokens& of_warp) const {
    const Results& to = task.results;
    for (int t = of_warp.first, i = 0; t < of_warp.stop; t += kWarps, ++i) {
      const Power of_row(__shfl_sync(kWarp, of_warp.largest_of_own, i));
      const uint32_t there = shared + 4 * (t * kSumStride + columns.row);
      float4 four[kShared ? 1 : kMostParts];
      Values<4> y{};
      if constexpr (kShared) {
        four[0] = load_from_cluster(there);
      } else {
#pragma unroll
        for (int i = 0; i < kMostParts; ++i)
          four[i] = i < parts ? load_from_cluster(in_thread_block(there, i)) : float4{};
      }
#pragma unroll
      for (const float4& of_part : four)
        y.v[0] += of_part.x, y.v[1] += of_part.y, y.v[2] += of_part.z, y.v[3] += of_part.w;
#pragma unroll
      for (int i = 0; i < 4; ++i)
        y.v[i] = Power(of_row, columns.power[i]).times(y.v[i], columns.bias.v[i]);
      store_four(to, (token + t) * to.stride + columns.n, columns.count, y);
    }
  }
  __device__ __forceinline__ void store_four(const Results& to, int64_t at, int count,
                                             const Values<4>& y) const {
    if (count == 4 && to.stride % 4 == 0 && to.out_dtype != Dtype::kFloat32) {
      const Narrow<4> four = pack(y, to.out_dtype == Dtype::kBFloat16);
      *static_cast<uint2*>(element(to.out, to.out_dtype, at)) = {four.word[0], four.word[1]};
    } else {
      store_any(to.out, to.out_dtype, at, count, y);
    }
  }

  __device__ __forceinline__ void run() {
    if (threadIdx.x == 0) {
      constexpr int kReaders = kWarps * kArrivalsOfWarp * kCopies;
      for (int i = 0; i < kStages; ++i) make_barrier(full(i), 1), make_barrier(empty(i), kReaders);
      if constexpr (kShared) show_barriers();
    }
    if (lane == 0) {
      for (int i = 0; i < kChunks; ++i) make_barrier(chunk_full(i), 1);
      before_bulk_copies();
    }
    let_the_next_kernel_start();
    wait_for_the_kernel_before();
    for (int i = 0; i < kChunks; ++i) copy_chunk(i);
    if constexpr (kShared) {
      meet_cluster();  // others tell this one's barriers
    } else {
      __syncthreads();
    }
    if (threadIdx.x == 0)
      for (int i = 0; i < kStages; ++i) copy_stage(i);
    __syncwarp();
    multiply_all();
    const Columns columns(*this);
    const Tokens of_warp(*this);
    // All of the thread block's slices and codes have been read: sums take their place.
    __syncthreads();
    leave_sums();
    if (kShared || parts == 1) {
      __syncthreads();
    } else {
      meet_cluster();
    }
    finish_tokens(columns, of_warp);
    if (kShared || parts > 1) leave_cluster();  // others tell its barriers, or read its sums
  }
};

#endif

// On other devices there is an empty kernel, with other bounds: has_many_rows tells them apart.
template <int kTokens, bool kShared>
__global__ void __launch_bounds__(MICROMIX_HAS_WARPGROUPS ? kThreads : 32,
                                  Shape<kTokens>::kThreadBlocks)
    many_rows_kernel(const __grid_constant__ Task task) {
#if MICROMIX_HAS_WARPGROUPS
  extern __shared__ __align__(1024) uint8_t shared[];
  using S = Shape<kTokens>;
  __shared__ uint64_t barriers[2 * S::kStages + kWarps * S::kChunks];
  const auto address = [](const void* p) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(p));
  };
  Product<kTokens, kShared>(task, address(shared), address(barriers)).run();
#endif
}

template <int kTokens>
struct Kernel {
  using S = Shape<kTokens>;
  decltype(&many_rows_kernel<kTokens, false>) run;
  unsigned blocks, parts, sharers;

  cudaLaunchConfig_t config(const Launcher& on,
                            cudaLaunchAttribute (&attributes)[kMostAttributes]) const {
    return early_config({blocks, parts, 1}, kThreads, S::kBytes, on.stream, on.early,
                        {sharers, parts, 1}, attributes);
  }
};

// How many clusters of the parts of K run at once on a device; asked once.
template <int kTokens>
int clusters_at_once(unsigned parts, const Launcher& on) {
  static std::array<std::array<std::atomic<int>, kMostParts + 1>, kMostDevices> known{};
  std::atomic<int>& count = known[on.device][parts];
  if (count == 0) {
    const Kernel<kTokens> kernel{many_rows_kernel<kTokens, false>, 1, parts, 1};
    cudaLaunchAttribute attributes[kMostAttributes];
    const cudaLaunchConfig_t config = kernel.config(on, attributes);
    int found = 0;
    if (cudaOccupancyMaxActiveClusters(&found, kernel.run, &config) != cudaSuccess)
      cudaGetLastError();
    count = found > 0 ? found : -1;
  }
  return count;
}

template <int kTokens>
cudaError_t launch(Task& task, const Launcher& on) {
  using S = Shape<kTokens>;
  for (const auto kernel : {many_rows_kernel<kTokens, false>, many_rows_kernel<kTokens, true>})
    if (const cudaError_t error =
            cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, S::kBytes))
      return error;
  task.token_tiles = static_cast<int32_t>((task.results.m + kTokens - 1) / kTokens);
  const int64_t row_tiles = (task.weight.rows + kRows - 1) / kRows;
  const int64_t tiles = task.token_tiles * row_tiles;
  // As many parts as run at once.
  int parts = kMostParts;
  while (parts > 1 && (task.weight.steps.count() < parts * kLeastSteps ||
                       clusters_at_once<kTokens>(parts, on) < tiles))
    --parts;
  Kernel<kTokens> kernel{many_rows_kernel<kTokens, false>, static_cast<unsigned>(tiles),
                         static_cast<unsigned>(parts), 1};
  if (parts == 1 && row_tiles > 1) {
    const int64_t pairs = (row_tiles + kSharers - 1) / kSharers;
    kernel = {many_rows_kernel<kTokens, true>,
              static_cast<unsigned>(task.token_tiles * pairs * kSharers), 1, kSharers};
  }
  // Clusters that start early find multiprocessors taken. Where they are to have nearly all of them
  // at once, the last ones would wait until the first ones end.
  Launcher how = on;
  how.early = on.early && (parts == 1 || 4 * tiles <= 3 * clusters_at_once<kTokens>(parts, on));
  cudaLaunchAttribute attributes[kMostAttributes];
  const cudaLaunchConfig_t config = kernel.config(how, attributes);
  return cudaLaunchKernelEx(&config, kernel.run, task);
}

}  // namespace

bool has_many_rows() {
  cudaFuncAttributes attributes;
  if (cudaFuncGetAttributes(&attributes, many_rows_kernel<64, false>) != cudaSuccess) {
    cudaGetLastError();  // there is no code that this device runs, which is no error
    return false;
  }
  return attributes.maxThreadsPerBlock == kThreads;
}

cudaError_t launch_many_rows(const void* tiles, const PlacedRows& weight, const Results& results,
                             const Launcher& on) {
  Task task{static_cast<const uint8_t*>(tiles), weight, results, padded_rows(results.m), 0};
  // Larger tiles decode less and are faster, but tokens that are not there take as long.
  constexpr double kGain = 1.15;
  const auto padded = [&](int64_t tile) {
    return static_cast<double>((results.m + tile - 1) / tile * tile);
  };
  const auto run = results.m <= 32                      ? launch<32>
                   : results.m <= 64                    ? launch<64>
                   : kGain * padded(128) <= padded(256) ? launch<128>
                                                        : launch<256>;
  return run(task, on);
}

}  // namespace micromix::cuda
