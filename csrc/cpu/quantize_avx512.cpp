// Quantisation on AVX-512 with VBMI, in three passes over a row that stays in L1: the values of
// each block, its even channels in one vector and the odd ones in another, and their amax; the
// scales, 16 at a time; the codes.
#include "../mx/hadamard.h"
#include "avx512.h"

namespace micromix::cpu {
namespace {

using namespace avx512;

constexpr int kGroup = 16;            // blocks whose amax are found together
constexpr int64_t kRowsTogether = 4;  // rows of a 16-bit type that an order gathers at once

// What a row needs: its values block by block, and per block its amax and its factor, whole groups
// of them. Rows of a 16-bit type that an order gathers come in fours: channel by channel the four
// side by side, so that one index and one load serve all; then in the order, two rows a word.
struct Scratch {
  float* values;
  uint32_t* amax;
  float* factor;
  uint64_t* fours;
  uint32_t* ordered[2];
  int64_t bytes;

  Scratch(const QuantizeTask& task, void* memory) {
    const int64_t blocks = round_up(task.layout.blocks(), kGroup);
    values = static_cast<float*>(memory);
    amax = reinterpret_cast<uint32_t*>(values + task.layout.channels());
    factor = reinterpret_cast<float*>(amax + blocks);
    fours = reinterpret_cast<uint64_t*>(factor + blocks);
    ordered[0] = reinterpret_cast<uint32_t*>(fours + round_up(task.k, 16));
    ordered[1] = ordered[0] + task.layout.channels();
    const int64_t floats = 3 * task.layout.channels() + 2 * blocks + 2 * round_up(task.k, 16);
    bytes = floats * static_cast<int64_t>(sizeof(float));
  }
};

int64_t scratch_bytes(const QuantizeTask& task) { return Scratch(task, nullptr).bytes; }

// Lanes of the vector at channel `first` that lie before channel k.
[[gnu::always_inline]] inline __mmask16 lanes_before(int64_t first, int64_t k) {
  const int64_t left = k - first;
  return left >= 16 ? 0xFFFF : left <= 0 ? 0 : static_cast<__mmask16>((1u << left) - 1);
}

struct Pair {
  __m512 even, odd;
};

[[gnu::always_inline]] inline Pair split(__m512 low, __m512 high) {
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odd = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
  return {_mm512_permutex2var_ps(low, even, high), _mm512_permutex2var_ps(low, odd, high)};
}

// The values of 32 channels from `at` on; those beyond channel k are zero.
template <Dtype kDtype>
[[gnu::always_inline]] inline Pair load_block(const void* row, int64_t at, int64_t k) {
  if constexpr (kDtype == Dtype::kBFloat16) {
    const int64_t left = k - at;
    const __mmask32 mask = left >= 32 ? 0xFFFFFFFF : left <= 0 ? 0 : (1u << left) - 1;
    const __m512i words = _mm512_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(row) + at);
    const __m512i high = _mm512_set1_epi32(static_cast<int32_t>(0xFFFF0000));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(words, 16)),
            _mm512_castsi512_ps(_mm512_and_si512(words, high))};
  }
  return split(load_floats(row, kDtype, at, lanes_before(at, k)),
               load_floats(row, kDtype, at + 16, lanes_before(at + 16, k)));
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

// Brings four rows of a 16-bit type, from `rows` on, into the order.
void order_rows(const QuantizeTask& task, const uint16_t* rows, const Scratch& scratch) {
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
  for (int64_t i = 0; i < task.k; i += 16) {
    const __mmask16 mask = lanes_before(i, task.k);
    const auto pair = [&](int row) __attribute__((always_inline)) {
      const auto widen = [&](const uint16_t* from) __attribute__((always_inline)) {
        return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from));
      };
      const uint16_t* const from = rows + row * task.k + i;
      return _mm512_or_si512(widen(from), _mm512_slli_epi32(widen(from + task.k), 16));
    };
    const __m512i first = pair(0), second = pair(2);
    _mm512_storeu_si512(scratch.fours + i, _mm512_permutex2var_epi32(first, low, second));
    _mm512_storeu_si512(scratch.fours + i + 8, _mm512_permutex2var_epi32(first, high, second));
  }
  const auto gather = [&](__m256i channels) __attribute__((always_inline)) {
    const __mmask8 real = _mm256_cmpge_epi32_mask(channels, _mm256_setzero_si256());
    return _mm512_castsi512_ps(_mm512_mask_i32gather_epi64(_mm512_setzero_si512(), real, channels,
                                                           scratch.fours, sizeof(uint64_t)));
  };
  for (int64_t i = 0; i < task.layout.channels(); i += mx::kBlock) {
    const Pair channels =
        split(_mm512_loadu_ps(task.order + i), _mm512_loadu_ps(task.order + i + 16));
    for (int odd = 0; odd < 2; ++odd) {
      const __m512i own = _mm512_castps_si512(odd ? channels.odd : channels.even);
      const Pair words =
          split(gather(_mm512_castsi512_si256(own)), gather(_mm512_extracti64x4_epi64(own, 1)));
      _mm512_storeu_ps(scratch.ordered[0] + i + 16 * odd, words.even);
      _mm512_storeu_ps(scratch.ordered[1] + i + 16 * odd, words.odd);
    }
  }
}

