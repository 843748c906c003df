// Attention in float32, included once for each instruction set: rows of queries meet blocks of
// keys, with a running maximum and sum for each row (Milakov and Gimelshein, arXiv 1805.02867).
//
// The rows of a group are its queries of all heads that share its keys, so that keys and values are
// read where they are, once for all of them.
#pragma once

#include <algorithm>
#include <cfloat>
#include <limits>
#include <type_traits>

#include "attention.h"
#include "lanes.h"

namespace micromix::cpu {
namespace {

constexpr int64_t kRows = 24;  // that meet a block together
constexpr int64_t kKeys = 64;  // of a block
constexpr int kTileKeys = 4;   // a tile of scores: its sums stay in registers
constexpr int kTileRows = kLanes == 16 ? 6 : 3;
constexpr int kTileVectors = 4;  // a tile of results: so many vectors of each row
constexpr float kNone = -std::numeric_limits<float>::infinity();
constexpr float kLog2E = 1.44269504088896340736f;

// Not `x + Lanes{}`, which would have to turn -0 into 0.
[[gnu::always_inline]] inline Lanes every(float x) { return x - Lanes{}; }

[[gnu::always_inline]] inline Lanes multiply_add(Lanes a, Lanes b, Lanes c) {
#if defined(__AVX512BW__)
  return (Lanes)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
  return (Lanes)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

// The sums of the lanes of four vectors.
[[gnu::always_inline]] inline void store_totals(const Lanes (&v)[4], float* to) {
#if defined(__AVX2__)
  __m256 half[4];
  for (int i = 0; i < 4; ++i) {
#if defined(__AVX512BW__)
    half[i] = _mm256_add_ps(_mm512_castps512_ps256((__m512)v[i]),
                            _mm512_extractf32x8_ps((__m512)v[i], 1));
#else
    half[i] = (__m256)v[i];
#endif
  }
  const __m256 sums =
      _mm256_hadd_ps(_mm256_hadd_ps(half[0], half[1]), _mm256_hadd_ps(half[2], half[3]));
  _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1)));
#else
  for (int i = 0; i < 4; ++i) {
    to[i] = 0;
    for (int j = 0; j < kLanes; ++j) to[i] += v[i][j];
  }
#endif
}

// 2^x for x at most 0, to a unit in the last place; 0 below 2^-126. NaN stays NaN.
[[gnu::always_inline]] inline Lanes exp2(Lanes x) {
  // Its unit in the last place is 1, and its low bits are the bias of an exponent.
  constexpr float kMagic = 0x1.8p23f + 127;
  const Lanes shifted = x + kMagic;
  const Lanes f = x - (shifted - kMagic);
  // Fitted on |f| <= 1/2 (Chebyshev nodes).
  Lanes p = multiply_add(every(1.538387243e-4f), f, every(1.340883177e-3f));
  p = multiply_add(p, f, every(9.618375190e-3f));
  p = multiply_add(p, f, every(5.550301306e-2f));
  p = multiply_add(p, f, every(2.402264783e-1f));
  p = multiply_add(p, f, every(6.931472225e-1f));
  p = multiply_add(p, f, every(1.0f));
  // A product: the sum of an exponent and the bits of a NaN could be any number.
  const Lanes power = p * (Lanes)((Words)shifted << 23);
  return x < -126.0f ? Lanes{} : power;
}

// Calls f with a row and how many rows follow it to the end of its tile, a constant.
template <typename F>
[[gnu::always_inline]] inline void for_row_tiles(int64_t count, F f) {
  int64_t row = 0;
  for (; row + kTileRows <= count; row += kTileRows)
    f(row, std::integral_constant<int, kTileRows>{});
  switch (count - row) {
#define TILE(N)                                                            \
  case N:                                                                  \
    if constexpr (N < kTileRows) f(row, std::integral_constant<int, N>{}); \
    break
    TILE(1);
    TILE(2);
    TILE(3);
    TILE(4);
    TILE(5);
#undef TILE
  }
}

struct Scratch {
  int64_t query_row, sum_row;  // floats of a row, padded with zeros to whole vectors

