// The row kernel for many long regular rows of a 16-bit type, on sm_90 and later: thread blocks
// that stay.
//
// A thread block takes every n-th row. Bulk copies of its next rows to a ring in shared memory run
// behind its work, so memory is not idle for a norm's sums or an order's gathers, as it is where a
// block loads a row, works on it, and ends (rows.cuh). A thread has the same channels of every row:
// it reads the order, and a norm's weight and bias in that order, once. An order gathers from the
// operands; no result is staged.
//
// No barrier stops a thread block. A warp adds its part of the next row's statistics before it
// gathers and quantises this row, says so to a barrier in shared memory, and needs the others'
// parts only a row later; it says when it has read a row, whose place the first thread then fills.
// So warps drift apart by almost a row, and the gathers of some run beside the arithmetic of
// others.
#pragma once

#include "bulk_copies.cuh"
#include "quantize_group.cuh"
#include "row_functions.cuh"

namespace micromix::cuda {

// Parts of a row's sum and sum of squares, eight of each warp.
struct Parts {
  static constexpr int kOfWarp = 8, kCount = kOfWarp * kStreamedThreads / 32;
  float sum[kCount], squares[kCount];
};

// What a thread block does. 16 bytes of a row are a piece. `kTwo`: there is a second operand.
template <RowFunction kFunction, Types kTypes, bool kOrdered, bool kTwo>
struct Stream {
  static constexpr bool kNorm = kFunction != RowFunction::kPointwise;
  static constexpr bool kBFloat16 = kTypes == Types::kBFloat16;
  static constexpr int kGroup = kStreamedGroup, kPieces = kGroup / 8;
  static_assert(is_narrow(kTypes));
  static constexpr int kFetchedRows = 2;  // before the kernel before ends
  using Block = Pairs<kGroup>;

  const Rows& rows;
  const RowTask& task;
  const Output& out;
  const int k, stages;
  const uint32_t row_bytes, barriers, ring;  // of an operand in shared memory; its stages
  uint32_t hand_over;                        // where the order goes from thread to thread
  int first_rows;  // that are copied before the order and the parameters are where they belong
  int own;         // pieces whose sums are this thread's
  uint32_t places[kOrdered ? kGroup : 1];  // of the values in a staged row
  uint32_t padded = 0;                     // a bit for each channel that is padding
  float inverse_k;

  // A norm's weight and bias lie behind the ring as each thread wants them. An order gathers them
  // from the last places of the ring, before rows need these.
  static constexpr int kOperands = kTwo ? 2 : 1;
  static constexpr int kParameters = streamed_parameters(kFunction);
  static constexpr int kStagedParameters = kOrdered ? kParameters : 0;
  static constexpr uint32_t kNoChannel = 0xFFFFFFFF;
  __device__ __forceinline__ uint32_t staged_parameter(int i) const {
    return ring + (stages * kOperands - 1 - i) * row_bytes;
  }
  __device__ __forceinline__ uint32_t place_of_parameter(int parameter, int i) const {
    return ring + stages * kOperands * row_bytes +
           16 * ((parameter * kPieces + i) * blockDim.x + threadIdx.x);
  }
  // 16 bytes of the channels of a thread: where its parameters go, or else in the end of the ring.
  __device__ __forceinline__ uint32_t handed_over(int i, int thread) const {
    return hand_over + 16 * (i * blockDim.x + thread);
  }
  __device__ __forceinline__ uint32_t stage(int i) const {
    return ring + i * kOperands * row_bytes;
  }
  static __device__ __forceinline__ uint32_t place_of(uint32_t piece) {
    return kStreamedEnd + 16 * piece;
  }

  __device__ Stream(const Rows& rows, void* shared)
      : rows(rows),
        task(rows.task),
        out(rows.output),
        k(rows.k),
        stages(rows.stages),
        row_bytes(static_cast<uint32_t>(streamed_operand_bytes(rows.k))),
        barriers(static_cast<uint32_t>(__cvta_generic_to_shared(shared))),
        ring(barriers + kStreamedBarriers),
        own((k / 8 - static_cast<int>(threadIdx.x) + static_cast<int>(blockDim.x) - 1) /
            static_cast<int>(blockDim.x)),
        inverse_k(1.0f / static_cast<float>(rows.k)) {
    hand_over = place_of_parameter(0, 0) - 16 * threadIdx.x;
    first_rows = stages - (kStagedParameters + kOperands - 1) / kOperands;
    if constexpr (kOrdered && kParameters == 0) {
      const int ring_bytes = stages * kOperands * row_bytes, bytes = 2 * kGroup * blockDim.x;
      const int before = max(0, ring_bytes - bytes) / 16 * 16;
      hand_over = ring + before;
      first_rows = before / (kOperands * row_bytes);
    }
  }

