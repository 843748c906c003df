// Attention on AMX: tiles of queries meet blocks of keys, with a running maximum and sum for each
// query (Milakov and Gimelshein, arXiv 1805.02867; Dao et al., arXiv 2205.14135). Scores and sums
// are float32; what multiplies the values is rounded to bfloat16.
//
// The rows of a group are its queries of all heads that share its keys, so that the one query of a
// decode step fills a tile as far as it can, and keys are read where they are, once.
#include <cfloat>
#include <limits>

#include "amx.h"
#include "attention.h"

namespace micromix::cpu {
namespace {

constexpr int64_t kRows = 32;   // rows that meet a block together: two tiles
constexpr int64_t kKeys = 128;  // keys of a block
constexpr int64_t kLanes = 16;
constexpr int64_t kPair = 32;  // bfloat16 numbers in a row of a tile
constexpr float kNone = -std::numeric_limits<float>::infinity();
constexpr float kLog2E = 1.44269504088896340736f;

int64_t at_most(int64_t value, int64_t limit) { return value < limit ? value : limit; }

// Where a block of keys and values lies once it is packed: tiles of 16 keys x 32 channels, then of
// 32 keys x 16 channels, both with pairs of K side by side, as the second operand of a product has
// them.
struct Shape {
  int64_t key_steps, value_tiles;

  explicit Shape(const AttentionTask& task)
      : key_steps((task.head_size + kPair - 1) / kPair),
        value_tiles((task.value_size + kPair - 1) / kPair * 2) {}

  int64_t key_tile(int64_t tile, int64_t step) const {
    return (tile * key_steps + step) * kTileBytes;
  }
  int64_t value_tile(int64_t step, int64_t tile) const {
    return key_tile(kKeys / kLanes, 0) + (step * value_tiles + tile) * kTileBytes;
  }
  int64_t block_bytes() const { return value_tile(kKeys / kPair, 0); }