  explicit Scratch(const AttentionTask& task)
      : query_row(padded(task.head_size)), sum_row(padded(task.value_size)) {}
  static int64_t padded(int64_t size) { return (size + kLanes - 1) / kLanes * kLanes; }
  int64_t scores_at() const { return kRows * query_row; }
  int64_t added_at() const { return scores_at() + kRows * kKeys; }
  int64_t sums_at() const { return added_at() + kRows * kKeys; }
  int64_t bytes() const { return (sums_at() + kRows * sum_row) * int64_t{sizeof(float)}; }
};

int64_t row_blocks(const AttentionTask& task) { return (task.rows_of_group() + kRows - 1) / kRows; }

// The rows of a group that meet its keys together. `T`: float, or bfloat16's bits.
template <typename T>
class RowBlock {
  static constexpr Dtype kDtype = sizeof(T) == 4 ? Dtype::kFloat32 : Dtype::kBFloat16;

 public:
  RowBlock(const AttentionTask& task, int64_t item, float* scratch) : task_(task), shape_(task) {
    const int64_t blocks = row_blocks(task), group = item / blocks;
    first_ = item % blocks * kRows;
    count_ = std::min(task.rows_of_group() - first_, kRows);
    b_ = group / task.groups;
    g_ = group % task.groups;
    queries_ = scratch;
    scores_ = scratch + shape_.scores_at();
    added_ = scratch + shape_.added_at();
    sums_ = scratch + shape_.sums_at();
  }

  void run() {
    begin();
    const int64_t limit = limit_[count_ - 1];
    for (int64_t k0 = 0; k0 < limit; k0 += kKeys) {
      const int64_t keys = look(k0, std::min(limit - k0, kKeys));
      if (keys == 0) continue;
      multiply_keys(k0, keys);
      for (int64_t row = 0; row < count_; ++row) weigh(row, keys);
      multiply_values(k0, keys);
    }
    end();
  }

 private:
  int64_t query_of(int64_t row) const { return (first_ + row) / task_.heads_of_group(); }
  int64_t head_of(int64_t row) const {
    return g_ * task_.heads_of_group() + (first_ + row) % task_.heads_of_group();
  }

  // Calls f with a channel and how many there are from it to the end of its vector: a constant but
  // for the last one's.
  template <typename F>
  [[gnu::always_inline]] static void for_each_vector(int64_t size, F f) {
    int64_t c = 0;
    for (; c + kLanes <= size; c += kLanes) f(c, kLanes);
    if (c < size) f(c, static_cast<int>(size - c));
  }

  // The scale of the scores, and of their logarithm to base 2, is one of the queries.
  void begin() {
    const Lanes factor = every(task_.scale * kLog2E);
    for (int64_t row = 0; row < count_; ++row) {
      const int64_t h = head_of(row), q = query_of(row);
      const T* const query = task_.query.template at<T>(b_, h, q);
      for_each_vector(task_.head_size, [&](int64_t c, int lanes) __attribute__((always_inline)) {
        set(queries_ + row * shape_.query_row + c, load(query, kDtype, c, lanes) * factor);
      });
      limit_[row] = task_.causal ? std::min(task_.keys, q + 1) : task_.keys;
      mask_[row] = b_ * task_.mask_batch + h * task_.mask_head + q * task_.mask_row;
      most_[row] = kNone;
      total_[row] = Lanes{};
      std::fill_n(sums_ + row * shape_.sum_row, shape_.sum_row, 0.f);
    }
  }

  // What is added to the scores of a block of keys, [k0, k0 + keys), for each row: `added_of_`,
  // null where the block is whole and that is nothing. Returns how many of the keys there are up to
  // the last that any row sees.
  int64_t look(int64_t k0, int64_t keys) {
    int64_t some = 0;
    for (int64_t row = 0; row < count_; ++row) {
      if (row > 0 && mask_[row] == mask_[row - 1] && limit_[row] == limit_[row - 1]) {
        added_of_[row] = added_of_[row - 1];
        continue;
      }
      const int64_t own = std::clamp(limit_[row] - k0, int64_t{0}, keys);
      float* const added = added_ + row * kKeys;
      add_mask(mask_[row] + k0, own, added);
      std::fill(added + own, added + kKeys, kNone);
      Words seen{}, changed{};
      for (int64_t k = 0; k < kKeys; k += kLanes) {
        const Lanes v = get(added + k);
        seen |= (Words)(v != kNone);
        changed |= (Words)(v != 0.0f);
      }
      added_of_[row] = any(changed) ? added : nullptr;
      for (int64_t k = any(seen) ? own : 0; k > some; --k) {
        if (added[k - 1] != kNone) some = k;
      }
    }
    return some;
  }