// The values of the first or second row of words that hold two.
template <Dtype kDtype>
[[gnu::always_inline]] inline __m512 of_words(const uint32_t* words, bool second) {
  __m512i bits = _mm512_loadu_si512(words);
  if constexpr (kDtype == Dtype::kBFloat16) {
    const __m512i high = _mm512_set1_epi32(static_cast<int32_t>(0xFFFF0000));
    return _mm512_castsi512_ps(second ? _mm512_and_si512(bits, high) : _mm512_slli_epi32(bits, 16));
  }
  if (second) bits = _mm512_srli_epi32(bits, 16);
  return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(bits));
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

// Lane i of the result is the largest lane of x[i].
[[gnu::always_inline]] inline __m512i largest_lanes(const __m512i* x) {
  __m512i quads[4];
#pragma GCC unroll 4
  for (int q = 0; q < 4; ++q) {
    const __m512i a = _mm512_max_epu32(_mm512_unpacklo_epi32(x[4 * q], x[4 * q + 1]),
                                       _mm512_unpackhi_epi32(x[4 * q], x[4 * q + 1]));
    const __m512i b = _mm512_max_epu32(_mm512_unpacklo_epi32(x[4 * q + 2], x[4 * q + 3]),
                                       _mm512_unpackhi_epi32(x[4 * q + 2], x[4 * q + 3]));
    quads[q] = _mm512_max_epu32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
  }
  const auto join = [](__m512i a, __m512i b) __attribute__((always_inline)) {
    return _mm512_max_epu32(_mm512_shuffle_i64x2(a, b, 0x88), _mm512_shuffle_i64x2(a, b, 0xDD));
  };
  return join(join(quads[0], quads[1]), join(quads[2], quads[3]));
}

// The first pass.
template <typename F>
[[gnu::always_inline]] inline void load_row(int64_t blocks, const Scratch& scratch, const F& load) {
  const __m512i magnitude = _mm512_set1_epi32(mx::kFloat32Magnitude);
  for (int64_t group = 0; group < blocks; group += kGroup) {
    __m512i largest[kGroup];
    for (int i = 0; i < kGroup; ++i) {
      const int64_t block = group + i;
      if (block >= blocks) {
        largest[i] = _mm512_setzero_si512();
        continue;
      }
      const Pair pair = load(block);
      _mm512_store_ps(scratch.values + block * mx::kBlock, pair.even);
      _mm512_store_ps(scratch.values + block * mx::kBlock + 16, pair.odd);
      largest[i] = _mm512_max_epu32(_mm512_and_si512(_mm512_castps_si512(pair.even), magnitude),
                                    _mm512_and_si512(_mm512_castps_si512(pair.odd), magnitude));
    }
    _mm512_store_si512(scratch.amax + group, largest_lanes(largest));
  }
}

// The second pass: mx::scale_byte and mx::inverse_scale of a segment's blocks. Returns whether a
// block holds NaN or Inf; its factor is of no use.
bool find_scales(const mx::Segment& segment, const Scratch& scratch, uint8_t* scales) {
  const __m512i increment = _mm512_set1_epi32(mx::scale_increment(segment.format, segment.rule));
  const __m512i emax = _mm512_set1_epi32(segment.format.emax);
  const int64_t end = segment.first_block + segment.blocks;
  __mmask16 any = 0;
  for (int64_t b = segment.first_block; b < end; b += 16) {
    const __mmask16 mask = lanes_before(b, end);
    const __m512i amax = _mm512_maskz_loadu_epi32(mask, scratch.amax + b);
    const __m512i exponent =
        _mm512_srli_epi32(_mm512_add_epi32(amax, increment), mx::kFloat32MantissaBits);
    __m512i scale = _mm512_max_epi32(_mm512_sub_epi32(exponent, emax), _mm512_setzero_si512());
    const __mmask16 nan = _mm512_cmpge_epu32_mask(amax, _mm512_set1_epi32(mx::kFloat32Exponent));
    scale = _mm512_mask_mov_epi32(scale, nan, _mm512_set1_epi32(mx::kNanScale));
    any |= nan;
    _mm512_mask_cvtepi32_storeu_epi8(scales + b, mask, scale);
    const __m512i factor = _mm512_slli_epi32(_mm512_sub_epi32(_mm512_set1_epi32(254), scale),
                                             mx::kFloat32MantissaBits);
    _mm512_mask_storeu_epi32(scratch.factor + b, mask, factor);
  }
  return any != 0;
}

