// The row kernel for many short regular rows of a 16-bit type: thread blocks that stay, and take
// two rows at a time.
//
// A thread has eight channels of both rows. A norm's sums, a row function's values and their
// rounding happen in registers, the channels in their order. For an order the results go to shared
// memory side by side, the two values of a channel in a word, and come back from there by one
// gather for both rows. Then they are quantised together, one row in either half of a word, while
// the next two rows are on their way.
//
// Half of what this kernel takes is instructions: what stays the same from turn to turn (addresses
// in shared memory, parameters, limits) stays in registers. The other half is the start, where
// every thread block waits for its first rows, and the last turns of the warps that have the most
// to do.
#pragma once

#include "bulk_copies.cuh"
#include "quantize_pair.cuh"
#include "row_functions.cuh"

namespace micromix::cuda {

template <RowFunction kFunction, Types kTypes, bool kOrdered, bool kTwo>
struct PairedRows {
  static constexpr bool kNorm = kFunction != RowFunction::kPointwise;
  static constexpr bool kLayerNorm = kFunction == RowFunction::kLayerNorm;
  static constexpr bool kBFloat16 = kTypes == Types::kBFloat16;
  static constexpr int kRows = 2, kGroup = kPairedGroup, kWords = kGroup / 2,
                       kWarps = kPairedThreads / 32;
  static constexpr uint32_t kNoChannel = 0xFFFFFFFF;
  static_assert(is_narrow(kTypes) && kWarps == 16);
  using Words = uint32_t[kRows][kWords];
  // Where the compiler has registers for it: what stays the same from turn to turn stays in them.
  static constexpr bool kKeeps = keeps(kArchitecture, kTypes);
  static constexpr bool kKeepsVectors = kKeeps && !kTwo;
  static constexpr bool kWideVectors = has_wide_vectors(kArchitecture, kFunction, kTypes, kTwo);
  // How the next rows come: two operands by bulk copies to shared memory, a turn or two ahead; one
  // to registers, while this turn's are there, or for an order, which needs them, as soon as it
  // may.
  static constexpr bool kStreams = kTwo && paired_streams(kArchitecture);
  static constexpr bool kAhead = kKeeps && !kOrdered && !kTwo;

  // The warps' sums: of each row its values, for a LayerNorm, and their squares. Without an order
  // there are two, of this turn and of the next, which some warps may have begun: their addresses
  // differ in one bit.
  static constexpr int kSums = kLayerNorm ? 2 : 1;
  static constexpr uint32_t kPartsOfTurn = sizeof(float) * kRows * kSums * kWarps;
  struct alignas(2 * kPartsOfTurn) Shared {
    float parts[kOrdered ? 1 : 2][kRows * kSums][kWarps];
    float distant[kRows][kWarps];
    uint64_t full[kPairedStages];  // barriers
  };

  const Rows& rows;
  const RowTask& task;
  Shared& shared;
  const int count;
  const uint32_t lane, warp;
  const int rows_of_x;   // that have channels at this thread's place
  uint32_t part, parts;  // where this lane stores a sum, and from where it reads two
  // In shared memory: this thread's eight channels of the first row of the stages, its weight, its
  // first four results, and what lies before all results.
  uint32_t stages, vectors, own_results, results;
  // Of the channels that it wants: addresses, or where registers are few two distances in a word.
  static constexpr int kInWord = kKeeps ? 1 : 2;
  uint32_t places[kOrdered ? kGroup / kInWord : 1];

