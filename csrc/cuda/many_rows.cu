// The product of many rows on Hopper: the weight stays packed, and is decoded in registers.
//
// A thread block has 128 rows of the weight and a tile of tokens. Either of two warpgroups
// multiplies 64 rows, the registers' operand of a warpgroup's matrix instruction, by the tokens,
// which a third one brings to a ring in shared memory by bulk copies, a slice of 64 channels at a
// time. Which channels an instruction multiplies is free as long as both operands agree, so a lane
// decodes blocks of its own, as in few_rows.cu. A warp has a panel of the weight, whose chunks
// come, steps ahead, to a ring that no other warp reads.
//
// Where there are few tiles, thread blocks of a cluster have a part of K each, and add up their
// sums in its order. Else they share tokens, of which each copies a part to both, and stay for
// several tiles: the operands of the next one come, and the results of the one before leave, while
// they multiply. Layers that share the tokens share a launch: the rows of one follow those of
// another.
#include <algorithm>
#include <array>
#include <atomic>

#include "bulk_copies.cuh"
#include "decode.cuh"
#include "early_launch.h"
#include "no_code.h"
#include "warpgroups.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define MICROMIX_HAS_WARPGROUPS 1
#else
#define MICROMIX_HAS_WARPGROUPS 0
#endif

namespace micromix::cuda {
namespace {

// That multiply; and all threads.
constexpr int kWarpgroups = 2, kWarps = 4 * kWarpgroups, kThreads = 32 * kWarps;
constexpr int kAllThreads = kThreads + 128;
constexpr int kRows = kWarps * kPanelRows;  // of the weight
constexpr int kMostParts = 8;               // of K: what any cluster may have
constexpr int kLeastSteps = 4;              // of a part
constexpr int kResultsOfToken = 128;        // bytes, of a warpgroup
constexpr int kSharers = 2;                 // of tokens

struct Task {
  const uint8_t* tiles_of_tokens;
  LayerProduct layers[kMostProducts];
  int64_t padded;  // tokens
  int32_t token_tiles;
  int32_t tiles;  // of all clusters
  // Of a layer, in those of a cluster: its first tile of rows; of a layer that is not there, where
  // all of them end.
  int32_t first_tiles[kMostProducts];
};

template <int kTokens, bool kShared>
struct Shape {
  static constexpr int kThreadBlocks = !kShared && kTokens <= 64 ? 2 : 1;  // of a multiprocessor
  // Of a thread that copies, and of one that multiplies: of all of them no more than the compiler
  // gives (80 or 168 each), or they wait for ever (`make check-sass` looks).
  static constexpr int few_registers() { return 24; }
  static constexpr int registers() { return kThreadBlocks == 2 ? 104 : 240; }
  // A stage is a slice of tokens, half a step. (Of 32 tokens a whole step could come at once, but
  // ptxas makes matrix instructions wait where a stage has all four groups of a step.)
  static constexpr int kStagesOfStep = 2;
  static constexpr int kStage = kTokens * kSliceBytes;
  static constexpr int kStages = kTokens == 128 ? 6 : 4;
  static constexpr int kChunks = kShared && kTokens == 256 ? 2 : 4;
  static constexpr int kChunk = chunk_bytes(8);  // the largest
  static constexpr int kRings = kStages * kStage + kWarps * kChunks * kChunk;
  // The sums of parts, in place of the rings: of a token in a row, which begins in another bank.
  static constexpr int kSumStride = kRows + 4, kSumBytes = kTokens * kSumStride * 4;
  // The results of a tile, beside the rings: of a warpgroup's rows, for each token.
  static constexpr int kResultBytes = kWarpgroups * kTokens * kResultsOfToken;
  static constexpr int kPowerBytes = 4 * kTokens;
  static constexpr int kBytes = kShared              ? kRings + kResultBytes + kPowerBytes
                                : kRings > kSumBytes ? kRings
                                                     : kSumBytes;
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
struct Product : Shape<kTokens, kShared> {
  using S = Shape<kTokens, kShared>;
  using S::kChunk, S::kChunks, S::kStage, S::kStages, S::kStagesOfStep, S::kSumStride;
  static constexpr int kColumns = kTokens < 128 ? kTokens : 128;  // of an instruction
  static constexpr int kPieces = kTokens / kColumns;
  static constexpr int kCopies = kShared ? kSharers : 1;  // of a slice