// mx::encode, 16 at a time: one code per 32-bit lane. The terms that encode subtracts from the sum
// have nothing in the bits of a code but a constant, which `anchor` brings along.
template <mx::ElementFormat kFormat>
[[gnu::always_inline]] inline __m512i encode(__m512 x) {
  constexpr int kDropped = mx::kFloat32MantissaBits - kFormat.mantissa_bits;
  constexpr int kSmallestExponent = 1 - kFormat.bias + mx::kFloat32Bias;
  constexpr int kMagnitudeMask = (1 << (kFormat.bits - 1)) - 1;
  constexpr int kOffset =
      -((kDropped + kSmallestExponent) << kFormat.mantissa_bits) & kMagnitudeMask;
  static_assert(kOffset % 2 == 0, "an odd offset would turn ties to odd");
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i magnitude =
      _mm512_min_epu32(_mm512_and_si512(bits, _mm512_set1_epi32(mx::kFloat32Magnitude)),
                       _mm512_set1_epi32(kFormat.largest_bits));
  const __m512i exponent =
      _mm512_max_epu32(_mm512_and_si512(magnitude, _mm512_set1_epi32(mx::kFloat32Exponent)),
                       _mm512_set1_epi32(kSmallestExponent << mx::kFloat32MantissaBits));
  const __m512i anchor = _mm512_add_epi32(
      exponent, _mm512_set1_epi32((kDropped << mx::kFloat32MantissaBits) + kOffset));
  const __m512 sum = _mm512_add_ps(_mm512_castsi512_ps(magnitude), _mm512_castsi512_ps(anchor));
  const __m512i code =
      _mm512_add_epi32(_mm512_castps_si512(sum), _mm512_srli_epi32(anchor, kDropped));
  // The low bits of the code under the sign.
  return _mm512_ternarylogic_epi32(_mm512_set1_epi32(kMagnitudeMask), code,
                                   _mm512_srli_epi32(bits, 32 - kFormat.bits), 0xCA);
}

// Stores the codes of a block, packed.
template <int kBits>
[[gnu::always_inline]] inline void pack(__m512i even, __m512i odd, uint8_t* packed) {
  const __m512i pairs = _mm512_or_si512(even, _mm512_slli_epi32(odd, kBits));
  if constexpr (kBits == 4) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(packed), _mm512_cvtepi32_epi8(pairs));
  } else if constexpr (kBits == 8) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(packed), _mm512_cvtepi32_epi16(pairs));
  } else {
    // Three bytes of each 64 bits.
    const __m512i bytes = _mm512_castsi256_si512(
        _mm256_setr_epi8(0, 1, 2, 8, 9, 10, 16, 17, 18, 24, 25, 26, 32, 33, 34, 40, 41, 42, 48, 49,
                         50, 56, 57, 58, 0, 0, 0, 0, 0, 0, 0, 0));
    const __m512i fours = _mm512_or_si512(pairs, _mm512_srli_epi64(pairs, 20));
    const __m256i result = _mm512_castsi512_si256(_mm512_permutexvar_epi8(bytes, fours));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(packed), _mm256_castsi256_si128(result));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(packed + 16), _mm256_extracti128_si256(result, 1));
  }
}

// The last two passes over a segment. Meanwhile fetches the row at `next`, `block_bytes` a block.
template <mx::ElementFormat kFormat>
void quantize_segment(const mx::Segment& segment, const Scratch& scratch, const uint8_t* next,
                      int64_t block_bytes, uint8_t* data, uint8_t* scales) {
  const bool any_nan = find_scales(segment, scratch, scales);
  uint8_t* packed = data + segment.byte_start;
  for (int64_t b = segment.first_block; b < segment.first_block + segment.blocks; ++b) {
    for (int64_t line = 0; line < block_bytes; line += kLine) {
      _mm_prefetch(next + b * block_bytes + line, _MM_HINT_T0);
    }
    const __m512 factor = _mm512_set1_ps(scratch.factor[b]);
    const float* const values = scratch.values + b * mx::kBlock;
    pack<kFormat.bits>(encode<kFormat>(_mm512_mul_ps(_mm512_load_ps(values), factor)),
                       encode<kFormat>(_mm512_mul_ps(_mm512_load_ps(values + 16), factor)), packed);
    packed += mx::block_bytes(kFormat);
  }
  if (!any_nan) return;
  for (int64_t b = 0; b < segment.blocks; ++b) {
    if (scales[segment.first_block + b] != mx::kNanScale) continue;
    std::memset(data + segment.byte_start + b * mx::block_bytes(kFormat), 0,
                mx::block_bytes(kFormat));
  }
}

