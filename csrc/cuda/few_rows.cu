// The product of few rows: a weight is read once, packed, and decoded in registers.
//
// A thread block has 16 rows of the weight, and its warps share out K, four blocks at a time: one
// for each of the four lanes that hold a row in a matrix instruction of 16 x 8 x 16. Which channels
// an instruction multiplies is free as long as both operands agree: a lane's are eight of its
// block, as they are decoded. Sums of the warps are added in their order.
#include "decode.cuh"

namespace micromix::cuda {
namespace {

constexpr int kRows = 16, kTokens = 8, kGroups = 4;

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

  const void* const decoded;
  const PackedRows& weight;
  const Results& results;
  const int warp, row, quarter;  // the lane's first row of 16, and its block of four
  float sums[kTiles][4] = {};

  __device__ Product(const void* x, const PackedRows& weight, const Results& results)
      : decoded(x),
        weight(weight),
        results(results),
        warp(threadIdx.x / 32),
        row(threadIdx.x % 32 / 4),
        quarter(threadIdx.x % 4) {}

  // The last row stands in for those beyond it.
  __device__ __forceinline__ int64_t row_of_weight(int i) const {
    return min(int64_t{kRows} * blockIdx.x + i, weight.rows - 1);
  }

  // A segment's blocks [first, last), whose elements begin at byte `start` of a row. `turns`: fours
  // of blocks of the segments before, whose last warp the next one follows.
  template <mx::ElementFormat kFormat>
  __device__ __forceinline__ void add_segment(int first, int last, int start,
                                              const int (&largest)[2], int& turns) {
    constexpr int kBlockBytes = kFormat.bits * 4;
    const uint8_t* data[2];
    const uint8_t* scales[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t n = row_of_weight(row + 8 * i);
      data[i] = weight.data + n * weight.row_bytes + start;
      scales[i] = weight.scales + n * weight.blocks;
    }
    // Columns of tokens that are not there may hold anything.
    const uint4* x[kTiles];
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      const int64_t token = min(int64_t{kTokens} * t + row, results.m - 1);
      x[t] = static_cast<const uint4*>(decoded) + token * weight.blocks * kGroups;
    }
#pragma unroll 2
    for (int block = first + 4 * ((warp + kWarps - turns % kWarps) % kWarps); block < last;
         block += 4 * kWarps) {
      // The last block stands in for those beyond it, times zero: where that is NaN, so is the sum.
      const int own = min(block + quarter, last - 1);
      const BlockCodes<kFormat> codes[2] = {
          BlockCodes<kFormat>(data[0] + int64_t{own - first} * kBlockBytes),
          BlockCodes<kFormat>(data[1] + int64_t{own - first} * kBlockBytes)};
      uint32_t factor[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t of_block = factor_of_block<kFormat>(__ldg(scales[i] + own), largest[i]);
        factor[i] = block + quarter < last ? of_block : 0u;
      }
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
        const Eight w[2] = {codes[0].decode(g, factor[0]), codes[1].decode(g, factor[1])};
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
          const Eight v = __ldg(x[t] + int64_t{own} * kGroups + g);
          multiply(sums[t], w[0].x, w[1].x, w[0].y, w[1].y, v.x, v.y);
          multiply(sums[t], w[0].z, w[1].z, w[0].w, w[1].w, v.z, v.w);
        }
      }
    }
    turns += (last - first + 3) / 4;
  }

  __device__ __forceinline__ void run() {
    __shared__ float parts[kWarps][kTiles][kTokens][kRows];
    const int largest[2] = {weight.largest[row_of_weight(row)],
                            weight.largest[row_of_weight(row + 8)]};
    int turns = 0;
    add_segment<mx::E2M1>(0, weight.end4, 0, largest, turns);
    if (weight.e3m2) {
      add_segment<mx::E3M2>(weight.end4, weight.end6, weight.start6, largest, turns);
    } else {
      add_segment<mx::E2M3>(weight.end4, weight.end6, weight.start6, largest, turns);
    }
    add_segment<mx::E4M3>(weight.end6, weight.blocks, weight.start8, largest, turns);
#pragma unroll
    for (int t = 0; t < kTiles; ++t)
#pragma unroll
      for (int i = 0; i < 4; ++i) parts[warp][t][2 * quarter + i % 2][row + i / 2 * 8] = sums[t][i];
    __syncthreads();
    for (int i = threadIdx.x; i < kTiles * kTokens * kRows; i += kThreads) {
      const int r = i % kRows, token = i / kRows;
      const int64_t n = int64_t{kRows} * blockIdx.x + r;
      if (token >= results.m || n >= weight.rows) continue;
      float sum = 0.0f;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) sum += parts[w][token / kTokens][token % kTokens][r];
      finish(results, sum, token, n);
    }
  }
};

template <int kTiles, int kWarps>
__global__ void __launch_bounds__(32 * kWarps)
    few_rows_kernel(const void* x, const __grid_constant__ PackedRows weight,
                    const __grid_constant__ Results results) {
  Product<kTiles, kWarps>(x, weight, results).run();
}

template <int kWarps>
void launch(const void* x, const PackedRows& weight, const Results& results, unsigned blocks,
            cudaStream_t stream) {
  static_assert(kFewRows == 2 * kTokens);
  const auto kernel =
      results.m <= kTokens ? few_rows_kernel<1, kWarps> : few_rows_kernel<2, kWarps>;
  kernel<<<blocks, 32 * kWarps, 0, stream>>>(x, weight, results);
}

}  // namespace

cudaError_t launch_few_rows(const void* x, const PackedRows& weight, const Results& results,
                            cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>((weight.rows + kRows - 1) / kRows);
  // Fewer warps have longer loops, more of them fill the device where thread blocks are few.
  constexpr unsigned kManyBlocks = 512;
  if (blocks >= kManyBlocks) {
    launch<4>(x, weight, results, blocks, stream);
  } else {
    launch<8>(x, weight, results, blocks, stream);
  }
  return cudaGetLastError();
}

}  // namespace micromix::cuda