  const Task& task;
  const Steps& steps;  // the same of all layers
  const uint32_t shared, barriers;
  const int warp, lane;
  const int rank, part, parts;  // of those that share tokens; of K
  const int begin, end;         // steps
  int layer;                    // the tile's
  int64_t token, first_row;     // its first
  int largest[2];               // of the lane's rows, eight apart
  float sums[kTokens / 2];
  // What waits to be stored, in sixteens of tokens, of which tile.
  int waiting = 0, waiting_layer = 0;
  int64_t waiting_token = 0, waiting_row = 0;
  // What is copied next: of which tile, which of its stages or steps, from where.
  struct Next {
    int tile, i, copied;
    const uint8_t* from;
  } next_stage, next_chunk;

  __device__ Product(const Task& task, uint32_t shared, uint32_t barriers)
      : task(task),
        steps(task.layers[0].weight.steps),
        shared(shared),
        barriers(barriers),
        warp(__shfl_sync(kWarp, threadIdx.x / 32, 0)),  // the compiler sees that all have the same
        lane(threadIdx.x % 32),
        rank(kShared ? blockIdx.x % kSharers : 0),
        part(kShared ? 0 : blockIdx.y),
        parts(kShared ? 1 : gridDim.y),
        begin(start_of(part)),
        end(start_of(part + 1)) {
    const int first = begin < end ? first_tile() : task.tiles;
    next_stage = {first, 0, 0, tokens_of(first)};
    next_chunk = {first, 0, 0, first < task.tiles ? chunks_of(first) : nullptr};
  }

  // The first step of a part of K, which take about as long: a step of MXFP6 or MXFP8 takes a bit
  // longer than one of MXFP4, but where the tensor cores wait for neither.
  __device__ __forceinline__ int start_of(int part) const {
    constexpr int kFour = 8, kOthers = kTokens <= 128 ? 9 : 8;
    const int fours = steps.step_ends[0], others = steps.count() - fours;
    const int before = (kFour * fours + kOthers * others) * part / parts;
    return min(before / kFour, fours) + max(before - kFour * fours, 0) / kOthers;
  }

  // A cluster has every n-th tile.
  __device__ __forceinline__ int first_tile() const { return blockIdx.x / kCopies; }
  __device__ __forceinline__ int tile_after(int tile) const {
    return kShared ? tile + gridDim.x / kCopies : task.tiles;
  }
  __device__ __forceinline__ int64_t token_of(int tile) const {
    return int64_t{kTokens} * (tile % task.token_tiles);
  }
  __device__ __forceinline__ int layer_of(int tile) const {
    int found = 0;
#pragma unroll
    for (int i = 1; i < kMostProducts; ++i) found += tile / task.token_tiles >= task.first_tiles[i];
    return found;
  }
  __device__ __forceinline__ int64_t row_of(int tile, int layer) const {
    const int of_layer = tile / task.token_tiles - task.first_tiles[layer];
    return int64_t{kRows} * (of_layer * kCopies + rank);
  }
  __device__ __forceinline__ const PlacedRows& weight() const { return task.layers[layer].weight; }
  __device__ __forceinline__ const Results& results() const { return task.layers[layer].results; }
  __device__ __forceinline__ const uint8_t* tokens_of(int tile) const {
    return task.tiles_of_tokens + (2 * begin * task.padded + token_of(tile)) * kSliceBytes +
           rank * (kStage / kCopies);
  }
  __device__ __forceinline__ const uint8_t* chunks_of(int tile) const {
    // The last panel stands in for those beyond it.
    const int of = layer_of(tile);
    const PlacedRows& weight = task.layers[of].weight;
    const int64_t panel = min(row_of(tile, of) / kPanelRows + warp, panels_of(weight.rows) - 1);
    return weight.panels + panel * steps.panel_bytes() + steps.chunk_start(begin);
  }

