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
  static constexpr int kThreadBlocks = kTokens <= 64 ? 2 : 1;  // of a multiprocessor
  static constexpr int kSlice = kTokens * kSliceBytes;
  static constexpr int kSlices = kTokens == 64 ? 5 : kTokens <= 128 ? 8 : 5;
  static constexpr int kChunk = chunk_bytes(8);  // the largest
  static constexpr int kChunks = kTokens == 256 ? 3 : 4;
  // The sums as they are added up: of a token in a row, which begins in another bank.
  static constexpr int kSumStride = kRows + 4;
  static constexpr int kRings = kSlices * kSlice + kWarps * kChunks * kChunk;
  static constexpr int kSumBytes = kTokens * kSumStride * 4;
  static constexpr int kBytes = kRings > kSumBytes ? kRings : kSumBytes;
};

#if MICROMIX_HAS_WARPGROUPS || !defined(__CUDA_ARCH__)

// A place in a ring of `kPlaces`, and the parity of its turn.
template <int kPlaces>
struct Place {
  int at = 0, parity = 0;

  __device__ __forceinline__ void go_on() {
    if (++at == kPlaces) at = 0, parity ^= 1;
  }
};

// From a chunk in shared memory.
struct SharedChunk {
  uint32_t chunk;

  template <typename Words>
  __device__ __forceinline__ Words words(int from) const {
    Words x;
    if constexpr (sizeof(Words) == 16) {
      asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                   : "r"(chunk + from));
    } else {
      asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(x.x), "=r"(x.y) : "r"(chunk + from));
    }
    return x;
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
  using S::kChunk, S::kChunks, S::kSlice, S::kSlices, S::kSumStride;
  static constexpr int kColumns = kTokens < 128 ? kTokens : 128;  // of an instruction
  static constexpr int kPieces = kTokens / kColumns;
  static constexpr int kSliceCopies = kShared ? kSharers : 1;

  const Task& task;
  const PlacedRows& weight;
  const uint32_t shared, barriers;
  const int warp, lane;
  const int rank, part, parts;  // of those that share tokens; of K
  int64_t token, first_row;     // the tile's first
  int begin, end;               // steps
  int largest[2];               // of the lane's rows, eight apart
  float sums[kTokens / 2];
  Place<kSlices> slices_used, slices_made;
  const uint8_t* next_slice;
  int slices_left;
  Place<kChunks> chunks_used, chunks_made;
  const uint8_t* next_chunk;
  int next_step;

  __device__ Product(const Task& task, uint32_t shared, uint32_t barriers)
      : task(task),
        weight(task.weight),
        shared(shared),
        barriers(barriers),
        warp(threadIdx.x / 32),
        lane(threadIdx.x % 32),
        rank(kShared ? blockIdx.x % kSharers : 0),
        part(kShared ? 0 : blockIdx.y),
        parts(kShared ? 1 : gridDim.y) {
    const int pair = blockIdx.x / kSliceCopies;
    token = int64_t{kTokens} * (pair % task.token_tiles);
    first_row = int64_t{kRows} * (pair / task.token_tiles * kSliceCopies + rank);
    const int steps = weight.steps.count();
    begin = steps * part / parts, end = steps * (part + 1) / parts;
    slices_left = 2 * (end - begin);
    next_slice = task.tiles + (2 * begin * task.padded + token) * kSliceBytes +
                 rank * (kSlice / kSliceCopies);
    // The last panel stands in for those beyond it.
    const int64_t panel = min(first_row / kPanelRows + warp, panels_of(weight.rows) - 1);
    next_chunk =
        weight.panels + panel * weight.steps.panel_bytes() + weight.steps.chunk_start(begin);
    next_step = begin;
  }

  __device__ __forceinline__ uint32_t slice(int i) const { return shared + i * kSlice; }
  __device__ __forceinline__ uint32_t chunk(int i) const {
    return shared + kSlices * kSlice + (warp * kChunks + i) * kChunk;
  }
  // A slice is there; all have read it; the warp's chunk is there.
  __device__ __forceinline__ uint32_t full(int i) const { return barriers + 8 * i; }
  __device__ __forceinline__ uint32_t empty(int i) const { return full(kSlices + i); }
  __device__ __forceinline__ uint32_t chunk_full(int i) const {
    return full(2 * kSlices + warp * kChunks + i);
  }

  // One thread: the next slice, or this thread block's part of it, to all that share it.
  __device__ __forceinline__ void copy_slice() {
    const uint32_t to = slice(slices_made.at), told = full(slices_made.at);
    expect(told, kSlice);
    if constexpr (kShared) {
      constexpr uint32_t kBytes = kSlice / kSharers;
      copy_bulk_to_cluster(to + rank * kBytes, next_slice, kBytes, told, (1 << kSharers) - 1);
    } else {
      copy_bulk(to, next_slice, kSlice, told);
    }
    next_slice += task.padded * kSliceBytes;
    slices_made.go_on();
    --slices_left;
  }
  // In the place of one that all have read.
  __device__ __forceinline__ void copy_slice_again() {
    if (slices_left == 0) return;
    wait(empty(slices_made.at), slices_made.parity ^ 1);
    copy_slice();
  }
  __device__ __forceinline__ void release_slice(int i) const {
    if constexpr (kShared) {
#pragma unroll
      for (int r = 0; r < kSharers; ++r) arrive_in_cluster_as_warp(in_thread_block(empty(i), r));
    } else {
      arrive_as_warp(empty(i));
    }
  }

  // One lane: the warp's next chunk.
  __device__ __forceinline__ void copy_chunk() {
    if (next_step >= end) return;
    const uint32_t bytes = chunk_bytes(weight.steps.bits_of(next_step));
    expect(chunk_full(chunks_made.at), bytes);
    copy_bulk(chunk(chunks_made.at), next_chunk, bytes, chunk_full(chunks_made.at));
    next_chunk += bytes;
    ++next_step;
    chunks_made.go_on();
  }

  template <mx::ElementFormat kFormat>
  __device__ __forceinline__ void multiply_step(bool is_first) {
    wait(chunk_full(chunks_used.at), chunks_used.parity);
    const SharedChunk from{chunk(chunks_used.at)};
    const uint32_t scales = from.template scales<kFormat>(lane);
    const BlockCodes<kFormat> block[2] = {{lane, 0, from}, {lane, 1, from}};
    const uint32_t factor[2] = {factor_of_block<kFormat>(scales & 0xFF, largest[0]),
                                factor_of_block<kFormat>(scales >> 8, largest[1])};
    __syncwarp();
    if (lane == 0) copy_chunk();  // to where all of the warp have read
    __syncwarp();
    chunks_used.go_on();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      wait(full(slices_used.at), slices_used.parity);
      const uint64_t tokens = swizzled_rows(slice(slices_used.at));
      const int before = slices_used.at == 0 ? kSlices - 1 : slices_used.at - 1;
#pragma unroll
      for (int g = 0; g < 2; ++g) {
        const Eight a = block[0].decode(2 * half + g, factor[0]);
        const Eight b = block[1].decode(2 * half + g, factor[1]);
        const uint32_t operand[2][4] = {{a.x, b.x, a.y, b.y}, {a.z, b.z, a.w, b.w}};
        before_matrix_instructions();
#pragma unroll
        for (int j = 0; j < 2; ++j)
#pragma unroll
          for (int piece = 0; piece < kPieces; ++piece)
            multiply<kColumns>(sums + piece * kColumns / 2, operand[j],
                               tokens + (piece * kColumns * kSliceBytes + 32 * (2 * g + j)) / 16);
        commit_matrix_instructions();
        wait_for_matrix_instructions<1>();
        if (g == 0 && (half == 1 || !is_first)) release_slice(before);
      }
      // The place of the slice before: the other warpgroups have had half a slice's time.
      if (threadIdx.x == 0 && (half == 1 || !is_first)) copy_slice_again();
      __syncwarp();
      slices_used.go_on();
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
    for (int step = first; step < last; ++step) multiply_step<kFormat>(step == begin);
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
  // The results of the part's tokens: the sums of all parts, in their order.
  __device__ __forceinline__ void finish_tokens(const Columns& columns) const {
    const Results& to = task.results;
    if (columns.count == 0) return;
    const int stop = static_cast<int>(min(int64_t{kTokens} * (part + 1) / parts, to.m - token));
    for (int t = kTokens * part / parts + warp; t < stop; t += kWarps) {
      const Power of_row(__ldg(to.largest_of_rows + token + t));
      const uint32_t own = shared + 4 * (t * kSumStride + columns.row);
      float4 four[kShared ? 1 : kMostParts];
      Values<4> y{};
      if constexpr (kShared) {
        four[0] = load_from_cluster(own);
      } else {
#pragma unroll
        for (int i = 0; i < kMostParts; ++i)
          four[i] = i < parts ? load_from_cluster(in_thread_block(own, i)) : float4{};
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
      constexpr int kReaders = kWarps * kArrivalsOfWarp * kSliceCopies;
      for (int i = 0; i < kSlices; ++i) make_barrier(full(i), 1), make_barrier(empty(i), kReaders);
      if constexpr (kShared) show_barriers();
    }
    if (lane == 0) {
      for (int i = 0; i < kChunks; ++i) make_barrier(chunk_full(i), 1);
      before_bulk_copies();
    }
    let_the_next_kernel_start();
    wait_for_the_kernel_before();
    if (lane == 0)
      for (int i = 0; i < kChunks; ++i) copy_chunk();
    if constexpr (kShared) {
      meet_cluster();  // others tell this one's barriers
    } else {
      __syncthreads();
    }
    if (threadIdx.x == 0)
      for (int i = 0; i < kSlices && slices_left > 0; ++i) copy_slice();
    __syncwarp();
    multiply_all();
    const Columns columns(*this);
    // All of the thread block's slices and codes have been read: sums take their place.
    __syncthreads();
    leave_sums();
    if (kShared || parts == 1) {
      __syncthreads();
    } else {
      meet_cluster();
    }
    finish_tokens(columns);
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
  __shared__ uint64_t barriers[2 * S::kSlices + kWarps * S::kChunks];
  const auto address = [](const void* p) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(p));
  };
  Product<kTokens, kShared>(task, address(shared), address(barriers)).run();
#endif
}

