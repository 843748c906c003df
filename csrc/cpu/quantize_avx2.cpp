// Quantisation on AVX2 with F16C: a row is brought to float32 in the order of the layout, then each
// block of four vectors is scaled, cast and packed.
#include "../mx/hadamard.h"
#include "avx2.h"

namespace micromix::cpu {
namespace {

using namespace avx2;

// Scratch: the row as float32 with a zero after it, then the row in order, with its padding.
int64_t row_floats(const QuantizeTask& task) { return round_up(task.k + 1, 16); }

int64_t scratch_bytes(const QuantizeTask& task) {
  return (row_floats(task) + task.layout.channels()) * static_cast<int64_t>(sizeof(float));
}

void load_row(const QuantizeTask& task, int64_t r, float* row) {
  int64_t i = 0;
  for (; i + 8 <= task.k; i += 8) {
    _mm256_storeu_ps(row + i, load_floats(task.x, task.x_dtype, r * task.k + i));
  }
  for (; i < task.k; ++i) row[i] = load_float(task.x, task.x_dtype, r * task.k + i);
  row[task.k] = 0.0f;
}

void order_row(const QuantizeTask& task, const float* row, float* ordered) {
  const int64_t channels = task.layout.channels();
  if (!task.order) {
    std::memcpy(ordered, row, task.k * sizeof(float));
    std::memset(ordered + task.k, 0, (channels - task.k) * sizeof(float));
    return;
  }
  const __m256i zero_at = _mm256_set1_epi32(static_cast<int>(task.k));
  for (int64_t i = 0; i < channels; i += 8) {
    const __m256i order = load(task.order + i);
    const __m256i index = _mm256_blendv_epi8(order, zero_at, _mm256_srai_epi32(order, 31));
    _mm256_store_ps(ordered + i, _mm256_i32gather_ps(row, index, sizeof(float)));
  }
}

[[gnu::always_inline]] inline uint32_t largest_lane(__m256i x) {
  __m128i y = _mm_max_epu32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
  y = _mm_max_epu32(y, _mm_shuffle_epi32(y, 0b01001110));
  y = _mm_max_epu32(y, _mm_shuffle_epi32(y, 0b10110001));
  return static_cast<uint32_t>(_mm_cvtsi128_si32(y));
}

// Sums and differences of lanes whose numbers differ in one bit: `swapped` is x with them
// exchanged, `high` the lanes where the bit is set.
template <int kHigh>
[[gnu::always_inline]] inline __m256 butterfly(__m256 x, __m256 swapped) {
  return _mm256_blend_ps(_mm256_add_ps(x, swapped), _mm256_sub_ps(swapped, x), kHigh);
}

// mx::hadamard.
[[gnu::always_inline]] inline void hadamard(__m256* x) {
  for (int i = 0; i < 4; ++i) {
    x[i] = butterfly<0b10101010>(x[i], _mm256_permute_ps(x[i], 0b10110001));
    x[i] = butterfly<0b11001100>(x[i], _mm256_permute_ps(x[i], 0b01001110));
    x[i] = butterfly<0b11110000>(x[i], _mm256_permute2f128_ps(x[i], x[i], 0x01));
  }
  const __m256 a = _mm256_add_ps(x[0], x[1]), b = _mm256_sub_ps(x[0], x[1]);
  const __m256 c = _mm256_add_ps(x[2], x[3]), d = _mm256_sub_ps(x[2], x[3]);
  const __m256 norm = _mm256_set1_ps(mx::kHadamardNorm);
  x[0] = _mm256_mul_ps(_mm256_add_ps(a, c), norm);
  x[1] = _mm256_mul_ps(_mm256_add_ps(b, d), norm);
  x[2] = _mm256_mul_ps(_mm256_sub_ps(a, c), norm);
  x[3] = _mm256_mul_ps(_mm256_sub_ps(b, d), norm);
}

// mx::encode, 8 at a time: one code per 32-bit lane.
template <mx::ElementFormat kFormat>
[[gnu::always_inline]] inline __m256i encode(__m256 x) {
  constexpr int kDropped = mx::kFloat32MantissaBits - kFormat.mantissa_bits;
  const __m256i smallest_normal =
      _mm256_set1_epi32((1 - kFormat.bias + mx::kFloat32Bias) << mx::kFloat32MantissaBits);
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i magnitude =
      _mm256_min_epu32(_mm256_and_si256(bits, _mm256_set1_epi32(mx::kFloat32Magnitude)),
                       _mm256_set1_epi32(kFormat.largest_bits));
  const __m256i exponent = _mm256_max_epu32(
      _mm256_and_si256(magnitude, _mm256_set1_epi32(mx::kFloat32Exponent)), smallest_normal);
  const __m256i anchor =
      _mm256_add_epi32(exponent, _mm256_set1_epi32(kDropped << mx::kFloat32MantissaBits));
  const __m256 sum = _mm256_add_ps(_mm256_castsi256_ps(magnitude), _mm256_castsi256_ps(anchor));
  const __m256i steps = _mm256_sub_epi32(_mm256_castps_si256(sum), anchor);
  const __m256i code = _mm256_add_epi32(
      _mm256_srli_epi32(_mm256_sub_epi32(exponent, smallest_normal), kDropped), steps);
  const __m256i sign = _mm256_and_si256(_mm256_srli_epi32(bits, 32 - kFormat.bits),
                                        _mm256_set1_epi32(1 << (kFormat.bits - 1)));
  return _mm256_or_si256(code, sign);
}

// Stores 32 codes, one a byte, packed.
template <int kBits>
[[gnu::always_inline]] inline void pack(__m256i codes, uint8_t* packed) {
  __m128i* const out = reinterpret_cast<__m128i*>(packed);
  if constexpr (kBits == 8) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(packed), codes);
  } else if constexpr (kBits == 4) {
    const __m256i pairs =
        _mm256_maddubs_epi16(codes, _mm256_set1_epi16(0x1001));  // low + 16 * high
    _mm_storeu_si128(
        out, _mm_packus_epi16(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1)));
  } else {
    const __m256i pairs =
        _mm256_maddubs_epi16(codes, _mm256_set1_epi16(0x4001));  // low + 64 * high
    const __m256i fours = _mm256_madd_epi16(pairs, _mm256_set1_epi32(0x10000001));  // + 4096 *
    const __m256i bytes = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, -1, -1, -1, -1));
    const __m256i threes = _mm256_shuffle_epi8(fours, bytes);  // 12 bytes in each half
    alignas(32) uint8_t both[32];
    _mm256_store_si256(reinterpret_cast<__m256i*>(both), threes);
    std::memcpy(packed, both, 12);
    std::memcpy(packed + 12, both + 16, 12);
  }
}