  // Scratch: queries, scores, weights, sums, and a block.
  int64_t query_row() const { return key_steps * kPair; }
  int64_t sum_row() const { return value_tiles * kLanes; }
  int64_t scores_at() const { return kRows * query_row() * int64_t{sizeof(uint16_t)}; }
  int64_t weights_at() const { return scores_at() + kRows * kKeys * int64_t{sizeof(float)}; }
  int64_t sums_at() const { return weights_at() + kRows * kKeys * int64_t{sizeof(uint16_t)}; }
  int64_t block_at() const { return sums_at() + kRows * sum_row() * int64_t{sizeof(float)}; }
  int64_t scratch_bytes() const { return block_at() + block_bytes(); }
};

int64_t blocks_of(const AttentionTask& task) { return (task.keys + kKeys - 1) / kKeys; }

int64_t row_blocks(const AttentionTask& task) { return (task.rows_of_group() + kRows - 1) / kRows; }

// Keys that several blocks of rows meet are packed first, once; those of one are packed as it goes,
// and not at all where no row sees them.
bool packs_first(const AttentionTask& task) { return row_blocks(task) > 1; }

__mmask32 channels_of(int64_t count) {
  return count >= kPair ? ~__mmask32{0} : (__mmask32{1} << (count > 0 ? count : 0)) - 1;
}

// 16 lines, the 16 words of which become the lines' n-th words.
[[gnu::always_inline]] inline void transpose(__m512i (&lines)[16]) {
  __m512i t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(lines[2 * i], lines[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(lines[2 * i], lines[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    lines[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    lines[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    lines[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    lines[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  // lines[4 * i + j]: of rows 4 * i to 4 * i + 3, the words j, j + 4, j + 8 and j + 12.
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    t[j] = _mm512_shuffle_i32x4(lines[j], lines[4 + j], 0x88);
    t[4 + j] = _mm512_shuffle_i32x4(lines[j], lines[4 + j], 0xDD);
    t[8 + j] = _mm512_shuffle_i32x4(lines[8 + j], lines[12 + j], 0x88);
    t[12 + j] = _mm512_shuffle_i32x4(lines[8 + j], lines[12 + j], 0xDD);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    lines[j] = _mm512_shuffle_i32x4(t[j], t[8 + j], 0x88);
    lines[4 + j] = _mm512_shuffle_i32x4(t[4 + j], t[12 + j], 0x88);
    lines[8 + j] = _mm512_shuffle_i32x4(t[j], t[8 + j], 0xDD);
    lines[12 + j] = _mm512_shuffle_i32x4(t[4 + j], t[12 + j], 0xDD);
  }
}

// Packs keys [k0, k0 + count); zeros fill up the last 32 of them.
void pack(const AttentionTask& task, const Shape& shape, int64_t b, int64_t g, int64_t k0,
          int64_t count, uint8_t* out) {
  const int64_t padded = round_up(count, kPair);
  for (int64_t tile = 0; tile < padded / kLanes; ++tile) {
    for (int64_t step = 0; step < shape.key_steps; ++step) {
      const __mmask32 channels = channels_of(task.head_size - step * kPair);
      __m512i lines[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        const int64_t k = tile * kLanes + i;
        const uint16_t* const key =
            task.key.at<uint16_t>(b, g, k0 + (k < count ? k : 0)) + step * kPair;
        lines[i] = _mm512_maskz_loadu_epi16(k < count ? channels : 0, key);
      }
      transpose(lines);
      uint8_t* const to = out + shape.key_tile(tile, step);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) _mm512_store_si512(to + i * kLine, lines[i]);
    }
  }
  const __m512i low = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
  const __m512i high = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
  for (int64_t step = 0; step < padded / kPair; ++step) {
    for (int64_t i = 0; i < kLanes; ++i) {
      const int64_t k = step * kPair + 2 * i;
      const uint16_t* const even = task.value.at<uint16_t>(b, g, k0 + (k < count ? k : 0));
      const uint16_t* const odd = task.value.at<uint16_t>(b, g, k0 + (k + 1 < count ? k + 1 : 0));
      for (int64_t tile = 0; tile < shape.value_tiles; tile += 2) {
        const __mmask32 channels = channels_of(task.value_size - tile * kLanes);
        const __m512i x = _mm512_maskz_loadu_epi16(k < count ? channels : 0, even + tile * kLanes);
        const __m512i y =
            _mm512_maskz_loadu_epi16(k + 1 < count ? channels : 0, odd + tile * kLanes);
        const __m512i first = _mm512_unpacklo_epi16(x, y), second = _mm512_unpackhi_epi16(x, y);
        uint8_t* const to = out + shape.value_tile(step, tile) + i * kLine;
        _mm512_store_si512(to, _mm512_permutex2var_epi64(first, low, second));
        _mm512_store_si512(to + kTileBytes, _mm512_permutex2var_epi64(first, high, second));
      }
    }
  }
}

// 2^x for x at most 0, within 3e-6 of itself; 0 below 2^-126, as subnormal numbers take AVX-512
// many times as long. NaN stays NaN.
[[gnu::always_inline]] inline __m512 exp2(__m512 x) {
  const __mmask16 normal = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-126), _CMP_NLT_UQ);
  // The unit in the last place of this is 1, so the sum rounds to the nearest integer; its low bits
  // are the bias of an exponent.
  const __m512 integers = _mm512_set1_ps(0x1.8p23f + 127);
  const __m512 sum = _mm512_add_ps(x, integers);
  const __m512 f = _mm512_sub_ps(x, _mm512_sub_ps(sum, integers));
  __m512 p = _mm512_set1_ps(9.58284754e-3f);
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.59064266e-2f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.40240988e-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.93124193e-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.f));
  // A product: the sum of an exponent and the bits of a NaN could be any number.
  const __m512i power = _mm512_slli_epi32(_mm512_castps_si512(sum), 23);
  return _mm512_maskz_mul_ps(normal, p, _mm512_castsi512_ps(power));
}

// The mask of one row from key k on, of those keys that `keys` has: lanes that are seen, and what
// is added to the scores, in units of their logarithm to base 2.
struct Masked {
  __mmask16 seen;
  __m512 added;
};

[[gnu::always_inline]] inline Masked mask_at(const AttentionTask& task, int64_t row, int64_t k,
                                             __mmask16 keys) {
  if (task.mask_type == MaskType::kBool) {
    const auto* const mask = static_cast<const uint8_t*>(task.mask) + row + k;
    const __m128i bytes = _mm_maskz_loadu_epi8(keys, mask);
    return {_mm_test_epi8_mask(bytes, bytes), _mm512_setzero_ps()};
  }
  __m512 added;
  if (task.mask_type == MaskType::kFloat32) {
    added = _mm512_maskz_loadu_ps(keys, static_cast<const float*>(task.mask) + row + k);
  } else {
    const auto* const mask = static_cast<const uint16_t*>(task.mask) + row + k;
    const __m512i words = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(keys, mask));
    added = _mm512_castsi512_ps(_mm512_slli_epi32(words, 16));
  }
  const __mmask16 none = _mm512_cmp_ps_mask(added, _mm512_set1_ps(kNone), _CMP_EQ_OQ);
  // The least of all floats, which masks use for -inf, must not become that here.
  added = _mm512_max_ps(_mm512_set1_ps(-FLT_MAX), _mm512_mul_ps(added, _mm512_set1_ps(kLog2E)));
  return {static_cast<__mmask16>(keys & ~none), added};
}

__mmask16 lanes_below(int64_t count) {
  count = count < 0 ? 0 : count > kLanes ? kLanes : count;
  return static_cast<__mmask16>((1u << count) - 1);
}

// How many keys there are up to the last of [first, keys) that a row of the mask shows, or a few
// more; `first` where it shows none of them.
int64_t shown(const AttentionTask& task, int64_t row, int64_t first, int64_t keys) {
  const bool bytes = task.mask_type == MaskType::kBool;
  const int64_t step = bytes ? kLine : kLanes;
  for (int64_t k = first + round_up(keys - first, step); k > first; k -= step) {
    const int64_t begin = k - step, left = keys - begin;
    if (bytes) {
      const __mmask64 some = left < kLine ? (__mmask64{1} << left) - 1 : ~__mmask64{0};
      const __m512i line =
          _mm512_maskz_loadu_epi8(some, static_cast<const uint8_t*>(task.mask) + row + begin);
      if (_mm512_test_epi8_mask(line, line)) return at_most(k, keys);
    } else if (mask_at(task, row, begin, lanes_below(left)).seen) {
      return at_most(k, keys);
    }
  }
  return first;
}

// Whole blocks: what lies in a block that some row sees is met as it always is. Of a prompt the
// last query mostly sees the most, so that the others are looked at beyond that alone.
int64_t seen_keys(const AttentionTask& task, int64_t first, int64_t last) {
  const int64_t keys = task.causal ? at_most(task.keys, task.queries) : task.keys;
  int64_t seen = task.mask_type == MaskType::kNone ? keys : 0;
  for (int64_t i = last; i > first && seen < keys; --i) {
    seen = round_up(shown(task, task.mask_row_at(i - 1), seen, keys), kKeys);
  }
  return at_most(round_up(seen, kKeys), task.keys);
}

// Whether the mask shows some of keys [k0, k0 + count) to a group. Of a prompt that begins with the
// keys, the query beside the last of them sees them, whatever window it has.
bool shows(const AttentionTask& task, int64_t b, int64_t g, int64_t k0, int64_t count) {
  if (task.mask_type == MaskType::kNone) return true;
  const int64_t first_head = g * task.heads_of_group();
  const int64_t heads = task.mask_head ? task.heads_of_group() : 1;
  const int64_t queries = task.mask_queries(), beside = at_most(k0 + count, queries);
  for (int64_t i = 0; i < queries; ++i) {
    const int64_t q = (beside - 1 + i) % queries;
    for (int64_t h = first_head; h < first_head + heads; ++h) {
      const int64_t row = b * task.mask_batch + h * task.mask_head + q * task.mask_row;
      if (shown(task, row, k0, k0 + count) > k0) return true;
    }
  }
  return false;
}

// The rows of a group that meet its keys together.
class RowBlock {
 public:
  RowBlock(const AttentionTask& task, const Shape& shape, const uint8_t* prepared, int64_t item,
           uint8_t* scratch)
      : task_(task), shape_(shape), scratch_(scratch) {
    const int64_t blocks = row_blocks(task), group = item / blocks;
    first_ = item % blocks * kRows;
    count_ = at_most(task.rows_of_group() - first_, kRows);
    b_ = group / task.groups;
    g_ = group % task.groups;
    if (packs_first(task)) prepared_ = prepared + group * blocks_of(task) * shape.block_bytes();
    queries_ = reinterpret_cast<uint16_t*>(scratch);
    scores_ = reinterpret_cast<float*>(scratch + shape.scores_at());
    weights_ = reinterpret_cast<uint16_t*>(scratch + shape.weights_at());
    sums_ = reinterpret_cast<float*>(scratch + shape.sums_at());
  }

  void run() {
    if (count_ > kLanes) {
      run_tiles<2>();
    } else {
      run_tiles<1>();
    }
  }

 private:
  int64_t query_of(int64_t row) const { return (first_ + row) / task_.heads_of_group(); }
  int64_t head_of(int64_t row) const {
    return g_ * task_.heads_of_group() + (first_ + row) % task_.heads_of_group();
  }
  int64_t mask_of(int64_t row) const {
    return b_ * task_.mask_batch + head_of(row) * task_.mask_head + query_of(row) * task_.mask_row;
  }
  // The keys that a row may see, but for the mask.
  int64_t limit_of(int64_t row) const {
    return task_.causal ? at_most(task_.keys, query_of(row) + 1) : task_.keys;
  }

  template <int kRowTiles>
  void run_tiles() {
    begin<kRowTiles>();
    bool first = true;
    const int64_t limit = limit_[count_ - 1];
    for (int64_t k0 = 0; k0 < limit; k0 += kKeys) {
      const Seen seen = look(k0, at_most(limit - k0, kKeys));
      if (seen.keys == 0) continue;
      const uint8_t* const block = packed(k0, seen.keys);
      const int64_t tiles = round_up(seen.keys, kPair) / kLanes;
      multiply_keys<kRowTiles>(block, tiles);
      if (seen.all && task_.scale > 0) {
        weigh<false>(k0, tiles, first);
      } else {
        weigh<true>(k0, tiles, first);
      }
      multiply_values<kRowTiles>(block, tiles, first);
      first = false;
    }
    end(first);
  }

  template <int kRowTiles>
  void begin() {
    for (int64_t row = 0; row < kRowTiles * kLanes; ++row) {
      const bool exists = row < count_;
      const uint16_t* const query =
          task_.query.at<uint16_t>(b_, head_of(exists ? row : 0), query_of(exists ? row : 0));
      for (int64_t c = 0; c < shape_.query_row(); c += kPair) {
        const __mmask32 channels = channels_of(task_.head_size - c);
        const __m512i line = _mm512_maskz_loadu_epi16(exists ? channels : 0, query + c);
        _mm512_store_si512(queries_ + row * shape_.query_row() + c, line);
      }
      limit_[row] = exists ? limit_of(row) : 0;
      mask_[row] = exists ? mask_of(row) : 0;
      most_[row] = kNone;
      total_[row] = _mm512_setzero_ps();
      // Rows that do not exist weigh nothing.
      for (int64_t k = 0; k < (exists ? 0 : kKeys); k += kPair) {
        _mm512_store_si512(weights_ + row * kKeys + k, _mm512_setzero_si512());
      }
    }
  }

  // What the rows see of keys [k0, k0 + keys): the first `keys` of them; `all` says that every row
  // sees every one, with nothing added.
  struct Seen {
    int64_t keys;
    bool all;
  };

  Seen look(int64_t k0, int64_t keys) const {
    const bool whole = limit_[0] >= k0 + keys && keys % kPair == 0;
    if (task_.mask_type == MaskType::kNone) return {keys, whole};
    int64_t some = 0, every = keys, last = -1;
    for (int64_t row = 0; row < count_; ++row) {
      const int64_t mask = mask_[row];
      if (mask == last) continue;
      last = mask;
      for (int64_t k = 0; k < keys; k += kLanes) {
        const __mmask16 lanes = lanes_below(keys - k),
                        seen = mask_at(task_, mask, k0 + k, lanes).seen;
        if (seen != lanes && k < every) every = k;
        if (seen != 0 && k + kLanes > some) some = k + kLanes;
      }
    }
    some = at_most(round_up(some, kPair), keys);
    return {some, whole && some <= every && task_.mask_type == MaskType::kBool};
  }

  const uint8_t* packed(int64_t k0, int64_t keys) {
    if (prepared_) return prepared_ + k0 / kKeys * shape_.block_bytes();
    uint8_t* const block = scratch_ + shape_.block_at();
    pack(task_, shape_, b_, g_, k0, keys, block);
    return block;
  }

  // Scores of the rows and the keys of a block.
  template <int kRowTiles>
  void multiply_keys(const uint8_t* block, int64_t tiles) {
    const int64_t row_bytes = shape_.query_row() * int64_t{sizeof(uint16_t)};
    constexpr int64_t kScoreRow = kKeys * sizeof(float);
    asm volatile("" : : : "memory");  // gcc 12: _tile_loadd reads memory
    for (int64_t tile = 0; tile < tiles; tile += 2) {
      _tile_zero(0);
      _tile_zero(1);
      if constexpr (kRowTiles == 2) _tile_zero(2);
      if constexpr (kRowTiles == 2) _tile_zero(3);
      for (int64_t step = 0; step < shape_.key_steps; ++step) {
        _tile_loadd(4, queries_ + step * kPair, row_bytes);
        _tile_loadd(6, block + shape_.key_tile(tile, step), kLine);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, block + shape_.key_tile(tile + 1, step), kLine);
        _tile_dpbf16ps(1, 4, 7);
        if constexpr (kRowTiles == 2) {
          _tile_loadd(5, queries_ + kLanes * shape_.query_row() + step * kPair, row_bytes);
          _tile_dpbf16ps(2, 5, 6);
          _tile_dpbf16ps(3, 5, 7);
        }
      }
      float* const to = scores_ + tile * kLanes;
      _tile_stored(0, to, kScoreRow);
      _tile_stored(1, to + kLanes, kScoreRow);
      if constexpr (kRowTiles == 2) {
        _tile_stored(2, to + kLanes * kKeys, kScoreRow);
        _tile_stored(3, to + kLanes * kKeys + kLanes, kScoreRow);
      }
    }
    asm volatile("" : : : "memory");
  }

  // Scores become weights, 2^(score - the row's maximum); sums so far are brought to a new maximum.
  template <bool kMasked>
  void weigh(int64_t k0, int64_t tiles, bool begins) {
    for (int64_t first = 0; first < count_; first += kLanes) {
      const int64_t last = at_most(first + kLanes, count_);
      for (int64_t row = first; row < last; ++row) {
        __m512 most = kMasked ? mask_scores(row, k0, tiles) : most_score(row, tiles);
        _mm512_store_ps(lanes_ + (row - first) * kLanes, most);
      }
      __m512 now = most_of_lanes();
      if constexpr (!kMasked) now = _mm512_mul_ps(now, factor());
      const __m512 before = _mm512_load_ps(most_ + first);
      now = _mm512_max_ps(now, before);
      _mm512_store_ps(most_ + first, now);
      const __mmask16 grown =
          _mm512_cmp_ps_mask(now, before, _CMP_NEQ_UQ) & lanes_below(last - first);
      // Where a row has seen nothing so far, its weights are zeros (or NaN) over any maximum.
      const __mmask16 none = _mm512_cmp_ps_mask(now, _mm512_set1_ps(kNone), _CMP_EQ_OQ);
      _mm512_store_ps(over_, _mm512_mask_mov_ps(now, none, _mm512_setzero_ps()));
      if (grown && !begins) {
        _mm512_store_ps(smaller_, exp2(_mm512_sub_ps(before, now)));
        for (int64_t row = first; row < last; ++row) {
          if (grown >> (row - first) & 1) shrink(row, _mm512_set1_ps(smaller_[row - first]));
        }
      }
      for (int64_t row = first; row < last; ++row) {
        weigh_row<kMasked>(row, _mm512_set1_ps(over_[row - first]), tiles);
      }
    }
  }

  __m512 factor() const { return _mm512_set1_ps(task_.scale * kLog2E); }

  // The largest score of a row, by lanes, before its factor.
  [[gnu::always_inline]] __m512 most_score(int64_t row, int64_t tiles) const {
    const float* const scores = scores_ + row * kKeys;
    __m512 even = _mm512_load_ps(scores), odd = _mm512_load_ps(scores + kLanes);
    for (int64_t t = 2; t < tiles; t += 2) {
      even = _mm512_max_ps(_mm512_load_ps(scores + t * kLanes), even);
      odd = _mm512_max_ps(_mm512_load_ps(scores + (t + 1) * kLanes), odd);
    }
    return _mm512_max_ps(even, odd);
  }

  // Applies the factor and the mask to a row of scores; the largest of them, by lanes.
  [[gnu::always_inline]] __m512 mask_scores(int64_t row, int64_t k0, int64_t tiles) const {
    float* const scores = scores_ + row * kKeys;
    const __m512 factor = this->factor();
    __m512 most = _mm512_set1_ps(kNone);
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t k = k0 + t * kLanes;
      __m512 x = _mm512_mul_ps(_mm512_load_ps(scores + t * kLanes), factor);
      __mmask16 seen = lanes_below(limit_[row] - k);
      if (task_.mask_type != MaskType::kNone) {
        const Masked mask = mask_at(task_, mask_[row], k, seen);
        seen = mask.seen;
        x = _mm512_add_ps(x, mask.added);
      }
      x = _mm512_mask_mov_ps(_mm512_set1_ps(kNone), seen, x);
      _mm512_store_ps(scores + t * kLanes, x);
      most = _mm512_max_ps(x, most);  // passes over NaN, which the weights keep
    }
    return most;
  }