  __device__ PairedRows(const Rows& rows, void* areas, Shared& shared)
      : rows(rows),
        task(rows.task),
        shared(shared),
        count(rows.count),
        lane(threadIdx.x % 32),
        warp(threadIdx.x / 32),
        rows_of_x(kept_in_register<kKeeps>(
            kGroup * static_cast<int>(threadIdx.x) < rows.k ? rows.count : 0)) {
    if constexpr (kNorm) {
      // As `add_statistics` leaves them in the lanes.
      const bool squares = lane % 4 == lane / 8;
      part = address(&shared.parts[0][kSums * (lane % 2) + (squares ? kSums - 1 : 0)][warp]);
      parts = address(&shared.parts[0][0][0]) + 8 * (lane % (8 * kRows * kSums));
    }
    const uint32_t own = address(areas) + 2 * kGroup * threadIdx.x;
    stages = own;
    constexpr int kOfStages = kStreams ? 2 * kPairedStages : 0;
    constexpr int kOfVectors = kNorm + kWideVectors;
    if constexpr (kNorm) vectors = kept_in_register<kKeepsVectors>(own + kOfStages * area());
    results = address(areas) + (kOfStages + kOfVectors) * area();
    own_results = results + kPairedEnd + paired_place(kGroup * threadIdx.x);
  }
  static __device__ __forceinline__ uint32_t area() { return kPairedArea * blockDim.x; }
  static __device__ __forceinline__ uint32_t address(const void* x) {  // in shared memory
    return kept_in_register<kKeeps>(static_cast<uint32_t>(__cvta_generic_to_shared(x)));
  }

  // This thread's channels of two rows of an operand.
  struct Channels {
    const RowInput& from;
    const Strides& strides;
    const char* at;  // of the first row

    __device__ __forceinline__ Channels(const RowInput& from, const Strides& strides, int row)
        : from(from), strides(strides) {
      find(row);
    }
    __device__ __forceinline__ void find(int row) {
      at = static_cast<const char*>(from.data) + strides.before(row) + 2 * kGroup * threadIdx.x;
    }
    __device__ __forceinline__ void go_on() { at += strides.turn; }
  };
  // Two rows, `row` and the next, of the turn after the one that was loaded last. Leaves x as it is
  // where there is nothing.
  __device__ __forceinline__ void load(Channels& channels, int row, Words& x) const {
    if constexpr (!kKeeps) channels.find(row);  // again
    load_words_if(row < rows_of_x, channels.at, x[0]);
    load_words_if(row + 1 < rows_of_x, channels.at + channels.strides.row, x[1]);
    if constexpr (kKeeps) channels.go_on();
  }
  // The same of a stage.
  __device__ __forceinline__ uint32_t place_of_row(int stage, int operand, int row) const {
    return stages + (2 * stage + operand) * area() + row * (area() / 2);
  }
  __device__ __forceinline__ void load(int stage, int operand, Words& x) const {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const Narrow<kGroup> row = load_shared(place_of_row(stage, operand, i));
#pragma unroll
      for (int j = 0; j < kWords; ++j) x[i][j] = row.word[j];
    }
  }
  __device__ __forceinline__ uint32_t full(int stage) const {
    return static_cast<uint32_t>(__cvta_generic_to_shared(&shared.full[stage]));
  }
  // One thread's: two rows of both operands to a stage.
  __device__ __forceinline__ void copy(int row, int stage) const {
    if (threadIdx.x != 0 || row >= count) return;
    const uint32_t bytes = 2 * rows.k, barrier = full(stage);
    expect(barrier, min(kRows, count - row) * 2 * bytes);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if (row + i >= count) break;
      const auto copy_row = [&](const RowInput& from, int operand) {
        copy_bulk(place_of_row(stage, operand, i),
                  static_cast<const uint16_t*>(from.data) + (row + i) * from.stride, bytes,
                  barrier);
      };
      copy_row(task.x, 0);
      copy_row(task.second, 1);
    }
  }
  // Asks for the first two rows in the second-level cache: see fetch_row.
  __device__ __forceinline__ void fetch(const RowInput& from, int row) const {
    if (kLine * static_cast<int>(threadIdx.x) >= 2 * rows.k) return;
    const char* const line = static_cast<const char*>(from.data) + kLine * threadIdx.x;
#pragma unroll
    for (int i = 0; i < kRows; ++i)
      if (row + i < count) fetch_line(line + (row + i) * 2 * from.stride);
  }
  // Without one, what changes nothing.
  __device__ __forceinline__ void load_vector(const RowInput& from, uint32_t otherwise,
                                              uint32_t (&x)[kWords]) const {
#pragma unroll
    for (int j = 0; j < kWords; ++j) x[j] = otherwise;
    load_words_if(rows_of_x > 0 && from.data != nullptr,
                  static_cast<const uint16_t*>(from.data) + kGroup * threadIdx.x, x);
  }

  // A zero where there is no channel, and a NaN for one that is not there.
  using Order = uint32_t[kGroup];
  __device__ __forceinline__ void read_order(Order& channels) const {
    const Output& out = rows.output;
    // Threads without a block gather what others do.
    const int last = kGroup * (4 * out.blocks - 1);
    const int32_t* const order = out.order + min(kGroup * static_cast<int>(threadIdx.x), last);
    load_words_now(order, reinterpret_cast<uint32_t (&)[4]>(channels));
    load_words_now(order + 4, reinterpret_cast<uint32_t (&)[4]>(channels[4]));
  }
  __device__ __forceinline__ void find_places(const Order& channels) {
    uint32_t most = 0, place[kGroup];
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      most = max(most, channels[i]);
      place[i] = kPairedEnd + paired_place(channels[i]);
    }
    const auto k = static_cast<uint32_t>(rows.k);
    if (most >= k) [[unlikely]] {
#pragma unroll
      for (int i = 0; i < kGroup; ++i)
        if (channels[i] >= k) place[i] = channels[i] == kNoChannel ? kPairedZero : kPairedNan;
    }
