// Quantisation on AVX-512 with VBMI: rows are brought into the order of their layout, rotated and
// quantised part by part.
#include <type_traits>

#include "../mx/hadamard.h"
#include "quantize_words_avx512.h"

namespace micromix::cpu {
namespace {

using namespace avx512;

// Rows of a 16-bit type that an order gathers at once. Fewer are gathered one by one.
constexpr int64_t kRowsTogether = 4, kFewestTogether = 3;
constexpr int64_t kAhead = 2048;  // bytes from what is encoded to what is fetched meanwhile

// A part of a row in float32; a part of four rows in order; and what the order needs: four rows
// side by side, so that one index and one load serve all, and where each channel of the layout is
// there.
struct Scratch {
  float* values;
  uint16_t* ordered;
  uint64_t* fours;  // zero at -1, the channel of padding
  int32_t* places;
  int64_t bytes;

  Scratch(const QuantizeTask& task, void* memory) {
    const bool gathers_fours = task.order && task.x_dtype != Dtype::kFloat32;
    values = static_cast<float*>(memory);
    ordered = reinterpret_cast<uint16_t*>(values + kPartChannels);
    fours = reinterpret_cast<uint64_t*>(ordered + kRowsTogether * kPartChannels + kLine / 2);
    places = reinterpret_cast<int32_t*>(fours + (gathers_fours ? round_up(task.k, 32) : 0));
    const int32_t* const end = places + (gathers_fours ? task.layout.channels() : 0);
    bytes = reinterpret_cast<intptr_t>(end) - reinterpret_cast<intptr_t>(memory);
  }
};

int64_t scratch_bytes(const QuantizeTask& task) { return Scratch(task, nullptr).bytes; }

// Where `fours` has each of 32 channels: `interleave` leaves them so.
constexpr Table<int32_t> four_places() {
  Table<int32_t> table{};
  for (int c = 0; c < 32; ++c) {
    const int vector = c % 2 * 2 + c / 4 % 2, lane = c / 8;
    table.values[c] = 8 * vector + 2 * lane + c / 2 % 2;
  }
  return table;
}
constexpr Table<int32_t> kFourPlaces = four_places();

// Of each block of the order the places of the even channels, then those of the odd ones.
void find_places(const QuantizeTask& task, const Scratch& scratch) {
  const __m512i low = load(kFourPlaces.values), high = load(kFourPlaces.values + 16);
  const auto place = [&](__m512 channels) __attribute__((always_inline)) {
    const __m512i c = _mm512_castps_si512(channels);
    const __m512i within = _mm512_permutex2var_epi32(low, c, high);
    const __m512i at = _mm512_ternarylogic_epi64(_mm512_set1_epi32(31), within, c, 0xCA);
    return _mm512_or_si512(at, _mm512_srai_epi32(c, 31));  // -1 stays
  };
  for (int64_t i = 0; i < task.layout.channels(); i += mx::kBlock) {
    const Pair channels =
        split(_mm512_loadu_ps(task.order + i), _mm512_loadu_ps(task.order + i + 16));
    _mm512_store_si512(scratch.places + i, place(channels.even));
    _mm512_store_si512(scratch.places + i + 16, place(channels.odd));
  }
}

using FourRows = const uint16_t* [kRowsTogether];

// Puts four rows side by side.
void interleave(const FourRows& rows, int64_t k, uint64_t* fours) {
  for (int64_t i = 0; i < k; i += mx::kBlock) {
    const __mmask32 mask = words_before(i, k);
    __m512i even[2], odd[2];
#pragma GCC unroll 2
    for (int p = 0; p < 2; ++p) {
      const __m512i a = _mm512_maskz_loadu_epi16(mask, rows[2 * p] + i);
      const __m512i b = _mm512_maskz_loadu_epi16(mask, rows[2 * p + 1] + i);
      even[p] = halves(a, _mm512_slli_epi32(b, 16));
      odd[p] = halves(_mm512_srli_epi32(a, 16), b);
    }
    _mm512_store_si512(fours + i, _mm512_unpacklo_epi32(even[0], even[1]));
    _mm512_store_si512(fours + i + 8, _mm512_unpackhi_epi32(even[0], even[1]));
    _mm512_store_si512(fours + i + 16, _mm512_unpacklo_epi32(odd[0], odd[1]));
    _mm512_store_si512(fours + i + 24, _mm512_unpackhi_epi32(odd[0], odd[1]));
  }
}

// Brings a part of one row, which begins at `fours`, into the order.
void order_part_of_one(const Scratch& scratch, const int32_t* order, int64_t blocks) {
  // The words at the channels; their low halves count.
  const auto gather = [&](__m512 channels) __attribute__((always_inline)) {
    return _mm512_i32gather_epi32(_mm512_castps_si512(channels), scratch.fours, sizeof(uint16_t));
  };
  for (int64_t i = 0; i < blocks * mx::kBlock; i += mx::kBlock) {
    const Pair channels = split(_mm512_loadu_ps(order + i), _mm512_loadu_ps(order + i + 16));
    const __m512i odd = gather(channels.odd);
    _mm512_store_si512(scratch.ordered + i,
                       halves(gather(channels.even), _mm512_slli_epi32(odd, 16)));
  }
}

// Brings a part of four rows into the order. Meanwhile fetches the same of the rows at `next`: the
// gathers leave the memory idle.
void order_part(const Scratch& scratch, int64_t first_block, int64_t blocks, const FourRows& next) {
  const auto gather = [&](const int32_t* places) __attribute__((always_inline)) {
    const __m256i index = _mm256_load_si256(reinterpret_cast<const __m256i*>(places));
    return _mm512_castsi512_ps(_mm512_i32gather_epi64(index, scratch.fours, sizeof(uint64_t)));
  };
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t at = (first_block + b) * mx::kBlock;
    for (const uint16_t* row : next) _mm_prefetch(row + at, _MM_HINT_T1);
    const int32_t* const places = scratch.places + at;
    uint16_t* const to = scratch.ordered + b * mx::kBlock;
    // Two rows a word.
    const Pair even = split(gather(places), gather(places + 8));
    const Pair odd = split(gather(places + 16), gather(places + 24));
    const auto store = [&](int row, __m512 even, __m512 odd) __attribute__((always_inline)) {
      const __m512i e = _mm512_castps_si512(even), o = _mm512_castps_si512(odd);
      _mm512_store_si512(to + row * kPartChannels, halves(e, _mm512_slli_epi32(o, 16)));
      _mm512_store_si512(to + (row + 1) * kPartChannels, halves(_mm512_srli_epi32(e, 16), o));
    };
    store(0, even.even, odd.even);
    store(2, even.odd, odd.odd);
  }
}

// The values of the channels that `order` names; -1 names none and gives zero.
[[gnu::always_inline]] inline Pair gather_block(const float* row, const int32_t* order) {
  const auto gather = [&](__m512 indices) __attribute__((always_inline)) {
    const __m512i channels = _mm512_castps_si512(indices);
    const __mmask16 real = _mm512_cmpge_epi32_mask(channels, _mm512_setzero_si512());
    return _mm512_mask_i32gather_ps(_mm512_setzero_ps(), real, channels, row, sizeof(float));
  };
  const Pair channels = split(_mm512_loadu_ps(order), _mm512_loadu_ps(order + 16));
  return {gather(channels.even), gather(channels.odd)};
}

// mx::hadamard. The lowest bit of a channel's number tells the vectors apart, the others its lane.
[[gnu::always_inline]] inline Pair hadamard(Pair x) {
  const __m512 parts[2] = {_mm512_add_ps(x.even, x.odd), _mm512_sub_ps(x.even, x.odd)};
  __m512 sums[2];
  for (int i = 0; i < 2; ++i) {
    __m512 y = parts[i];
    y = butterfly(y, _mm512_permute_ps(y, 0b10110001), 0xAAAA);
    y = butterfly(y, _mm512_permute_ps(y, 0b01001110), 0xCCCC);
    y = butterfly(y, _mm512_shuffle_f32x4(y, y, 0b10110001), 0xF0F0);
    y = butterfly(y, _mm512_shuffle_f32x4(y, y, 0b01001110), 0xFF00);
    sums[i] = _mm512_mul_ps(y, _mm512_set1_ps(mx::kHadamardNorm));
  }
  return {sums[0], sums[1]};
}

// Quantises a part whose channels lie at `x` in the order of the layout; there are `channels` of
// them, and zeros beyond.
template <Dtype kDtype, mx::ElementFormat kFormat>
void quantize_part(const Part& part, bool rotates, const void* x, int64_t channels,
                   const Scratch& scratch) {
  const auto pair_at = [&](int64_t b) __attribute__((always_inline)) {
    return load_block<kDtype>(x, b * mx::kBlock, channels);
  };
  if (rotates) {
    quantize_floats<kFormat>(part, scratch.values, [&](int64_t b) __attribute__((always_inline)) {
      return hadamard(pair_at(b));
    });
  } else if constexpr (kDtype == Dtype::kBFloat16) {
    const uint16_t* words = static_cast<const uint16_t*>(x);
    if (channels < part.blocks * mx::kBlock) {
      for (int64_t i = 0; i < part.blocks * mx::kBlock; i += mx::kBlock) {
        const __mmask32 mask = words_before(i, channels);
        _mm512_store_si512(scratch.ordered + i, _mm512_maskz_loadu_epi16(mask, words + i));
      }
      words = scratch.ordered;
    }
    quantize_words<kFormat>(part, words);
  } else {
    quantize_floats<kFormat>(part, scratch.values, pair_at);
  }
}

// The same of a row of float32 that is not in order.
template <mx::ElementFormat kFormat>
void order_and_quantize(const Part& part, bool rotates, const float* row, const int32_t* order,
                        const Scratch& scratch) {
  quantize_floats<kFormat>(part, scratch.values, [&](int64_t b) __attribute__((always_inline)) {
    const Pair x = gather_block(row, order + b * mx::kBlock);
    return rotates ? hadamard(x) : x;
  });
}

// The rows of a task that one call quantises; those after the last are the last.
template <Dtype kDtype>
struct Rows {
  using Element = std::conditional_t<kDtype == Dtype::kFloat32, float, uint16_t>;
  const QuantizeTask& task;
  int64_t last;