  // The tokens of stage i of all are in place i % kStages, the warp's chunk of step i in place
  // i % kChunks; they are counted from tile to tile.
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

  // One thread: the tokens of the next stage, or this thread block's part of them, to all that
  // share them.
  __device__ __forceinline__ void copy_stage() {
    Next& next = next_stage;
    if (next.tile >= task.tiles) return;
    const int i = next.copied++;
    if (i >= kStages) wait(empty(i), (i / kStages - 1) % 2);
    constexpr int kBytes = kStage / kCopies;
    expect(full(i), kStage);
    const uint32_t to = stage(i) + rank * kBytes;
    if constexpr (kShared) {
      copy_bulk_to_cluster(to, next.from, kBytes, full(i), (1 << kSharers) - 1);
    } else {
      copy_bulk(to, next.from, kBytes, full(i));
    }
    next.from += task.padded * kSliceBytes;
    if (++next.i == kStagesOfStep * (end - begin)) {
      next.tile = tile_after(next.tile), next.i = 0;
      if (next.tile < task.tiles) next.from = tokens_of(next.tile);
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

  // The warp: the next chunk.
  __device__ __forceinline__ void copy_chunk() {
    Next& next = next_chunk;
    if (next.tile >= task.tiles) return;
    const int i = next.copied++;
    const uint32_t bytes = chunk_bytes(steps.bits_of(begin + next.i));
    if (lane == 0) {
      expect(chunk_full(i), bytes);
      copy_bulk(chunk(i), next.from, bytes, chunk_full(i));
    }
    next.from += bytes;
    if (++next.i == end - begin) {
      next.tile = tile_after(next.tile), next.i = 0;
      if (next.tile < task.tiles) next.from = chunks_of(next.tile);
    }
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
    copy_chunk();  // to where all of the warp have read
    if constexpr (kShared) store_waiting();
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
            multiply<kColumns>(
                sums + piece * kColumns / 2, operand[j],
                columns + (piece * kColumns * kSliceBytes + 32 * (2 * (g % 2) + j)) / 16);
        commit_matrix_instructions();
        wait_for_matrix_instructions<1>();
        if (g == 0 && i > 0) release_stage(i - 1);
      }
    }
  }

  __device__ __forceinline__ void begin_tile(int tile) {
    layer = layer_of(tile), token = token_of(tile), first_row = row_of(tile, layer);
  }
  // `done`: steps of the tiles before.
  __device__ __forceinline__ void multiply_all(int done) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t row = first_row + kPanelRows * warp + lane / 4 + 8 * i;
      largest[i] = row < weight().rows ? __ldg(weight().largest + row) : 0;
    }
#pragma unroll
    for (int i = 0; i < kTokens / 2; ++i) sums[i] = 0.0f;
    settle_sums();
    const int32_t (&ends)[3] = steps.step_ends;
    multiply_segment<mx::E2M1>(done, begin, min(end, ends[0]));
    if (task.layers[0].weight.e3m2) {
      multiply_segment<mx::E3M2>(done, max(begin, ends[0]), min(end, ends[1]));
    } else {
      multiply_segment<mx::E2M3>(done, max(begin, ends[0]), min(end, ends[1]));
    }
    multiply_segment<mx::E4M3>(done, max(begin, ends[1]), end);
  }
  template <mx::ElementFormat kFormat>
  __device__ __forceinline__ void multiply_segment(int done, int first, int last) {
#pragma unroll 1
    for (int step = first; step < last; ++step) multiply_step<kFormat>(done + step - begin);
    wait_for_matrix_instructions<0>();
    settle_sums();
  }
  // The compiler neither reads nor moves the sums across this; where it does beside a matrix
  // instruction, ptxas makes each of them wait for the one before.
  __device__ __forceinline__ void settle_sums() {
#pragma unroll
    for (int i = 0; i < kTokens / 2; ++i) asm volatile("" : "+f"(sums[i])::"memory");
  }