template <int kTokens>
cudaError_t launch(Task& task, const Launcher& on) {
  using S = Shape<kTokens>;
  task.token_tiles = static_cast<int32_t>((task.results.m + kTokens - 1) / kTokens);
  const int64_t row_tiles = (task.weight.rows + kRows - 1) / kRows;
  const int64_t tiles = task.token_tiles * row_tiles;
  unsigned parts = 1;
  while (parts < kMostParts && 2 * parts * tiles <= S::kThreadBlocks * on.multiprocessors)
    parts *= 2;
  const bool share = parts == 1 && row_tiles > 1;
  const auto kernel = share ? many_rows_kernel<kTokens, true> : many_rows_kernel<kTokens, false>;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, S::kBytes);
  if (error != cudaSuccess) return error;
  const int64_t blocks =
      share ? task.token_tiles * ((row_tiles + kSharers - 1) / kSharers * kSharers) : tiles;
  return launch_early(kernel, {static_cast<unsigned>(blocks), parts, 1}, kThreads, S::kBytes,
                      on.stream, on.early, {share ? kSharers : 1u, parts, 1}, task);
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
  const auto run = results.m <= 16    ? launch<16>
                   : results.m <= 32  ? launch<32>
                   : results.m <= 64  ? launch<64>
                   : results.m <= 128 ? launch<128>
                                      : launch<256>;
  return run(task, on);
}

}  // namespace micromix::cuda