template <mx::ElementFormat kFormat>
void quantize_segment(const mx::Segment& segment, const float* ordered, uint8_t* data,
                      uint8_t* scales) {
  const uint32_t increment = mx::scale_increment(segment.format, segment.rule);
  const __m256i magnitude = _mm256_set1_epi32(mx::kFloat32Magnitude);
  uint8_t* packed = data + segment.byte_start;
  for (int64_t b = segment.first_block; b < segment.first_block + segment.blocks; ++b) {
    const float* const values = ordered + b * mx::kBlock;
    __m256 x[4] = {_mm256_load_ps(values), _mm256_load_ps(values + 8), _mm256_load_ps(values + 16),
                   _mm256_load_ps(values + 24)};
    if (segment.hadamard) hadamard(x);
    __m256i amax = _mm256_setzero_si256();
    for (int i = 0; i < 4; ++i) {
      amax = _mm256_max_epu32(amax, _mm256_and_si256(_mm256_castps_si256(x[i]), magnitude));
    }
    scales[b] = mx::scale_byte(largest_lane(amax), increment, kFormat.emax);
    if (scales[b] == mx::kNanScale) {
      std::memset(packed, 0, mx::block_bytes(kFormat));
    } else {
      const __m256 factor = _mm256_set1_ps(mx::inverse_scale(scales[b]));
      __m256i codes[4];
      for (int i = 0; i < 4; ++i) codes[i] = encode<kFormat>(_mm256_mul_ps(x[i], factor));
      // Packing works on 128-bit halves: the dwords of the result are put in order at the end.
      const __m256i bytes = _mm256_packus_epi16(_mm256_packus_epi32(codes[0], codes[1]),
                                                _mm256_packus_epi32(codes[2], codes[3]));
      const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
      pack<kFormat.bits>(_mm256_permutevar8x32_epi32(bytes, order), packed);
    }
    packed += mx::block_bytes(kFormat);
  }
}

void run(const QuantizeTask& task, int64_t first_row, int64_t last_row, void* scratch) {
  const mx::MixedLayout& layout = task.layout;
  float* const row = static_cast<float*>(scratch);
  float* const ordered = row + row_floats(task);
  for (int64_t r = first_row; r < last_row; ++r) {
    load_row(task, r, row);
    order_row(task, row, ordered);
    uint8_t* const data = task.data + r * layout.row_bytes();
    uint8_t* const scales = task.scales + r * layout.blocks();
    for (const mx::Segment& s : layout.segments()) {
      if (s.format == mx::E2M1) quantize_segment<mx::E2M1>(s, ordered, data, scales);
      if (s.format == mx::E2M3) quantize_segment<mx::E2M3>(s, ordered, data, scales);
      if (s.format == mx::E3M2) quantize_segment<mx::E3M2>(s, ordered, data, scales);
      if (s.format == mx::E4M3) quantize_segment<mx::E4M3>(s, ordered, data, scales);
    }
  }
}

}  // namespace

const QuantizeKernel kQuantizeAvx2 = {"avx2", 1 << 14, 1, scratch_bytes, run};

}  // namespace micromix::cpu