  // An order is read 16 bytes at a time, neighbours by neighbouring threads: this thread's channels
  // reach it through shared memory.
  struct Channels {
    uint32_t word[kOrdered ? kGroup : 1];
  };
  __device__ __forceinline__ Channels read_order() const {
    Channels order{};
    if constexpr (kOrdered) {
      const int first = kGroup * (threadIdx.x - threadIdx.x % 32) + 4 * (threadIdx.x % 32);
#pragma unroll
      for (int i = 0; i < kGroup; i += 4) {
        uint32_t four[4] = {kNoChannel, kNoChannel, kNoChannel, kNoChannel};
        if (first + 32 * i < mx::kBlock * out.blocks)
          load_words_now(out.order + first + 32 * i, four);
#pragma unroll
        for (int j = 0; j < 4; ++j) order.word[i + j] = four[j];
      }
    }
    return order;
  }
  __device__ __forceinline__ void place_channels(const Channels& order) {
    if constexpr (!kOrdered) {
#pragma unroll
      for (int i = 0; i < kPieces; ++i)
        if (8 * piece_of_vector(i) >= k) padded |= 0xFFu << 8 * i;
    } else {
      const auto channels = static_cast<uint32_t>(k);
      const int lane = threadIdx.x % 32;
      // A zero where there is no channel, and a NaN for one that is not there.
      bool pads = false;
#pragma unroll
      for (int i = 0; i < kGroup; i += 4) {
        uint32_t place[4], most = 0;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          most = max(most, order.word[i + j]);
          place[j] = kStreamedEnd + streamed_place(order.word[i + j]);
        }
        if (most >= channels) {
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const uint32_t channel = order.word[i + j];
            if (channel >= channels)
              place[j] = channel == kNoChannel ? kStreamedZero : kStreamedNan;
          }
          pads = true;
        }
        // The channels from 4 * lane on of the (i / 4)th 128 of the warp.
        const int thread = threadIdx.x - lane + i + lane / 8;
        asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(handed_over(lane % 8 / 2, thread) +
                                                              8 * (lane % 2)),
                     "r"(place[0] | place[1] << 16), "r"(place[2] | place[3] << 16)
                     : "memory");
      }
      pads = __any_sync(kWarp, pads);
      __syncwarp();
#pragma unroll
      for (int i = 0; i < kPieces; ++i) {
        const Narrow<8> eight = load_shared(handed_over(i, threadIdx.x));
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          places[8 * i + 2 * j] = eight.word[j] & 0xFFFF;
          places[8 * i + 2 * j + 1] = eight.word[j] >> 16;
        }
      }