  // What a mask adds to the scores of `count` keys, from this place of it on.
  void add_mask(int64_t at, int64_t count, float* added) const {
    switch (task_.mask_type) {
      case MaskType::kNone:
        std::fill_n(added, count, 0.f);
        break;
      case MaskType::kBool: {
        const auto* const seen = static_cast<const uint8_t*>(task_.mask) + at;
        for (int64_t k = 0; k < count; ++k) added[k] = seen[k] ? 0 : kNone;
        break;
      }
      case MaskType::kBFloat16:
      case MaskType::kFloat32: {
        const bool wide = task_.mask_type == MaskType::kFloat32;
        for (int64_t k = 0; k < count; ++k) {
          const float x = load_float(task_.mask, wide ? Dtype::kFloat32 : Dtype::kBFloat16, at + k);
          // The least of all floats, which masks use for -inf, must not become that.
          added[k] = x == kNone ? kNone : std::max(x * kLog2E, -FLT_MAX);
        }
      }
    }
  }

  static bool any(Words v) {
    uint32_t found = 0;
    for (int i = 0; i < kLanes; ++i) found |= v[i];
    return found != 0;
  }
  [[gnu::always_inline]] static Lanes get(const float* from) { return load_floats(from, kLanes); }
  [[gnu::always_inline]] static void set(float* to, Lanes v) { std::memcpy(to, &v, sizeof v); }

  void multiply_keys(int64_t k0, int64_t keys) {
    for (int64_t k = 0; k < keys; k += kTileKeys) {
      const T* key[kTileKeys];  // the last one stands in for those beyond it
      for (int j = 0; j < kTileKeys; ++j) {
        key[j] = task_.key.template at<T>(b_, g_, k0 + std::min(k + j, keys - 1));
      }
      for_row_tiles(count_, [&](int64_t row, auto rows) __attribute__((always_inline)) {
        multiply_tile<rows()>(key, queries_ + row * shape_.query_row, scores_ + row * kKeys + k);
      });
    }
  }

  template <int kCount>
  [[gnu::always_inline]] void multiply_tile(const T* const (&key)[kTileKeys], const float* queries,
                                            float* scores) const {
    Lanes sums[kCount][kTileKeys] = {};
    for_each_vector(task_.head_size, [&](int64_t c, int lanes) __attribute__((always_inline)) {
      Lanes query[kCount];
#pragma GCC unroll 8
      for (int r = 0; r < kCount; ++r) query[r] = get(queries + r * shape_.query_row + c);
#pragma GCC unroll 8
      for (int j = 0; j < kTileKeys; ++j) {
        const Lanes v = load(key[j], kDtype, c, lanes);
#pragma GCC unroll 8
        for (int r = 0; r < kCount; ++r) sums[r][j] = multiply_add(query[r], v, sums[r][j]);
      }
    });
#pragma GCC unroll 8
    for (int r = 0; r < kCount; ++r) store_totals(sums[r], scores + r * kKeys);
  }

  // A row's scores become weights, 2^(score - the row's maximum); its sums so far are brought to a
  // new maximum.
  void weigh(int64_t row, int64_t keys) {
    float* const scores = scores_ + row * kKeys;
    const float* const added = added_of_[row];
    const int64_t end = (keys + kLanes - 1) / kLanes * kLanes;
    Lanes most = every(most_[row]);
    for (int64_t k = 0; k < end; k += kLanes) {
      Lanes x = get(scores + k);
      if (added) {
        const Lanes more = get(added + k);
        x = more == kNone ? more : x + more;  // hides NaN, too
        set(scores + k, x);
      }
      most = x > most ? x : most;  // passes over NaN, which the weights keep
    }
    float now = most[0];
    for (int i = 1; i < kLanes; ++i) now = std::max(now, most[i]);
    const float over = now == kNone ? 0 : now;
    if (now != most_[row]) {
      const Lanes factor = exp2(every(most_[row] - over));
      total_[row] *= factor;
      float* const sums = sums_ + row * shape_.sum_row;
      for (int64_t c = 0; c < shape_.sum_row; c += kLanes) set(sums + c, get(sums + c) * factor);
      most_[row] = now;
    }
    Lanes total = total_[row];
    for (int64_t k = 0; k < end; k += kLanes) {
      const Lanes weight = exp2(get(scores + k) - over);
      total += weight;
      set(scores + k, weight);
    }
    total_[row] = total;
  }