  // The two warpgroups that multiply.
  static __device__ __forceinline__ void meet_multipliers() {
    asm volatile("bar.sync 1, %0;" ::"n"(kThreads) : "memory");
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
      count = static_cast<int>(max(min(p.weight().rows - n, int64_t{4}), int64_t{0}));
      const Results& to = p.results();
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (i >= count) continue;
        power[i] = Power(__ldg(p.weight().largest + n + i));
        if (to.bias) bias.v[i] = load_one(to.bias, to.bias_dtype, n + i);
      }
    }
  };
  // The warp's tokens, of the part's; each lane has the largest scale of one of them.
  struct Tokens {
    int first, stop, largest_of_own;

    __device__ __forceinline__ explicit Tokens(const Product& p)
        : first(kTokens * p.part / p.parts + p.warp) {
      const Results& to = p.results();
      stop = static_cast<int>(min(int64_t{kTokens} * (p.part + 1) / p.parts, to.m - p.token));
      static_assert(kTokens <= kWarps * 32);
      const int own = first + kWarps * p.lane;
      largest_of_own = own < stop ? __ldg(to.largest_of_rows + p.token + own) : 0;
    }
  };
  // The results of the part's tokens: the sums of all parts, in their order.
  __device__ __forceinline__ void finish_tokens(const Columns& columns,
                                                const Tokens& of_warp) const {
    const Results& to = results();
    for (int t = of_warp.first, i = 0; t < of_warp.stop; t += kWarps, ++i) {
      const Power of_row(__shfl_sync(kWarp, of_warp.largest_of_own, i));
      const uint32_t there = shared + 4 * (t * kSumStride + columns.row);
      float4 four[kMostParts];
#pragma unroll
      for (int i = 0; i < kMostParts; ++i)
        four[i] = i < parts ? load_from_cluster(in_thread_block(there, i)) : float4{};
      Values<4> y{};
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

  // The powers of two of the tile's tokens, both halves of each in bfloat16.
  __device__ __forceinline__ uint32_t powers() const {
    return shared + S::kRings + S::kResultBytes;
  }
  __device__ __forceinline__ void leave_powers() const {
    if (threadIdx.x >= kTokens) return;
    const Power power(__ldg(results().largest_of_rows + token + threadIdx.x));
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(powers() + 4 * threadIdx.x),
                 "r"(narrow_pair(power.a, power.b, true))
                 : "memory");
  }
  // A tile whose sums are all this thread block's, and whose results are of 16 bits, in rows of 16
  // bytes: they go to shared memory, from where they are stored while the next tile is multiplied,
  // rows of 128 bytes at a time. All of them at once would wait for the memory.
  __device__ __forceinline__ void leave_results() {
    const Results& to = results();
    const int64_t row = first_row + kPanelRows * warp + lane / 4;
    const bool bfloat16 = to.out_dtype == Dtype::kBFloat16;
    const Power of_column[2] = {Power(largest[0]), Power(largest[1])};
    float bias[2] = {};
#pragma unroll
    for (int i = 0; i < 2; ++i)
      if (to.bias && row + 8 * i < weight().rows)
        bias[i] = load_one(to.bias, to.bias_dtype, row + 8 * i);
    // A lane tells where four matrices of 8 x 8 have a token: of both halves of the warp's rows,
    // for 16 tokens.
    const int unit = 2 * (warp % 4) + lane / 8 % 2, of_sixteen = lane / 16 * 8 + lane % 8;
    const uint32_t place =
        waiting_results() + of_sixteen * kResultsOfToken + (unit ^ lane % 8) * 16;
    store_all_waiting();
    meet_multipliers();
    // A turn for each of the sums, all of which are instructions that come from memory: when they
    // were ten times as many, they took as long as half of the products.
#pragma unroll
    for (int c = 0; c < kTokens / 16; ++c) {
      uint32_t words[4];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint2 two =
            SharedChunk{powers()}.words<uint2>(4 * (16 * c + 8 * half + lane % 4 * 2));
        const float a[2] = {__uint_as_float(two.x << 16), __uint_as_float(two.y << 16)},
                    b[2] = {__uint_as_float(two.x & 0xFFFF0000),
                            __uint_as_float(two.y & 0xFFFF0000)};
        float y[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {  // as Power(x, y).times
          const Power& column = of_column[i / 2];
          y[i] = fmaf(sums[8 * c + 4 * half + i] * (a[i % 2] * column.b), b[i % 2] * column.a,
                      bias[i / 2]);
        }
        words[2 * half] = narrow_pair(y[0], y[1], bfloat16);
        words[2 * half + 1] = narrow_pair(y[2], y[3], bfloat16);
      }
      store_transposed(place + 16 * c * kResultsOfToken, words);
    }
    meet_multipliers();
    waiting = kTokens / 16, waiting_layer = layer;
    waiting_token = token, waiting_row = first_row + 64 * (warp / 4);
  }
  __device__ __forceinline__ uint32_t waiting_results() const {
    return shared + S::kRings + warp / 4 * kTokens * kResultsOfToken;
  }
  // The warp: the next four of its tokens that wait, if there are any.
  __device__ __forceinline__ void store_waiting() {
    if (waiting == 0) return;
    const Results& to = task.layers[waiting_layer].results;
    const int t = 16 * --waiting + 4 * (warp % 4) + lane / 8, unit = lane % 8;
    const Narrow<8> x = load_shared(waiting_results() + t * kResultsOfToken + (unit ^ t % 8) * 16);
    if (waiting_token + t < to.m && waiting_row + 8 * unit < to.n)
      *static_cast<uint4*>(element(to.out, to.out_dtype,
                                   (waiting_token + t) * to.stride + waiting_row + 8 * unit)) = {
          x.word[0], x.word[1], x.word[2], x.word[3]};
  }
  __device__ __forceinline__ void store_all_waiting() {
    while (waiting > 0) store_waiting();
  }

  __device__ __forceinline__ void multiply_tiles() {
    int done = 0;
    for (int tile = first_tile(); tile < task.tiles; tile = tile_after(tile)) {
      begin_tile(tile);
      leave_powers();
      multiply_all(done);
      done += end - begin;
      leave_results();
    }
    store_all_waiting();
  }
  __device__ __forceinline__ void multiply_part() {
    begin_tile(first_tile());
    multiply_all(0);
    const Columns columns(*this);
    const Tokens of_warp(*this);
    // All of the thread block's slices and codes have been read: sums take their place.
    meet_multipliers();
    leave_sums();
    if (parts == 1) {
      meet_multipliers();
    } else {
      meet_cluster();
    }
    finish_tokens(columns, of_warp);
  }

  __device__ __forceinline__ void run() {
    if (threadIdx.x == 0) {
      constexpr int kReaders = kWarps * kArrivalsOfWarp * kCopies;
      for (int i = 0; i < kStages; ++i) make_barrier(full(i), 1), make_barrier(empty(i), kReaders);
      if constexpr (kShared) show_barriers();
    }
    if (lane == 0 && warp < kWarps) {
      for (int i = 0; i < kChunks; ++i) make_barrier(chunk_full(i), 1);
      before_bulk_copies();
    }
    let_the_next_kernel_start();
    wait_for_the_kernel_before();
    if (warp < kWarps)
      for (int i = 0; i < kChunks; ++i) copy_chunk();
    if constexpr (kShared) {
      meet_cluster();  // others tell this one's barriers
    } else {
      __syncthreads();
    }
    if (warp >= kWarps) {
      keep_registers<S::few_registers()>();
      if (threadIdx.x == kThreads)
        while (next_stage.tile < task.tiles) copy_stage();
      __syncwarp();
      if (!kShared && parts > 1) meet_cluster();
    } else {
      get_registers<S::registers()>();
      if constexpr (kShared) {
        multiply_tiles();
      } else {
        multiply_part();
      }
    }
    if (kShared || parts > 1) meet_cluster();  // others tell its barriers, or read its sums
  }
};