#pragma unroll
      for (int i = 0; i < kGroup; ++i) asm volatile("" : "+r"(places[i]));  // stay unpacked
      if (pads) {
#pragma unroll
        for (int i = 0; i < kGroup; ++i) padded |= (places[i] == kStreamedZero) << i;
      }
    }
  }
  // A norm's weight or bias: this thread's channels, or, where an order gathers them, as they lie
  // in memory.
  struct Vector {
    Narrow<8> piece[kPieces];
  };
  __device__ __forceinline__ uint32_t piece_of_vector(int i) const {
    return kOrdered ? threadIdx.x + i * blockDim.x : kPieces * threadIdx.x + i;
  }
  __device__ __forceinline__ Vector read_vector(const RowInput& from) const {
    Vector x{};
    if (from.data == nullptr) return x;
#pragma unroll
    for (int i = 0; i < kPieces; ++i)
      if (8 * piece_of_vector(i) < k)
        load_words_now(static_cast<const uint16_t*>(from.data) + 8 * piece_of_vector(i),
                       x.piece[i].word);
    return x;
  }
  __device__ __forceinline__ void stage_vector(int which, const Vector& x) const {
#pragma unroll
    for (int i = 0; i < kPieces; ++i)
      if (8 * piece_of_vector(i) < k)
        store_shared(staged_parameter(which) + place_of(piece_of_vector(i)), x.piece[i].word);
  }
  // Puts it where `parameter` finds it; without one, what changes nothing.
  __device__ __forceinline__ void place_vector(int which, const Vector& x, bool there,
                                               uint32_t otherwise) {
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      Pairs<8> y{otherwise, otherwise, otherwise, otherwise};
      if (there) y = kOrdered ? read(staged_parameter(which), i) : paired(x.piece[i].word);
      store_shared(place_of_parameter(which, i), y.word);
    }
  }
  __device__ __forceinline__ Pairs<8> parameter(int which, int i) const {
    const Narrow<8> x = load_shared(place_of_parameter(which, i));
    return {x.word[0], x.word[1], x.word[2], x.word[3]};
  }

  // The barriers: a stage has its row; it has been read; a row's statistics are there.
  __device__ __forceinline__ uint32_t full(int stage) const { return barriers + 8 * stage; }
  __device__ __forceinline__ uint32_t empty(int stage) const {
    return barriers + 8 * (kMostStages + stage);
  }
  __device__ __forceinline__ uint32_t summed(int turn) const {
    return barriers + 8 * (2 * kMostStages + turn);
  }
  static_assert(8 * (2 * kMostStages + 2) <= kStreamedBarriers);

  // The first thread's: a row to a stage.
  __device__ __forceinline__ void copy(int64_t row, int to) const {
    if (threadIdx.x != 0 || row >= rows.count) return;
    const uint32_t bytes = 2 * k, barrier = full(to);
    expect(barrier, kOperands * bytes);
    copy_bulk(stage(to) + kStreamedEnd,
              static_cast<const uint16_t*>(task.x.data) + row * task.x.stride, bytes, barrier);
    if constexpr (kTwo)
      copy_bulk(stage(to) + row_bytes + kStreamedEnd,
                static_cast<const uint16_t*>(task.second.data) + row * task.second.stride, bytes,
                barrier);
  }
  // A warp's part of a row's statistics, of the pieces that its threads have: the sum, where it
  // counts, and the sum of squares. Adds the residual first, where there is one.
  __device__ __forceinline__ void statistics_of_warp(int64_t row, uint32_t x, Parts& to) {
    Narrow<8> bits[kPieces];
    uint32_t place[kPieces];
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      place[i] = x + place_of(threadIdx.x + i * blockDim.x);
      bits[i] = load_shared_if(i < own, place[i]);
    }
    if constexpr (kTwo) {
#pragma unroll
      for (int i = 0; i < kPieces; ++i) {
        if (i >= own) continue;
        const Narrow<8> second = load_shared(place[i] + row_bytes);
#pragma unroll
        for (int j = 0; j < 4; ++j)
          bits[i].word[j] = sum_of_pairs(bits[i].word[j], second.word[j], kBFloat16);
        store_shared(place[i], bits[i].word);
        before_bulk_copies();
        store_words(static_cast<uint16_t*>(task.sum) + row * k + 8 * (threadIdx.x + i * blockDim.x),
                    bits[i].word);
      }
    }
    uint32_t words[4 * kPieces];