#pragma unroll
    for (int i = 0; i < kGroup; i += kInWord)
      places[i / kInWord] = kKeeps ? results + place[i] : place[i] | place[i + kInWord - 1] << 16;
  }
  __device__ __forceinline__ uint32_t place(int i) const {
    if constexpr (kKeeps) return places[i];
    uint32_t distance;  // volatile, or it would leave the loop
    asm volatile("bfe.u32 %0, %1, %2, 16;"
                 : "=r"(distance)
                 : "r"(places[i / kInWord]), "r"(16 * (i % kInWord)));
    return results + distance;
  }

  // The warp's sums of the squares of both rows, and of their values, to the warps' parts.
  __device__ __forceinline__ void add_statistics(const Words& x, const Roles& roles) const {
    Products of_row[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i)
      of_row[i] = products_of_lanes<kLayerNorm>(x[i], roles(Roles::kUpper), kBFloat16);
    // Squares are in every fourth lane, another one in each eight of them; the lane beside it may
    // as well have the values. So the same three exchanges add up both, and of the rows one in the
    // even and the other in the odd lanes.
    const bool odd = roles(Roles::kOdd), squares = roles(Roles::kSquares);
    const auto part_of = [&](const Products& p) {
      return kLayerNorm && !squares ? p.sum : p.squares;
    };
    const float first = part_of(of_row[0]), second = part_of(of_row[1]);
    float sum = (odd ? second : first) + __shfl_xor_sync(kWarp, odd ? first : second, 9);
    sum += __shfl_xor_sync(kWarp, sum, 18);
    sum += __shfl_xor_sync(kWarp, sum, 4);
    if (kLayerNorm ? roles(Roles::kSquares | Roles::kValues) : squares)
      asm volatile("st.shared.f32 [%0], %1;" ::"r"(part), "f"(sum) : "memory");
  }
  // All warps' of the row and the sum that are this lane's: eight neighbouring lanes have the same.
  __device__ __forceinline__ float sum_of_warps() const {
    float two[2];
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(two[0]), "=f"(two[1]) : "r"(parts));
    float sum = two[0] + two[1];
#pragma unroll
    for (int lanes = 4; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(kWarp, sum, lanes);
    return sum;
  }
  // Every thread of the thread block, or none, comes here: the mean squares of the distances from
  // the means, of row lane / 16.
  __device__ __forceinline__ float distant(const Words& x, float mean, float inverse_k) const {
    float squares[kRows] = {};
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const float of_row = __shfl_sync(kWarp, mean, 16 * i);
#pragma unroll
      for (int j = 0; j < kWords; ++j) {
        const float2 v = widen_pair(x[i][j], kBFloat16);
        const float low = v.x - of_row, high = v.y - of_row;
        if (rows_of_x > 0) squares[i] += low * low + high * high;
      }
      squares[i] = warp_sum(squares[i]);
      if (lane == 0) shared.distant[i][warp] = squares[i];
    }
    __syncthreads();
    float sum = shared.distant[lane / 16][lane % 16];