#endif

// On other devices there is an empty kernel, with other bounds: find_many_rows tells them apart.
template <int kTokens, bool kShared>
__global__ void __launch_bounds__(MICROMIX_HAS_WARPGROUPS ? kAllThreads : 32,
                                  Shape<kTokens, kShared>::kThreadBlocks)
    many_rows_kernel(const __grid_constant__ Task task) {
#if MICROMIX_HAS_WARPGROUPS
  extern __shared__ __align__(1024) uint8_t shared[];
  using S = Shape<kTokens, kShared>;
  __shared__ uint64_t barriers[2 * S::kStages + kWarps * S::kChunks];
  const auto address = [](const void* p) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(p));
  };
  Product<kTokens, kShared>(task, address(shared), address(barriers)).run();
#endif
}

// Of shared memory, which two thread blocks of a multiprocessor do not have.
constexpr int kBytesOfOne = 120 * 1024;

struct Kernel {
  decltype(&many_rows_kernel<32, false>) run;
  int bytes, most_bytes;
  unsigned blocks, parts, sharers;

  template <int kTokens, bool kShared>
  static Kernel of(unsigned clusters, unsigned parts, bool alone) {
    constexpr unsigned kOfCluster = kShared ? kSharers : 1;
    constexpr int kBytes = Shape<kTokens, kShared>::kBytes;
    constexpr int kMostBytes = std::max(kBytes, kBytesOfOne);
    return {many_rows_kernel<kTokens, kShared>,
            alone ? kMostBytes : kBytes,
            kMostBytes,
            clusters * kOfCluster,
            parts,
            kOfCluster};
  }
  cudaLaunchConfig_t config(const Launcher& on,
                            cudaLaunchAttribute (&attributes)[kMostAttributes]) const {
    return early_config({blocks, parts, 1}, kAllThreads, bytes, on.stream, on.early,
                        {sharers, parts, 1}, attributes);
  }
  // The same every time: another thread may launch it with more.
  cudaError_t allow_bytes() const {
    return cudaFuncSetAttribute(run, cudaFuncAttributeMaxDynamicSharedMemorySize, most_bytes);
  }
};