  // The largest lane of each of 16 rows.
  __m512 most_of_lanes() const {
    __m512i rows[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) rows[i] = _mm512_load_si512(lanes_ + i * kLanes);
    transpose(rows);
#pragma GCC unroll 4
    for (int step = 8; step > 0; step /= 2) {
#pragma GCC unroll 8
      for (int i = 0; i < step; ++i) {
        rows[i] = _mm512_castps_si512(
            _mm512_max_ps(_mm512_castsi512_ps(rows[i]), _mm512_castsi512_ps(rows[i + step])));
      }
    }
    return _mm512_castsi512_ps(rows[0]);
  }

  void shrink(int64_t row, __m512 factor) {
    total_[row] = _mm512_mul_ps(total_[row], factor);
    float* const sums = sums_ + row * shape_.sum_row();
    for (int64_t c = 0; c < shape_.sum_row(); c += kLanes) {
      _mm512_store_ps(sums + c, _mm512_mul_ps(_mm512_load_ps(sums + c), factor));
    }
  }

  template <bool kMasked>
  [[gnu::always_inline]] void weigh_row(int64_t row, __m512 over, int64_t tiles) {
    const float* const scores = scores_ + row * kKeys;
    uint16_t* const weights = weights_ + row * kKeys;
    const __m512 factor = this->factor();
    const auto weight = [&](int64_t t) [[gnu::always_inline]] {
      const __m512 x = _mm512_load_ps(scores + t * kLanes);
      return exp2(kMasked ? _mm512_sub_ps(x, over) : _mm512_fmsub_ps(x, factor, over));
    };
    __m512 total = total_[row];
    for (int64_t t = 0; t < tiles; t += 2) {
      const __m512 p = weight(t), q = weight(t + 1);
      total = _mm512_add_ps(total, _mm512_add_ps(p, q));
      _mm512_store_si512(weights + t * kLanes,
                         reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(q, p)));
    }
    total_[row] = total;
  }