  // Adds a block's weighted values to the sums.
  void multiply_values(int64_t k0, int64_t keys) {
    const T* const values = task_.value.template at<T>(b_, g_, k0);
    constexpr int64_t kWide = kTileVectors * kLanes;
    int64_t c = 0;
    for (; c + kWide <= task_.value_size; c += kWide)
      add_values<kTileVectors>(values, keys, c, kLanes);
    for (; c + kLanes <= task_.value_size; c += kLanes) add_values<1>(values, keys, c, kLanes);
    if (c < task_.value_size)
      add_values<1>(values, keys, c, static_cast<int>(task_.value_size - c));
  }

  template <int kVectors>
  [[gnu::always_inline]] void add_values(const T* values, int64_t keys, int64_t c, int lanes) {
    for_row_tiles(count_, [&](int64_t row, auto rows) __attribute__((always_inline)) {
      constexpr int kCount = rows();
      const float* const weights = scores_ + row * kKeys;
      float* const to = sums_ + row * shape_.sum_row + c;
      Lanes sums[kCount][kVectors];
#pragma GCC unroll 8
      for (int r = 0; r < kCount; ++r) {
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) sums[r][v] = get(to + r * shape_.sum_row + v * kLanes);
      }
      const T* value = values;
      for (int64_t k = 0; k < keys; ++k, value += task_.value.row) {
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) {
          const Lanes x = load(value, kDtype, c + v * kLanes, lanes);
#pragma GCC unroll 8
          for (int r = 0; r < kCount; ++r) {
            sums[r][v] = multiply_add(every(weights[r * kKeys + k]), x, sums[r][v]);
          }
        }
      }
#pragma GCC unroll 8
      for (int r = 0; r < kCount; ++r) {
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) set(to + r * shape_.sum_row + v * kLanes, sums[r][v]);
      }
    });
  }

  void end() const {
    for (int64_t row = 0; row < count_; ++row) {
      T* const out =
          static_cast<T*>(task_.out) +
          ((b_ * task_.queries + query_of(row)) * task_.heads + head_of(row)) * task_.value_size;
      float total = 0;
      for (int i = 0; i < kLanes; ++i) total += total_[row][i];
      const float* const sums = sums_ + row * shape_.sum_row;
      for_each_vector(task_.value_size, [&](int64_t c, int lanes) __attribute__((always_inline)) {
        const Lanes mean = total == 0 ? Lanes{} : get(sums + c) / total;
        store(rounded(mean, kDtype), out, kDtype, c, lanes);
      });
    }
  }

  const AttentionTask& task_;
  const Scratch shape_;
  int64_t first_, count_, b_, g_;
  float *queries_, *scores_, *added_, *sums_;
  int64_t limit_[kRows] = {}, mask_[kRows];
  const float* added_of_[kRows];
  float most_[kRows];
  Lanes total_[kRows];
};

int64_t prepared_bytes(const AttentionTask&) { return 0; }

int64_t prepare_items(const AttentionTask&) { return 0; }

void prepare(const AttentionTask&, int64_t, int64_t, uint8_t*) {}

int64_t scratch_bytes(const AttentionTask& task) { return Scratch(task).bytes(); }

int64_t items(const AttentionTask& task) { return task.batches * task.groups * row_blocks(task); }

void run(const AttentionTask& task, const uint8_t*, int64_t first, int64_t last, void* scratch) {
  for (int64_t i = first; i < last; ++i) {
    float* const floats = static_cast<float*>(scratch);
    if (task.dtype == Dtype::kFloat32) {
      RowBlock<float>(task, i, floats).run();
    } else {
      RowBlock<uint16_t>(task, i, floats).run();
    }
  }
}

constexpr AttentionKernel kernel(const char* name) {
  return {name, 1 << 18, prepared_bytes, scratch_bytes, prepare_items, items, prepare, run};
}

}  // namespace
}  // namespace micromix::cpu