// How many clusters run at once on a device, none if that cannot be told; asked once.
template <int kTokens, bool kShared>
int clusters_at_once(unsigned parts, bool alone, const Launcher& on) {
  static std::array<std::array<std::atomic<int>, 2 * kMostParts + 2>, kMostDevices> known{};
  std::atomic<int>& count = known[on.device][2 * parts + alone];
  if (count == 0) {
    const auto kernel = Kernel::of<kTokens, kShared>(1, parts, alone);
    cudaLaunchAttribute attributes[kMostAttributes];
    const cudaLaunchConfig_t config = kernel.config(on, attributes);
    int found = 0;
    if (kernel.allow_bytes() != cudaSuccess ||
        cudaOccupancyMaxActiveClusters(&found, kernel.run, &config) != cudaSuccess)
      cudaGetLastError();
    count = found > 0 ? found : -1;
  }
  return count;
}

struct Cut {
  int parts;
  bool alone;  // on a multiprocessor
};

// How K is cut: where all parts of all tiles run at once, what takes the least time. Two thread
// blocks of a multiprocessor take nearly twice as long as one, and while two are on one, others may
// have none.
template <int kTokens>
Cut cut_of(int64_t tiles, int steps, const Launcher& on) {
  constexpr int kMostOfOne = Shape<kTokens, false>::kThreadBlocks;
  // In quarters of a step; a part's sums take three.
  const auto time = [&](int parts, int of_one) {
    return (of_one == 1 ? 8 : 15) * steps / (2 * parts) + 3 * parts;
  };
  Cut best{1, false};
  int least = time(1, 1);
  for (int parts = 2; parts <= kMostParts && parts * kLeastSteps <= steps; ++parts) {
    for (int of_one = 1; of_one <= kMostOfOne; ++of_one) {
      const bool alone = of_one < kMostOfOne;
      if (time(parts, of_one) >= least ||
          clusters_at_once<kTokens, false>(parts, alone, on) < tiles)
        continue;
      best = {parts, alone}, least = time(parts, of_one);
    }
  }
  return best;
}