  const Element* operator[](int64_t r) const {
    return static_cast<const Element*>(task.x) + (r < last ? r : last - 1) * task.k;
  }
};

// Quantises a segment of `count` rows from row r on: of one, or of those that `scratch.fours` has.
template <mx::ElementFormat kFormat, Dtype kDtype>
void quantize_segment(const mx::Segment& segment, const Rows<kDtype>& rows, int64_t r,
                      int64_t count, const Scratch& scratch) {
  const QuantizeTask& task = rows.task;
  const mx::MixedLayout& layout = task.layout;
  const bool rotates = segment.hadamard;
  for (int64_t b = 0; b < segment.blocks; b += kPart) {
    const int64_t first = segment.first_block + b, channel = first * mx::kBlock;
    const auto* const x = rows[r] + channel;
    Part part;
    part.rule = segment.rule;
    part.blocks = segment.blocks - b < kPart ? segment.blocks - b : kPart;
    part.next = reinterpret_cast<const uint8_t*>(x) + kAhead;
    part.next_bytes = mx::kBlock * sizeof *x;
    part.data =
        task.data + r * layout.row_bytes() + segment.byte_start + b * mx::block_bytes(kFormat);
    part.scales = task.scales + r * layout.blocks() + first;
    if (!task.order) {
      quantize_part<kDtype, kFormat>(part, rotates, x, task.k - channel, scratch);
    } else if constexpr (kDtype == Dtype::kFloat32) {
      part.next = reinterpret_cast<const uint8_t*>(rows[r + 1] + channel);
      order_and_quantize<kFormat>(part, rotates, rows[r], task.order + channel, scratch);
    } else {
      if (count == 1) {
        order_part_of_one(scratch, task.order + channel, part.blocks);
      } else {
        const int64_t next = r + kRowsTogether;
        order_part(scratch, first, part.blocks,
                   {rows[next], rows[next + 1], rows[next + 2], rows[next + 3]});
      }
      for (int64_t i = 0; i < count; ++i) {
        const uint16_t* const ordered = scratch.ordered + i * kPartChannels;
        part.next = reinterpret_cast<const uint8_t*>(ordered);  // order_part has fetched the rows
        quantize_part<kDtype, kFormat>(part, rotates, ordered, kPartChannels, scratch);
        part.data += layout.row_bytes();
        part.scales += layout.blocks();
      }
    }
  }
}

template <Dtype kDtype>
void run(const QuantizeTask& task, int64_t first_row, int64_t last_row, void* memory) {
  const Scratch scratch(task, memory);
  const Rows<kDtype> rows{task, last_row};
  constexpr bool kIsWord = kDtype != Dtype::kFloat32;
  if (kIsWord && task.order) {
    scratch.fours[-1] = 0;
    if (last_row - first_row >= kFewestTogether) find_places(task, scratch);
  }
  for (int64_t r = first_row, count; r < last_row; r += count) {
    count = last_row - r < kRowsTogether ? last_row - r : kRowsTogether;
    if (!kIsWord || !task.order || count < kFewestTogether) count = 1;
    if constexpr (kIsWord) {
      if (task.order && count == 1) {
        std::memcpy(scratch.fours, rows[r], task.k * sizeof(uint16_t));
      } else if (task.order) {
        interleave({rows[r], rows[r + 1], rows[r + 2], rows[r + 3]}, task.k, scratch.fours);
      }
    }
    for (const mx::Segment& s : task.layout.segments()) {
      if (s.format == mx::E2M1) quantize_segment<mx::E2M1>(s, rows, r, count, scratch);
      if (s.format == mx::E2M3) quantize_segment<mx::E2M3>(s, rows, r, count, scratch);
      if (s.format == mx::E3M2) quantize_segment<mx::E3M2>(s, rows, r, count, scratch);
      if (s.format == mx::E4M3) quantize_segment<mx::E4M3>(s, rows, r, count, scratch);
    }
  }
}

void run(const QuantizeTask& task, int64_t first_row, int64_t last_row, void* memory) {
  if (task.x_dtype == Dtype::kBFloat16) run<Dtype::kBFloat16>(task, first_row, last_row, memory);
  if (task.x_dtype == Dtype::kFloat16) run<Dtype::kFloat16>(task, first_row, last_row, memory);
  if (task.x_dtype == Dtype::kFloat32) run<Dtype::kFloat32>(task, first_row, last_row, memory);
}

}  // namespace

const QuantizeKernel kQuantizeAvx512 = {"avx512", 1 << 15, kRowsTogether, scratch_bytes, run};

}  // namespace micromix::cpu