#pragma unroll
    for (int lanes = 8; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(kWarp, sum, lanes);
    __syncthreads();
    return sum * inverse_k;
  }

  struct Vectors {
    Narrow<kGroup> weight, bias;
  };
  __device__ __forceinline__ Vectors read_vectors() const {
    constexpr uint32_t kOnes = kBFloat16 ? 0x3F803F80 : 0x3C003C00, kMinusZeros = 0x80008000;
    const bool added = kFunction == RowFunction::kRmsNorm && task.form == RmsForm::kOnePlusWeight;
    Vectors of_thread{};
    load_vector(task.weight, added ? kMinusZeros : kOnes, of_thread.weight.word);
    if constexpr (kLayerNorm) load_vector(task.bias, kMinusZeros, of_thread.bias.word);
    return of_thread;
  }
  // They wait in shared memory, 16 bytes of all threads side by side: weight and bias, or in
  // float32 those of the first four channels, and then of the others.
  __device__ __forceinline__ uint32_t place_of_vector(int i) const {
    return vectors + i * (area() / 2);
  }
  __device__ __forceinline__ void keep_vectors(const Vectors& of_thread) const {
    const auto keep = [&](const Narrow<kGroup>& x, int bias) {
      if constexpr (!kWideVectors) return store_shared(place_of_vector(bias), x.word);
      const Values<kGroup> wide = unpack(x, kBFloat16);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t words[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) words[j] = __float_as_uint(wide.v[4 * half + j]);
        store_shared(place_of_vector(2 * half + bias), words);
      }
    };
    keep(of_thread.weight, 0);
    if constexpr (kLayerNorm) keep(of_thread.bias, 1);
  }
  __device__ __forceinline__ Vectors load_vectors() const {
    Vectors of_thread{};
    of_thread.weight = load_shared(place_of_vector(0));
    if constexpr (kLayerNorm) of_thread.bias = load_shared(place_of_vector(1));
    return of_thread;
  }
  // x becomes what `f` makes of a value, the weight and the bias of its channel, and its row.
  template <typename F>
  __device__ __forceinline__ void each(Words& x, const Vectors& vectors, F f) const {
    const auto each_of = [&](int j, float2 w, float2 b) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const float2 v = widen_pair(x[i][j], kBFloat16);
        x[i][j] = narrow_pair(f(v.x, w.x, b.x, i), f(v.y, w.y, b.y, i), kBFloat16);
      }
    };
    if constexpr (kWideVectors) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const Narrow<8> weight = load_shared(place_of_vector(2 * half)),
                        bias = load_shared(place_of_vector(2 * half + 1));
        const auto pair = [](const Narrow<8>& of, int j) {
          return float2{__uint_as_float(of.word[2 * j]), __uint_as_float(of.word[2 * j + 1])};
        };