  // Adds the weighted values of a block to the sums.
  template <int kRowTiles>
  void multiply_values(const uint8_t* block, int64_t tiles, bool first) {
    const int64_t sum_row = shape_.sum_row() * int64_t{sizeof(float)};
    constexpr int64_t kWeightRow = kKeys * sizeof(uint16_t);
    asm volatile("" : : : "memory");
    for (int64_t tile = 0; tile < shape_.value_tiles; tile += 2) {
      float* const sums = sums_ + tile * kLanes;
      float* const below = sums + kLanes * shape_.sum_row();
      if (first) {
        _tile_zero(0);
        _tile_zero(1);
        if constexpr (kRowTiles == 2) _tile_zero(2);
        if constexpr (kRowTiles == 2) _tile_zero(3);
      } else {
        _tile_loadd(0, sums, sum_row);
        _tile_loadd(1, sums + kLanes, sum_row);
        if constexpr (kRowTiles == 2) _tile_loadd(2, below, sum_row);
        if constexpr (kRowTiles == 2) _tile_loadd(3, below + kLanes, sum_row);
      }
      for (int64_t step = 0; step < tiles / 2; ++step) {
        _tile_loadd(4, weights_ + step * kPair, kWeightRow);
        _tile_loadd(6, block + shape_.value_tile(step, tile), kLine);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, block + shape_.value_tile(step, tile + 1), kLine);
        _tile_dpbf16ps(1, 4, 7);
        if constexpr (kRowTiles == 2) {
          _tile_loadd(5, weights_ + kLanes * kKeys + step * kPair, kWeightRow);
          _tile_dpbf16ps(2, 5, 6);
          _tile_dpbf16ps(3, 5, 7);
        }
      }
      _tile_stored(0, sums, sum_row);
      _tile_stored(1, sums + kLanes, sum_row);
      if constexpr (kRowTiles == 2) {
        _tile_stored(2, below, sum_row);
        _tile_stored(3, below + kLanes, sum_row);
      }
    }
    asm volatile("" : : : "memory");
  }

  void end(bool nothing) const {
    for (int64_t row = 0; row < count_; ++row) {
      uint16_t* const out =
          static_cast<uint16_t*>(task_.out) +
          ((b_ * task_.queries + query_of(row)) * task_.heads + head_of(row)) * task_.value_size;
      const float sum_of_weights = _mm512_reduce_add_ps(total_[row]);
      const bool empty = nothing || sum_of_weights == 0;
      const __m512 total = _mm512_set1_ps(sum_of_weights);
      for (int64_t c = 0; c < task_.value_size; c += kLanes) {
        const __mmask16 channels = lanes_below(task_.value_size - c);
        const __m512 sum =
            empty ? _mm512_setzero_ps()
                  : _mm512_div_ps(_mm512_load_ps(sums_ + row * shape_.sum_row() + c), total);
        _mm256_mask_storeu_epi16(out + c, channels,
                                 reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(sum)));
      }
    }
  }

  const AttentionTask& task_;
  const Shape& shape_;
  const uint8_t* prepared_ = nullptr;
  uint8_t* const scratch_;
  int64_t first_, count_, b_, g_;
  uint16_t *queries_, *weights_;
  float *scores_, *sums_;
  int64_t limit_[kRows], mask_[kRows];
  alignas(kLine) float most_[kRows];
  __m512 total_[kRows];
  alignas(kLine) float lanes_[kLanes * kLanes] = {}, over_[kLanes], smaller_[kLanes];
};