// Whether a block's segment is rotated.
[[gnu::always_inline]] inline bool rotated(const mx::MixedLayout& layout, int64_t block) {
  const int64_t channel = block * mx::kBlock;
  return layout.hadamard((channel >= layout.k4) + (channel >= layout.k4 + layout.k6));
}

// A row in float32, where four of them would lie.
template <Dtype kDtype>
const float* widened(const void* row, int64_t k, const Scratch& scratch) {
  float* const floats = reinterpret_cast<float*>(scratch.fours);
  for (int64_t i = 0; i < k; i += 16) {
    _mm512_storeu_ps(floats + i, load_floats(row, kDtype, i, lanes_before(i, k)));
  }
  return floats;
}

// Where the first pass finds a row: of the four that are in order, `number`; or else as it is.
struct Source {
  const void* row;
  int64_t number = -1;
};

// The first pass over a row.
template <Dtype kDtype, bool kRotates>
void load_row(const QuantizeTask& task, const Source& source, const Scratch& scratch) {
  const auto load = [&](const auto& block_at) __attribute__((always_inline)) {
    load_row(task.layout.blocks(), scratch, [&](int64_t b) __attribute__((always_inline)) {
      const Pair values = block_at(b * mx::kBlock);
      if constexpr (kRotates) {
        if (rotated(task.layout, b)) return hadamard(values);
      }
      return values;
    });
  };
  if (!task.order) {
    load([&](int64_t at)
             __attribute__((always_inline)) { return load_block<kDtype>(source.row, at, task.k); });
  } else if (source.number >= 0) {
    load([&](int64_t at) __attribute__((always_inline)) {
      const uint32_t* const words = scratch.ordered[source.number / 2] + at;
      const bool second = source.number % 2 != 0;
      return Pair{of_words<kDtype>(words, second), of_words<kDtype>(words + 16, second)};
    });
  } else {
    const float* floats = static_cast<const float*>(source.row);
    if constexpr (kDtype != Dtype::kFloat32) {
      floats = widened<kDtype>(source.row, task.k, scratch);
    }
    load([&](int64_t at)
             __attribute__((always_inline)) { return gather_block(floats, task.order + at); });
  }
}

template <Dtype kDtype>
void run(const QuantizeTask& task, int64_t first_row, int64_t last_row, void* memory) {
  const mx::MixedLayout& layout = task.layout;
  const Scratch scratch(task, memory);
  constexpr int64_t kElement = kDtype == Dtype::kFloat32 ? sizeof(float) : sizeof(uint16_t);
  constexpr int64_t kBlockBytes = mx::kBlock * kElement;
  const int64_t ordered_rows = task.order && kDtype != Dtype::kFloat32
                                   ? (last_row - first_row) / kRowsTogether * kRowsTogether
                                   : 0;
  const auto at = [&](int64_t r) {
    return static_cast<const uint8_t*>(task.x) + r * task.k * kElement;
  };
  for (int64_t r = first_row; r < last_row; ++r) {
    Source source{at(r)};
    if (r - first_row < ordered_rows) {
      source.number = (r - first_row) % kRowsTogether;
      if (source.number == 0) order_rows(task, reinterpret_cast<const uint16_t*>(at(r)), scratch);
    }
    if (layout.rotates_any()) {
      load_row<kDtype, true>(task, source, scratch);
    } else {
      load_row<kDtype, false>(task, source, scratch);
    }
    // The row after this one, or the same of the next four.
    const int64_t following = r + (source.number < 0 ? 1 : kRowsTogether);
    const uint8_t* const next = at(following < last_row ? following : r);
    uint8_t* const data = task.data + r * layout.row_bytes();
    uint8_t* const scales = task.scales + r * layout.blocks();
    for (const mx::Segment& s : layout.segments()) {
      if (s.format == mx::E2M1)
        quantize_segment<mx::E2M1>(s, scratch, next, kBlockBytes, data, scales);
      if (s.format == mx::E2M3)
        quantize_segment<mx::E2M3>(s, scratch, next, kBlockBytes, data, scales);
      if (s.format == mx::E3M2)
        quantize_segment<mx::E3M2>(s, scratch, next, kBlockBytes, data, scales);
      if (s.format == mx::E4M3)
        quantize_segment<mx::E4M3>(s, scratch, next, kBlockBytes, data, scales);
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