#pragma unroll
    for (int i = 0; i < 4 * kPieces; ++i) words[i] = bits[i / 4].word[i % 4];
    constexpr bool kSum = kFunction == RowFunction::kLayerNorm;
    const Products products = products_of_lanes<kSum>(words, threadIdx.x & 4, kBFloat16);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (lane % 4 == lane / 8) {
      const int part = Parts::kOfWarp * warp + lane / 4;
      to.squares[part] = products.squares;
      if constexpr (kSum) to.sum[part] = products.sum;
    }
  }
  // The sum of the parts that are this lane's to add.
  __device__ __forceinline__ float sum_of_lane(const float (&parts)[Parts::kCount]) const {
    const int count = Parts::kOfWarp * (blockDim.x / 32);
    float of_lane[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int part = threadIdx.x % 32 + 32 * i;
      of_lane[i] = part < count ? parts[part] : 0.0f;
    }
    return (of_lane[0] + of_lane[1]) + (of_lane[2] + of_lane[3]);
  }
  struct PartsOfLane {
    float sum, squares;
  };
  __device__ __forceinline__ PartsOfLane read_parts(const Parts& parts) const {
    PartsOfLane of_lane{0.0f, sum_of_lane(parts.squares)};
    if constexpr (kFunction == RowFunction::kLayerNorm) of_lane.sum = sum_of_lane(parts.sum);
    return of_lane;
  }
  // The same in every thread, and always from the same sums in the same order.
  __device__ __forceinline__ Statistics statistics(uint32_t x, const PartsOfLane& of_lane,
                                                   Parts& parts) const {
    if constexpr (kFunction == RowFunction::kRmsNorm) {
      return {inverse_root(warp_sum(of_lane.squares) * inverse_k, task.eps)};
    } else {
      float sum = of_lane.sum, squares = of_lane.squares;
#pragma unroll
      for (int lanes = 16; lanes > 0; lanes /= 2) {
        sum += __shfl_xor_sync(kWarp, sum, lanes);
        squares += __shfl_xor_sync(kWarp, squares, lanes);
      }
      const float mean = sum * inverse_k;
      float variance = squares * inverse_k - mean * mean;
      // What the difference loses is below the rounding of the sums where the mean is small. Where
      // it is not, or nothing is left, the squares of the distances from it are summed up.
      if (!is_near_zero(mean, variance)) variance = distant(x, mean, parts);
      return layer_statistics(mean, variance, task.eps);
    }
  }
  // Every thread of the thread block, or none, comes here.
  __device__ __forceinline__ float distant(uint32_t x, float mean, Parts& parts) const {
    float squares = 0.0f;
    for (int i = 0; i < own; ++i) {
      const Values<8> v =
          unpack(load_shared(x + place_of(threadIdx.x + i * blockDim.x)), kBFloat16);
#pragma unroll
      for (int j = 0; j < 8; ++j) squares += (v.v[j] - mean) * (v.v[j] - mean);
    }
    squares = warp_sum(squares);
    __syncthreads();  // all have read the sums
    const int lane = threadIdx.x % 32;
    if (lane < Parts::kOfWarp)
      parts.squares[Parts::kOfWarp * (threadIdx.x / 32) + lane] = lane == 0 ? squares : 0.0f;
    __syncthreads();
    squares = warp_sum(sum_of_lane(parts.squares));
    __syncthreads();  // before parts of another row come there
    return squares * inverse_k;
  }

  __device__ __forceinline__ Pairs<8> read(uint32_t row, int i) const {
    Pairs<8> x{};
    if constexpr (kOrdered) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        x.word[j] = permute_bytes<0x5410>(load_shared_half(row + places[8 * i + j]),
                                          load_shared_half(row + places[8 * i + j + 4]));
      }
    } else {
      const uint32_t piece = kPieces * threadIdx.x + i;
      if (8 * piece < k) x = paired(load_shared(row + place_of(piece)).word);
    }
    return x;
  }
  // From one lane, which tells the compiler that a uniform register can have it.
  static __device__ __forceinline__ uint32_t the_same(uint32_t x) {
    return __shfl_sync(kWarp, x, 0);
  }
  // The values as they are in shared memory: gathered, each in a word; else two.
  struct Raw {
    uint32_t word[kOrdered ? kGroup : kGroup / 2];
  };
  __device__ __forceinline__ Raw read_raw(uint32_t row) const {
    Raw x{};
    row = the_same(row);
    if constexpr (kOrdered) {
#pragma unroll
      for (int i = 0; i < kGroup; ++i) x.word[i] = load_shared_half(row + places[i]);
    } else {
#pragma unroll
      for (int i = 0; i < kPieces; ++i) {
        const uint32_t piece = kPieces * threadIdx.x + i;
        const Narrow<8> eight = load_shared_if(8 * piece < k, row + place_of(piece));
#pragma unroll
        for (int j = 0; j < 4; ++j) x.word[4 * i + j] = eight.word[j];
      }
    }
    return x;
  }
  static __device__ __forceinline__ Values<8> values(const Raw& x, int i) {
    Values<8> v;
    if constexpr (kOrdered) {
#pragma unroll
      for (int j = 0; j < 8; ++j) v.v[j] = widen(x.word[8 * i + j], kBFloat16);
    } else {
      Narrow<8> eight;
#pragma unroll
      for (int j = 0; j < 4; ++j) eight.word[j] = x.word[4 * i + j];
      v = unpack(eight, kBFloat16);
    }
    return v;
  }
  // The whole block, `f(i)` eight channels at a time.
  template <typename Function>
  static __device__ __forceinline__ Block block_of(Function f) {
    Block y;
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const Pairs<8> part = f(i);
#pragma unroll
      for (int j = 0; j < 4; ++j) y.word[4 * i + j] = part.word[j];
    }
    return y;
  }

  __device__ __forceinline__ Block pointwise(uint32_t row) const {
    static_assert(kNorm || kOrdered);  // without an order, the direct kernel is faster
    row = the_same(row);
    if (task.function == Pointwise::kCast)
      return block_of([&](int i) {
        const Pairs<8> x = read(row, i);
        return kTwo ? product(x, read(row + row_bytes, i), kBFloat16) : x;
      });
    if (kTwo && task.function == Pointwise::kAdd)
      return block_of([&](int i) {
        Pairs<8> x = read(row, i);
        const Pairs<8> y = read(row + row_bytes, i);
#pragma unroll
        for (int j = 0; j < 4; ++j) x.word[j] = sum_of_pairs(x.word[j], y.word[j], kBFloat16);
        return x;
      });
    return block_of([&](int i) {
      Values<8> v;
#pragma unroll
      for (int j = 0; j < 8; ++j)
        v.v[j] = widen(load_shared_half(row + places[8 * i + j]), kBFloat16);
      activate<kBFloat16>(task.function, v);
      const Pairs<8> y = pack_pairs(v, kBFloat16);
      return kTwo ? product(y, read(row + row_bytes, i), kBFloat16) : y;
    });
  }
  __device__ __forceinline__ Block normalised(const Raw& x, const Statistics& of_row) const {
    if constexpr (kFunction == RowFunction::kRmsNorm) {
      const auto scaled = [&](int i) {
        Values<8> v = values(x, i);
#pragma unroll
        for (int j = 0; j < 8; ++j) v.v[j] *= of_row.factor;
        return v;
      };
      if (task.form == RmsForm::kWeightAfterCast)
        return block_of([&](int i) {
          return product(pack_pairs(scaled(i), kBFloat16), parameter(0, i), kBFloat16);
        });
      const float more = task.form == RmsForm::kOnePlusWeight ? 1.0f : -0.0f;
      return block_of([&](int i) {
        Values<8> v = scaled(i);
        const Values<8> w = unpack(parameter(0, i), kBFloat16);
#pragma unroll
        for (int j = 0; j < 8; ++j) v.v[j] *= w.v[j] + more;
        return pack_pairs(v, kBFloat16);
      });
    } else {
      const auto block = [&](auto normalise) {
        return block_of([&](int i) {
          Values<8> v = values(x, i);
          const Values<8> w = unpack(parameter(0, i), kBFloat16);
          const Values<8> b = unpack(parameter(1, i), kBFloat16);
#pragma unroll
          for (int j = 0; j < 8; ++j) v.v[j] = fmaf(normalise(v.v[j]), w.v[j], b.v[j]);
          return pack_pairs(v, kBFloat16);
        });
      };
      if (of_row.from == 0.0f)  // as in most rows
        return block([&](float v) { return fmaf(v, of_row.factor, of_row.plus); });
      return block([&](float v) { return fmaf(v - of_row.from, of_row.factor, of_row.plus); });
    }
  }

  __device__ __forceinline__ void compute() {
    const auto place_ends = [&] {
      for (uint32_t i = threadIdx.x; kOrdered && i < stages * kOperands; i += blockDim.x)
        asm volatile("st.shared.b32 [%0], %1;" ::"r"(ring + i * row_bytes), "r"(0x7FFF0000)
                     : "memory");  // kStreamedZero, and at kStreamedNan one of any type
    };
    if constexpr (kParameters > 0) place_ends();
    __shared__ Parts parts[2];
    const auto after = [&](int64_t row, int i) { return row + i * int64_t{gridDim.x}; };
    int64_t row = blockIdx.x;
    if (threadIdx.x == 0) {
      for (int i = 0; i < stages; ++i) {
        make_barrier(full(i), 1);
        make_barrier(empty(i), kArrivalsOfWarp * blockDim.x / 32);
      }
      for (int i = 0; i < 2; ++i) make_barrier(summed(i), kArrivalsOfWarp * blockDim.x / 32);
      show_barriers();
    }
    let_the_next_kernel_start();
    for (int i = 0; i < kFetchedRows && after(row, i) < rows.count; ++i) {
      fetch_row<kTypes>(task.x, after(row, i), rows.k);
      if constexpr (kTwo) fetch_row<kTypes>(task.second, after(row, i), rows.k);
    }
    wait_for_the_kernel_before();
    // What is waited for first, first.
    const Channels order = read_order();
    Vector weight{}, bias{};
    if constexpr (kParameters > 0) weight = read_vector(task.weight);
    if constexpr (kParameters > 1) bias = read_vector(task.bias);
    if (first_rows > 0) copy(row, 0);
    place_channels(order);
    for (int i = 1; i < first_rows; ++i) copy(after(row, i), i);
    if constexpr (kStagedParameters > 0) stage_vector(0, weight);
    if constexpr (kStagedParameters > 1) stage_vector(1, bias);
    before_bulk_copies();
    __syncthreads();
    if constexpr (kParameters == 0) {  // the order was there
      place_ends();
      __syncthreads();
    }
    if constexpr (kParameters > 0) {
      constexpr uint32_t kOne = kBFloat16 ? 0x3F803F80 : 0x3C003C00, kMinusZero = 0x80008000;
      const bool added = kFunction == RowFunction::kRmsNorm && task.form == RmsForm::kOnePlusWeight;
      place_vector(0, weight, task.weight.data != nullptr, added ? kMinusZero : kOne);
      if constexpr (kParameters > 1) place_vector(1, bias, task.bias.data != nullptr, kMinusZero);
    }
    if constexpr (kStagedParameters > 0) __syncthreads();
    for (int i = first_rows; i < stages; ++i) copy(after(row, i), i);

    if constexpr (kNorm) {
      wait(full(0), 0);
      statistics_of_warp(row, stage(0), parts[0]);
      arrive_as_warp(summed(0));
    }
    // Phases of this stage's and the next one's barriers, and of the statistics'.
    uint32_t phase = 0, phase_of_sums = 0;
    int now = 0, turn = 0;
    while (true) {
      const int64_t next = after(row, 1);
      const bool last = next >= rows.count;
      const int then = now + 1 == stages ? 0 : now + 1;
      Block y;
      const uint32_t x = stage(now);
      if constexpr (kNorm) {
        wait(summed(turn), phase_of_sums);
        const PartsOfLane of_lane = read_parts(parts[turn]);
        if (!last) {
          wait(full(then), phase ^ (then == 0));
          statistics_of_warp(next, stage(then), parts[turn ^ 1]);
          arrive_as_warp(summed(turn ^ 1));
        }
        const Statistics of_row = statistics(x, of_lane, parts[turn]);
        y = normalised(read_raw(x), of_row);
      } else {
        wait(full(now), phase);
        y = pointwise(x);
      }
      arrive_as_warp(empty(now));
      if (padded != 0) {
#pragma unroll
        for (int i = 0; i < kGroup / 2; ++i) {
          const int channel = i / 4 * 8 + i % 4;
          if (padded >> channel & 1) y.word[i] &= 0xFFFF0000;
          if (padded >> (channel + 4) & 1) y.word[i] &= 0xFFFF;
        }
      }
      quantize_group<kBFloat16>(OutputRow(out, row), threadIdx.x, y);
      if (last) break;
      const int64_t later = after(row, stages);
      if (threadIdx.x == 0 && later < rows.count) {
        wait(empty(now), phase);
        copy(later, now);
      }
      row = next;
      now = then;
      phase ^= now == 0;
      phase_of_sums ^= turn;
      turn ^= 1;
    }
  }
};

template <RowFunction kFunction, Types kTypes, bool kOrdered, bool kTwo>
__global__ void __launch_bounds__(kStreamedThreads, 1)
    streamed_rows_kernel(const __grid_constant__ Rows rows) {
#if __CUDA_ARCH__ >= 900  // bulk copies
  extern __shared__ uint4 shared[];
  Stream<kFunction, kTypes, kOrdered, kTwo>(rows, shared).compute();
#endif
}

}  // namespace micromix::cuda