int64_t prepare_items(const AttentionTask& task) {
  return packs_first(task) ? task.batches * task.groups * blocks_of(task) : 0;
}

int64_t prepared_bytes(const AttentionTask& task) {
  return prepare_items(task) * Shape(task).block_bytes();
}

int64_t scratch_bytes(const AttentionTask& task) { return Shape(task).scratch_bytes(); }

int64_t items(const AttentionTask& task) { return task.batches * task.groups * row_blocks(task); }

void prepare(const AttentionTask& task, int64_t first, int64_t last, uint8_t* prepared) {
  const Shape shape(task);
  const int64_t blocks = blocks_of(task);
  for (int64_t i = first; i < last; ++i) {
    const int64_t b = i / blocks / task.groups, g = i / blocks % task.groups;
    const int64_t k0 = i % blocks * kKeys, count = at_most(task.keys - k0, kKeys);
    if (!shows(task, b, g, k0, count)) continue;  // no row meets it
    pack(task, shape, b, g, k0, count, prepared + i * shape.block_bytes());
  }
}

void run(const AttentionTask& task, const uint8_t* prepared, int64_t first, int64_t last,
         void* scratch) {
  const Tiles tiles;
  const Shape shape(task);
  for (int64_t i = first; i < last; ++i) {
    RowBlock(task, shape, prepared, i, static_cast<uint8_t*>(scratch)).run();
  }
}

}  // namespace

const AttentionKernel kAttentionAmx = {
    "amx", 1 << 22, prepared_bytes, scratch_bytes, prepare_items, items, prepare, run, seen_keys};

}  // namespace micromix::cpu