#pragma unroll
        for (int j = 0; j < 2; ++j) each_of(2 * half + j, pair(weight, j), pair(bias, j));
      }
    } else {
#pragma unroll
      for (int j = 0; j < kWords; ++j)
        each_of(j, widen_pair(vectors.weight.word[j], kBFloat16),
                widen_pair(kLayerNorm ? vectors.bias.word[j] : 0u, kBFloat16));
    }
  }
  // A row's number, for this thread: 0 beyond K, where the zeros are to stay zeros, as padding and
  // as part of the next rows' sums.
  __device__ __forceinline__ float of_row(float x, int lane_of_row) const {
    const float y = __shfl_sync(kWarp, x, lane_of_row);
    return rows_of_x > 0 ? y : 0.0f;
  }
  __device__ __forceinline__ void rms_norm(Words& x, float inverse_k) const {
    const Vectors vectors = load_vectors();
    const float of_lane = inverse_root(sum_of_warps() * inverse_k, task.eps);
    float factor[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) factor[i] = of_row(of_lane, 8 * i);
    if (task.form == RmsForm::kWeightAfterCast) {
      each(x, vectors, [&](float v, float, float, int i) { return v * factor[i]; });
#pragma unroll
      for (int i = 0; i < kRows; ++i)
#pragma unroll
        for (int j = 0; j < kWords; ++j)
          x[i][j] = product_of_pairs(x[i][j], vectors.weight.word[j], kBFloat16);
    } else {
      const float more = task.form == RmsForm::kOnePlusWeight ? 1.0f : -0.0f;
      each(x, vectors, [&](float v, float w, float, int i) { return v * factor[i] * (w + more); });
    }
  }
  __device__ __forceinline__ void layer_norm(Words& x, float inverse_k) const {
    // Eight lanes have the sum of the first row's values, the next eight that of their squares, the
    // others the second row's.
    const float own = sum_of_warps(), other = __shfl_xor_sync(kWarp, own, 8);
    const bool squares = lane & 8;
    const float mean = (squares ? other : own) * inverse_k;
    float variance = (squares ? own : other) * inverse_k - mean * mean;
    const bool near = is_near_zero(mean, variance), all_near = __all_sync(kWarp, near);
    if (!all_near) {
      const float exact = distant(x, mean, inverse_k);
      if (!near) variance = exact;
    }
    const Statistics of_lane = layer_statistics(mean, variance, task.eps);
    float factor[kRows], plus[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      factor[i] = of_row(of_lane.factor, 16 * i);
      plus[i] = of_row(of_lane.plus, 16 * i);
    }
    Vectors vectors{};
    if constexpr (!kWideVectors) vectors = load_vectors();
    if (all_near) {
      each(x, vectors, [&](float v, float w, float b, int i) {
        return fmaf(fmaf(v, factor[i], plus[i]), w, b);
      });
    } else {
      float from[kRows];
#pragma unroll
      for (int i = 0; i < kRows; ++i) from[i] = of_row(of_lane.from, 16 * i);
      each(x, vectors, [&](float v, float w, float b, int i) {
        return fmaf(fmaf(v - from[i], factor[i], plus[i]), w, b);
      });
    }
  }
  __device__ __forceinline__ void compute(Words& x, const Words& second) const {
    const auto each = [&](auto f) {
#pragma unroll
      for (int i = 0; i < kRows; ++i)
#pragma unroll
        for (int j = 0; j < kWords; ++j) x[i][j] = f(x[i][j], second[i][j]);
    };
    if (kTwo && task.function == Pointwise::kAdd)
      return each([](uint32_t a, uint32_t b) { return sum_of_pairs(a, b, kBFloat16); });
    if (task.function != Pointwise::kCast) {
      Values<kRows * kGroup> v;
#pragma unroll
      for (int i = 0; i < kRows * kWords; ++i) {
        const float2 pair = widen_pair(x[i / kWords][i % kWords], kBFloat16);
        v.v[2 * i] = pair.x, v.v[2 * i + 1] = pair.y;
      }
      activate<kBFloat16>(task.function, v);
#pragma unroll
      for (int i = 0; i < kRows * kWords; ++i)
        x[i / kWords][i % kWords] = narrow_pair(v.v[2 * i], v.v[2 * i + 1], kBFloat16);
    }
    if constexpr (kTwo)
      each([](uint32_t a, uint32_t b) { return product_of_pairs(a, b, kBFloat16); });
  }

  __device__ __forceinline__ void prepare_shared() {
    if constexpr (kStreams) {
      if (threadIdx.x == 0) {
#pragma unroll
        for (int i = 0; i < kPairedStages; ++i) make_barrier(full(i), 1);
        show_barriers();
      }
      if (rows_of_x == 0) {
#pragma unroll 1
        for (int i = 0; i < 2 * kPairedStages * kRows; ++i)
          store_shared(stages + i * (area() / 2), {0, 0, 0, 0});
      }
      __syncthreads();
    }
    if (kNorm && blockDim.x < kPairedThreads) {  // the sums of warps that are not there
      constexpr int kSumsOfAll = offsetof(Shared, full) / sizeof(float);
      for (int i = threadIdx.x; i < kSumsOfAll; i += blockDim.x)
        reinterpret_cast<float*>(&shared)[i] = 0.0f;
      __syncthreads();
    }
    if (kOrdered && threadIdx.x == 0) {
      const uint32_t ends[4] = {0, 0, 0x7FFF7FFF, 0x7FFF7FFF};  // a NaN of any type
      store_shared(results, ends);
    }
  }

  __device__ __forceinline__ void compute() {
    let_the_next_kernel_start();
    const int step = kRows * gridDim.x;
    int row = kRows * blockIdx.x;
    fetch(task.x, row);
    if constexpr (kTwo) fetch(task.second, row);
    prepare_shared();
    Words x{}, second{};
    Channels x_from(task.x, rows.x, row), second_from(task.second, rows.second, row);
    PairOutput<kKeeps> to(rows, row);
    wait_for_the_kernel_before();
    if constexpr (kStreams) {
#pragma unroll 1
      for (int i = 0; i < kPairedStages; ++i) copy(row + i * step, i);
    }
    // What comes from the second-level cache first: loads end in their order. The compiler moves
    // none past a __syncwarp.
    Order channels;
    if constexpr (kOrdered) read_order(channels);
    Vectors of_thread;
    if constexpr (kNorm) of_thread = read_vectors();
    __syncwarp();
    if constexpr (!kTwo) load(x_from, row, x);
    __syncwarp();
    if constexpr (kOrdered) find_places(channels);
    if constexpr (kNorm) keep_vectors(of_thread);

    int stage = 0;
    uint32_t phase = 0;
    for (int next; row < count; row = next) {
      next = row + step;
      if constexpr (kStreams) {
        wait(full(stage), phase);
        load(stage, 0, x);
        load(stage, 1, second);
      } else if constexpr (kTwo) {
        load(x_from, row, x);
        load(second_from, row, second);
      }
      Words ahead{};
      if constexpr (kAhead) load(x_from, next, ahead);
      const auto copy_next = [&] {  // all have this turn's rows
        if constexpr (kStreams) {
          copy(row + kPairedStages * step, stage);
          stage ^= 1;
          phase ^= stage == 0;
        }
      };
      if constexpr (kNorm) {
        if constexpr (kTwo) {
#pragma unroll
          for (int i = 0; i < kRows; ++i) {
#pragma unroll
            for (int j = 0; j < kWords; ++j)
              x[i][j] = sum_of_pairs(x[i][j], second[i][j], kBFloat16);
            if (row + i < rows_of_x)
              store_words(static_cast<uint16_t*>(task.sum) + int64_t{row + i} * rows.k +
                              kGroup * threadIdx.x,
                          x[i]);
          }
        }
        add_statistics(x, to.roles);
        __syncthreads();  // and the results of the turn before have been read
        copy_next();
        if constexpr (kLayerNorm) {
          layer_norm(x, rows.inverse_k);
        } else {
          rms_norm(x, rows.inverse_k);
        }
        if constexpr (!kOrdered) part ^= kPartsOfTurn, parts ^= kPartsOfTurn;
      } else {
        compute(x, second);
        if constexpr (kOrdered || kStreams) __syncthreads();  // as above
        copy_next();
      }
      RowPair y;
#pragma unroll
      for (int j = 0; j < kWords; ++j) {
        y[2 * j] = permute_bytes<0x5410>(x[0][j], x[1][j]);
        y[2 * j + 1] = permute_bytes<0x7632>(x[0][j], x[1][j]);
      }
      if constexpr (!kAhead && !kTwo) load(x_from, next, x);
      if constexpr (kOrdered) {
        store_shared(own_results, {y[0], y[1], y[2], y[3]});
        store_shared(own_results + 16, {y[4], y[5], y[6], y[7]});
        __syncthreads();
#pragma unroll
        for (int i = 0; i < kGroup; ++i)
          asm volatile("ld.shared.b32 %0, [%1];" : "=r"(y[i]) : "r"(place(i)) : "memory");
      }
      if constexpr (!kKeeps) to.find(row);  // again
      quantize_pair<kBFloat16>(to, row, count, y);
      if constexpr (kKeeps) to.go_on();
      if constexpr (kAhead) {
#pragma unroll
        for (int i = 0; i < kRows; ++i)
#pragma unroll
          for (int j = 0; j < kWords; ++j) x[i][j] = ahead[i][j];
      }
    }
  }
};

template <RowFunction kFunction, Types kTypes, bool kOrdered, bool kTwo>
__global__ void __launch_bounds__(kPairedThreads, 1024 / kPairedThreads)
    paired_rows_kernel(const __grid_constant__ Rows rows) {
  if constexpr (is_paired(kArchitecture, kFunction, kOrdered, kTwo)) {
    extern __shared__ __align__(128) uint4 areas[];
    using Kernel = PairedRows<kFunction, kTypes, kOrdered, kTwo>;
    __shared__ typename Kernel::Shared shared;
    Kernel(rows, areas, shared).compute();
  }
}

}  // namespace micromix::cuda