template <int kTokens>
cudaError_t launch(Task& task, std::span<const LayerProduct> layers, const Launcher& on) {
  // Tiles of rows, if a cluster has so many at a time.
  const auto row_tiles = [&](int64_t at_a_time) {
    int64_t count = 0;
    for (size_t i = 0; i < kMostProducts; ++i) {
      task.first_tiles[i] = static_cast<int32_t>(count);
      const int64_t rows = i < layers.size() ? layers[i].weight.rows : 0;
      count += (rows + at_a_time * kRows - 1) / (at_a_time * kRows);
    }
    return count;
  };
  task.token_tiles = static_cast<int32_t>((layers[0].results.m + kTokens - 1) / kTokens);
  const int64_t tiles = task.token_tiles * row_tiles(1);
  const Cut cut = cut_of<kTokens>(tiles, layers[0].weight.steps.count(), on);
  // Thread blocks that stay have results of 16 bits, in rows of 16 bytes, only.
  const bool shared =
      cut.parts == 1 && std::all_of(layers.begin(), layers.end(), [](const LayerProduct& layer) {
        const Results& to = layer.results;
        return layer.weight.rows > kRows && to.out_dtype != Dtype::kFloat32 && to.stride % 8 == 0 &&
               to.n % 8 == 0;
      });
  task.tiles = static_cast<int32_t>(shared ? task.token_tiles * row_tiles(kSharers) : tiles);
  int clusters = task.tiles;
  if (shared)
    if (const int most = clusters_at_once<kTokens, true>(1, false, on); most > 0)
      clusters = std::min(clusters, most);
  const auto kernel = shared ? Kernel::of<kTokens, true>(clusters, 1, false)
                             : Kernel::of<kTokens, false>(clusters, cut.parts, cut.alone);
  if (const cudaError_t error = kernel.allow_bytes()) return error;
  // Clusters that start early find multiprocessors taken. Where they are to have nearly all of them
  // at once, the last ones would wait until the first ones end.
  const bool nearly_all =
      cut.parts > 1 && 4 * tiles > 3 * clusters_at_once<kTokens, false>(cut.parts, cut.alone, on);
  Launcher how = on;
  how.early = on.early && !nearly_all;
  cudaLaunchAttribute attributes[kMostAttributes];
  const cudaLaunchConfig_t config = kernel.config(how, attributes);
  return cudaLaunchKernelEx(&config, kernel.run, task);
}

}  // namespace

cudaError_t find_many_rows(bool& there) {
  cudaFuncAttributes attributes{};
  const cudaError_t error = cudaFuncGetAttributes(&attributes, many_rows_kernel<64, false>);
  there = error == cudaSuccess && attributes.maxThreadsPerBlock == kAllThreads;
  return has_no_code(error) ? cudaSuccess : error;
}

cudaError_t launch_many_rows(const void* tiles, std::span<const LayerProduct> layers,
                             const Launcher& on) {
  const int64_t m = layers[0].results.m;
  Task task{};
  task.tiles_of_tokens = static_cast<const uint8_t*>(tiles);
  std::copy(layers.begin(), layers.end(), task.layers);
  task.padded = padded_rows(m);
  // Larger tiles decode less and are faster, but tokens that are not there take as long.
  constexpr double kGain = 1.15;
  const auto padded = [&](int64_t tile) {
    return static_cast<double>((m + tile - 1) / tile * tile);
  };
  const auto run = m <= 32                              ? launch<32>
                   : m <= 64                            ? launch<64>
                   : kGain * padded(128) <= padded(256) ? launch<128>
                                                        : launch<256>;
  return run(task, layers, on);
}

}  // namespace micromix::cuda
