// The product on AVX2 with FMA and F16C. Each tile of the weight is decoded once for up to 32 rows,
// or in registers for one.
//
// E2M1 (x2) and E2M3 (x8) are small integers, so a block's dot product is an exact integer: weights
// are unsigned bytes value + offset, and the sum starts at -offset * (sum of the activations); E2M3
// that meets one row keeps its magnitude, and its sign goes to the activations. All else is
// multiplied in float32: elements of every format become float16 numbers by moving their bits,
// subnormal ones included, and float32 by conversion.
#include "avx2.h"
#include "float_rows.h"

namespace micromix::cpu {
namespace {

using namespace avx2;

constexpr int kMaxRows = 32;  // rows that share a decoded tile

// What makes every element that many times positive: its largest.
constexpr int integer_offset(mx::ElementFormat f) { return f == mx::E2M1 ? 12 : 60; }

// What an element's value is over that of its float16: 2^(15 - bias).
constexpr float float16_factor(mx::ElementFormat format) {
  return mx::scale_value(static_cast<uint8_t>(mx::kFloat32Bias + 15 - format.bias));
}

// A segment that has blocks, and how it is multiplied, which decides how its activations are
// prepared.
struct Part {
  mx::Segment segment;
  mx::ElementFormat weight;
  bool integers;
  int offset;             // of the weight's
  int64_t element_bytes;  // of a prepared block: 32 signed bytes or 32 floats
  float factor;           // activations are multiplied by this when they become floats,
  float rest;             // and products by this, beside the scales

  Part() = default;
  Part(const LinearTask& task, const mx::Segment& of)
      : segment(of), weight(task.layout.weight_format(of)) {
    integers =
        !task.weight_only && mx::is_small_integer(segment.format) && mx::is_small_integer(weight);
    offset = task.m == 1 && weight == mx::E2M3 ? 0 : integer_offset(weight);
    element_bytes = mx::kBlock * (integers ? 1 : sizeof(float));
    factor = float16_factor(weight);
    rest =
        integers ? 1.0f / (mx::integer_factor(segment.format) * mx::integer_factor(weight)) : 1.0f;
  }
};

struct Parts {
  Part list[3];
  int count = 0;

  explicit Parts(const LinearTask& task) {
    for (const mx::Segment& segment : task.layout.segments()) {
      if (segment.blocks) list[count++] = Part(task, segment);
    }
  }
  const Part* begin() const { return list; }
  const Part* end() const { return list + count; }
};

// The low (or, if `odd`, the high) bytes of words, whose lowest bits are codes, to float16.
template <mx::ElementFormat kFormat, bool kOdd = false>
[[gnu::always_inline]] inline __m256i to_float16(__m256i words) {
  // The code goes to the top of its word; from there its sign stays, and the rest moves down.
  constexpr int kUp = (kOdd ? 8 : 16) - kFormat.bits;
  constexpr int kDown = 6 - kFormat.bits + kFormat.mantissa_bits;
  constexpr int kRest = ((1 << (kFormat.bits - 1)) - 1) << (10 - kFormat.mantissa_bits);
  const __m256i top = kUp ? _mm256_slli_epi16(words, kUp) : words;
  return _mm256_and_si256(_mm256_srai_epi16(top, kDown),
                          _mm256_set1_epi16(static_cast<int16_t>(0x8000 | kRest)));
}

// E2M3 codes to 8 times their magnitudes, from the low 4 bits, and a vector in which the top bit of
// a byte is the code's bit 4.
[[gnu::always_inline]] inline __m256i e2m3_magnitudes(__m256i low, __m256i bit4) {
  const __m256i from16 = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(16, 18, 20, 22, 24, 26, 28, 30, 32, 36, 40, 44, 48, 52, 56, 60));
  // Magnitudes up to 15 are their codes.
  return _mm256_blendv_epi8(low, _mm256_shuffle_epi8(from16, low), bit4);
}
// To 8 times their values; the top bits of `sign` are theirs.
[[gnu::always_inline]] inline __m256i e2m3_bytes(__m256i low, __m256i bit4, __m256i sign) {
  return _mm256_sign_epi8(e2m3_magnitudes(low, bit4), _mm256_or_si256(sign, _mm256_set1_epi8(1)));
}

// Where the parts of a prepared row lie. Of each block: a factor, its scale over the integer
// factors; the start of the integer sum; the scale byte, for the exact path. Then the elements, a
// segment's behind the other's: of a block 32 signed bytes, or 32 floats with channels 1 and 2 of
// each four exchanged, the order in which pairs of words come out of a tile.
struct RowLayout {
  int64_t start, scale, elements, bytes;

  RowLayout(const LinearTask& task, const Parts& parts) {
    const int64_t blocks = task.layout.blocks();
    start = round_up(blocks * sizeof(float), kLine);
    scale = 2 * start;
    elements = scale + round_up(blocks, kLine);
    bytes = elements;
    for (const Part& part : parts) bytes += part.segment.blocks * part.element_bytes;
    bytes = round_up(bytes, kLine) | kLine;  // an odd number of lines: rows fall to all cache sets
  }
};

// A prepared row.
struct Prepared {
  float* factor;
  int32_t* start;
  uint8_t* scale;
  uint8_t* elements;

  [[gnu::always_inline]] Prepared(uint8_t* row, const RowLayout& at)
      : factor(reinterpret_cast<float*>(row)),
        start(reinterpret_cast<int32_t*>(row + at.start)),
        scale(row + at.scale),
        elements(row + at.elements) {}
};

int64_t prepared_bytes(const LinearTask& task) {
  return task.m * RowLayout(task, Parts(task)).bytes;
}

// A decoded tile: as unsigned bytes 8 groups of channels x 16 rows of the panel x 4 channels, as
// floats 16 pairs of channels x 16 rows x 2 channels.
struct alignas(kLine) ByteTile {
  uint8_t values[8][2][32];
};
struct alignas(kLine) FloatTile {
  float values[16][4][8];
};
// Sums of a row: of products of integers, 16 rows of the panel; of floats, pairs of them.
struct alignas(kLine) Sums {
  float integers[2][8];
  float pairs[4][8];
};

int64_t scratch_bytes(const LinearTask&) { return kMaxRows * sizeof(Sums); }

[[gnu::always_inline]] inline int32_t sum_lanes(__m256i x) {
  __m128i y = _mm_add_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
  y = _mm_add_epi32(y, _mm_shuffle_epi32(y, 0b01001110));
  return _mm_cvtsi128_si32(_mm_add_epi32(y, _mm_shuffle_epi32(y, 0b10110001)));
}

constexpr int8_t kE2m1Bytes[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
[[gnu::always_inline]] inline __m256i e2m1_table() {
  return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(kE2m1Bytes)));
}

// Stores a block of codes as signed bytes.
template <mx::ElementFormat kFormat>
[[gnu::always_inline]] inline void store_integers(const Prepared& row, int64_t b, __m256i codes,
                                                  int offset, uint8_t* elements) {
  __m256i q;
  if constexpr (kFormat == mx::E2M1) {
    q = _mm256_shuffle_epi8(e2m1_table(), codes);
  } else {
    q = e2m3_bytes(_mm256_and_si256(codes, _mm256_set1_epi8(0xF)), _mm256_slli_epi16(codes, 3),
                   _mm256_slli_epi16(codes, 2));
  }
  _mm256_store_si256(reinterpret_cast<__m256i*>(elements), q);
  const __m256i pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(1), q);
  row.start[b] = -offset * sum_lanes(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

// Stores 8 elements of a block as floats.
[[gnu::always_inline]] inline void store_floats(float* elements, __m256 x, float factor) {
  _mm256_store_ps(elements, _mm256_permute_ps(_mm256_mul_ps(x, _mm256_set1_ps(factor)), 0xD8));
}

// A packed block's codes, one a byte.
template <int kBits>
[[gnu::always_inline]] inline __m256i unpacked(const uint8_t* packed) {
  if constexpr (kBits == 8) return load(packed);
  if constexpr (kBits == 4) {
    const __m128i pairs = _mm_loadu_si128(reinterpret_cast<const __m128i*>(packed));
    const __m128i nibble = _mm_set1_epi8(0xF);
    const __m128i even = _mm_and_si128(pairs, nibble);
    const __m128i odd = _mm_and_si128(_mm_srli_epi16(pairs, 4), nibble);
    return _mm256_set_m128i(_mm_unpackhi_epi8(even, odd), _mm_unpacklo_epi8(even, odd));
  }
  alignas(32) uint8_t codes[mx::kBlock];
  mx::unpack_block(packed, kBits, codes);
  return load(codes);
}

template <mx::ElementFormat kFormat>
[[gnu::always_inline]] inline void prepare_part(const Prepared& row, const Part& part,
                                                const uint8_t* packed, uint8_t* elements) {
  const mx::Segment& segment = part.segment;
  for (int64_t b = segment.first_block; b < segment.first_block + segment.blocks; ++b) {
    const __m256i codes = unpacked<kFormat.bits>(packed);
    if constexpr (mx::is_small_integer(kFormat)) {
      if (part.integers) store_integers<kFormat>(row, b, codes, part.offset, elements);
    }
    if (!part.integers) {
      const float factor = part.factor * float16_factor(kFormat);
      const __m128i bytes[2] = {_mm256_castsi256_si128(codes), _mm256_extracti128_si256(codes, 1)};
      for (int i = 0; i < 2; ++i) {
        const __m256i halves = to_float16<kFormat>(_mm256_cvtepu8_epi16(bytes[i]));
        float* const out = reinterpret_cast<float*>(elements) + 16 * i;
        store_floats(out, _mm256_cvtph_ps(_mm256_castsi256_si128(halves)), factor);
        store_floats(out + 8, _mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1)), factor);
      }
      if constexpr (kFormat == mx::E4M3) {
        const __m256i nan = _mm256_set1_epi8(0x7F);
        const __m256i equal = _mm256_cmpeq_epi8(_mm256_and_si256(codes, nan), nan);
        if (_mm256_movemask_epi8(equal)) row.scale[b] = mx::kNanScale;
      }
    }
    row.factor[b] = mx::scale_value(row.scale[b]) * part.rest;
    packed += mx::block_bytes(kFormat);
    elements += part.element_bytes;
  }
}

// Float activations, block by block over a power of two.
void prepare_floats(const LinearTask& task, int64_t r, const Prepared& row, const Part& part,
                    uint8_t* elements) {
  const mx::Segment& segment = part.segment;
  for (int64_t b = segment.first_block; b < segment.first_block + segment.blocks; ++b) {
    alignas(32) float values[mx::kBlock];
    load_block(task, r, b, segment.hadamard, values);
    row.scale[b] = normalise_block(values);
    row.factor[b] = mx::scale_value(row.scale[b]);
    for (int i = 0; i < mx::kBlock; i += 8) {
      store_floats(reinterpret_cast<float*>(elements) + i, _mm256_load_ps(values + i), part.factor);
    }
    elements += part.element_bytes;
  }
}

void prepare(const LinearTask& task, int64_t first_row, int64_t last_row, uint8_t* prepared) {
  const mx::MixedLayout& layout = task.layout;
  const Parts parts(task);
  const RowLayout at(task, parts);
  for (int64_t r = first_row; r < last_row; ++r) {
    const Prepared row(prepared + r * at.bytes, at);
    uint8_t* elements = row.elements;
    if (!task.weight_only) {
      std::memcpy(row.scale, task.scales + r * layout.blocks(), layout.blocks());
    }
    for (const Part& part : parts) {
      const mx::ElementFormat format = part.segment.format;
      const uint8_t* const packed =
          task.weight_only ? nullptr : task.data + r * layout.row_bytes() + part.segment.byte_start;
      if (task.weight_only) {
        prepare_floats(task, r, row, part, elements);
      } else if (format == mx::E2M1) {
        prepare_part<mx::E2M1>(row, part, packed, elements);
      } else if (format == mx::E2M3) {
        prepare_part<mx::E2M3>(row, part, packed, elements);
      } else if (format == mx::E3M2) {
        prepare_part<mx::E3M2>(row, part, packed, elements);
      } else {
        prepare_part<mx::E4M3>(row, part, packed, elements);
      }
      elements += part.segment.blocks * part.element_bytes;
    }
  }
}

// Of a tile of 4- or 6-bit codes bits 0 to 3, of 4 channels (the group) and half the panel's rows.
[[gnu::always_inline]] inline __m256i low_bits(const uint8_t* tile, int group, int half) {
  const __m256i line = load(tile + group / 2 * kLine + half * 32);
  // Down by a multiplication, 2^12 / 2^16: the ports that shift are those that look up.
  const __m256i nibbles = group % 2 ? _mm256_mulhi_epu16(line, _mm256_set1_epi16(1 << 12)) : line;
  return _mm256_and_si256(nibbles, _mm256_set1_epi8(0xF));
}

// Bits 4 and 5 of 6-bit codes, of which bit 4 comes to bit `to` of its byte; other bits are any.
[[gnu::always_inline]] inline __m256i high_bits(const uint8_t* tile, int group, int half, int to) {
  const __m256i line = load(tile + (4 + group / 4) * kLine + half * 32);
  const int shift = to - 2 * (group % 4);
  return shift < 0 ? _mm256_srli_epi16(line, -shift) : _mm256_slli_epi16(line, shift);
}

// The codes, one a byte.
template <int kBits>
[[gnu::always_inline]] inline __m256i tile_codes(const uint8_t* tile, int group, int half) {
  if constexpr (kBits == 8) return load(tile + group * kLine + half * 32);
  const __m256i low = low_bits(tile, group, half);
  if constexpr (kBits == 4) return low;
  const __m256i high = high_bits(tile, group, half, 4);
  return _mm256_or_si256(low, _mm256_and_si256(high, _mm256_set1_epi8(0x30)));
}

// The values as unsigned bytes, with an offset.
template <int kBits>
[[gnu::always_inline]] inline __m256i unsigned_bytes(const uint8_t* tile, int group, int half) {
  const __m256i offset = _mm256_set1_epi8(integer_offset(kBits == 4 ? mx::E2M1 : mx::E2M3));
  const __m256i low = low_bits(tile, group, half);
  if constexpr (kBits == 4) return _mm256_shuffle_epi8(_mm256_add_epi8(e2m1_table(), offset), low);
  return _mm256_add_epi8(
      e2m3_bytes(low, high_bits(tile, group, half, 7), high_bits(tile, group, half, 6)), offset);
}

// The dot products of a block of activations with 8 rows, group by group. Sums of products stay in
// 16 bits where they fit: of 4-bit weights all, 6-bit activations included; of 6-bit weights the
// pairs of two groups, and with one row, where nothing is added to magnitudes, of four.
template <int kAtOnce>
struct Dot {
  __m256i words, sum;

  [[gnu::always_inline]] void add(int group, __m256i w, __m256i x) {
    const __m256i products = _mm256_maddubs_epi16(w, x);
    words = group % kAtOnce == 0 ? products : _mm256_add_epi16(words, products);
    // Now, and in this order: in the compiler's own they would not fit the registers.
    asm("" : "+x"(words));
    if ((group + 1) % kAtOnce != 0) return;
    const __m256i sums = _mm256_madd_epi16(words, _mm256_set1_epi16(1));
    sum = group < kAtOnce ? sums : _mm256_add_epi32(sum, sums);
  }
  [[gnu::always_inline]] __m256 over(int32_t start) const {
    return _mm256_cvtepi32_ps(_mm256_add_epi32(sum, _mm256_set1_epi32(start)));
  }
};

// The scale bytes of 8 rows of a panel in a block.
[[gnu::always_inline]] inline __m256i half_scales(const uint8_t* scales, int64_t block, int half) {
  return _mm256_cvtepu8_epi32(
      _mm_loadl_epi64(reinterpret_cast<const __m128i*>(scales + block * kTileRows + 8 * half)));
}

// sum + dot * 2^(weight scale + activation scale - 254): see the same in few_rows.h.
template <bool kWide>
[[gnu::always_inline]] inline __m256 scaled_sum(__m256 sum, __m256 dot, __m256i weight_scale,
                                                const Prepared& row, int64_t block, float rest) {
  if constexpr (!kWide) {
    const __m256 power = _mm256_castsi256_ps(_mm256_slli_epi32(weight_scale, 23));
    return _mm256_fmadd_ps(_mm256_mul_ps(dot, power), _mm256_set1_ps(row.factor[block]), sum);
  }
  const int scale = row.scale[block];
  const __m256i power = _mm256_add_epi32(weight_scale, _mm256_set1_epi32(scale - 254));
  const __m256i half = _mm256_srai_epi32(power, 1);
  const auto power_of_two = [](__m256i e) {
    e = _mm256_add_epi32(e, _mm256_set1_epi32(127));
    e = _mm256_min_epi32(_mm256_max_epi32(e, _mm256_setzero_si256()), _mm256_set1_epi32(254));
    return _mm256_castsi256_ps(_mm256_slli_epi32(e, 23));
  };
  __m256 scaled = _mm256_mul_ps(_mm256_mul_ps(dot, _mm256_set1_ps(rest)), power_of_two(half));
  scaled = _mm256_mul_ps(scaled, power_of_two(_mm256_sub_epi32(power, half)));
  const __m256i nan_scale = _mm256_set1_epi32(mx::kNanScale);
  __m256i nan = _mm256_cmpeq_epi32(weight_scale, nan_scale);
  nan = _mm256_or_si256(nan, _mm256_cmpeq_epi32(_mm256_set1_epi32(scale), nan_scale));
  scaled = _mm256_blendv_ps(scaled, _mm256_set1_ps(mx::scale_value(mx::kNanScale)),
                            _mm256_castsi256_ps(nan));
  return _mm256_add_ps(sum, scaled);
}

// The product of a panel with some rows, or of several panels with one: what is known of both.
struct Product {
  const uint8_t* scales = nullptr;  // of the first panel
  const uint8_t* tile = nullptr;    // the next
  int64_t apart = 0;                // bytes from a panel to the next
  const Parts* parts;
  uint8_t* rows;
  RowLayout at;
  int count;             // of rows
  Sums* sums;            // of each row, or of each panel
  int64_t elements = 0;  // where a row's next block lies, from its elements on

  [[gnu::always_inline]] Prepared row(int m) const { return Prepared(rows + m * at.bytes, at); }
};

// A block of several prepared rows. A copy on the stack, so that nothing in a loop over the rows
// has to be read again after each store.
struct Rows {
  uint8_t* first;
  RowLayout at;
  int64_t elements;  // where the block's lie in a row
  Sums* sums;
  int count;

  explicit Rows(const Product& product)
      : first(product.rows),
        at(product.at),
        elements(at.elements + product.elements),
        sums(product.sums),
        count(product.count) {}

  [[gnu::always_inline]] Prepared row(int i) const { return Prepared(first + i * at.bytes, at); }
  [[gnu::always_inline]] const uint8_t* block(int i) const {
    return first + i * at.bytes + elements;
  }
};

// Calls f<n>(rows) for kAtOnce rows, for the next ones, and so on, and for those that are left.
template <int kAtOnce, typename F>
[[gnu::always_inline]] inline void for_each_group(Rows rows, const F& f) {
  for (; rows.count >= kAtOnce; rows.count -= kAtOnce) {
    f.template operator()<kAtOnce>(rows);
    rows.first += kAtOnce * rows.at.bytes;
    rows.sums += kAtOnce;
  }
  if constexpr (kAtOnce > 2) {
    if (rows.count == 2) f.template operator()<2>(rows);
  }
  if (rows.count == 1) f.template operator()<1>(rows);
}

// The products of a decoded tile with kRows rows.
template <int kBits, bool kWide, int kRows>
[[gnu::always_inline]] inline void multiply_bytes(const ByteTile& tile, const __m256i (&scales)[2],
                                                  const Rows& rows, int64_t b, float rest) {
  Dot<kBits == 4 ? 8 : 2> dot[kRows][2];
#pragma GCC unroll 4
  for (int g = 0; g < 8; g += 2) {
    const __m256i w[2][2] = {{load(tile.values[g][0]), load(tile.values[g][1])},
                             {load(tile.values[g + 1][0]), load(tile.values[g + 1][1])}};
#pragma GCC unroll 2
    for (int i = 0; i < kRows; ++i) {
      const int32_t* const q = reinterpret_cast<const int32_t*>(rows.block(i)) + g;
      const __m256i x[2] = {_mm256_set1_epi32(q[0]), _mm256_set1_epi32(q[1])};
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        dot[i][half].add(g, w[0][half], x[0]);
        dot[i][half].add(g + 1, w[1][half], x[1]);
      }
    }
  }
#pragma GCC unroll 2
  for (int i = 0; i < kRows; ++i) {
    const Prepared row = rows.row(i);
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      float* const sum = rows.sums[i].integers[half];
      _mm256_store_ps(sum, scaled_sum<kWide>(_mm256_load_ps(sum), dot[i][half].over(row.start[b]),
                                             scales[half], row, b, rest));
    }
  }
}

// The products of a segment's blocks with several rows. Like the three loops below not inlined:
// each needs all registers.
template <int kBits, bool kWide>
[[gnu::noinline]] void integer_blocks(Product& product, const Part& part) {
  const mx::Segment& segment = part.segment;
  Rows rows(product);
  ByteTile decoded;
  for (int64_t b = segment.first_block; b < segment.first_block + segment.blocks; ++b) {
#pragma GCC unroll 8
    for (int g = 0; g < 8; ++g) {
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        _mm256_store_si256(reinterpret_cast<__m256i*>(decoded.values[g][half]),
                           unsigned_bytes<kBits>(product.tile, g, half));
      }
    }
    const __m256i scales[2] = {half_scales(product.scales, b, 0),
                               half_scales(product.scales, b, 1)};
    for_each_group<2>(rows, [&]<int kRows>(const Rows& some) __attribute__((always_inline)) {
      multiply_bytes<kBits, kWide, kRows>(decoded, scales, some, b, part.rest);
    });
    product.tile += kBits * kLine;
    rows.elements += mx::kBlock;
  }
  product.elements += segment.blocks * mx::kBlock;
}

// With one row, and kPanels panels, all happens in registers, line by line.
template <int kBits, bool kWide, int kPanels>
[[gnu::noinline]] void integer_blocks_of_one_row(Product& product, const Part& part) {
  const mx::Segment& segment = part.segment;
  const Prepared row = product.row(0);
  const int32_t* q = reinterpret_cast<const int32_t*>(row.elements + product.elements);
  const uint8_t* tile = product.tile;
  const uint8_t* const scales = product.scales;
  const int64_t apart = product.apart;
  __m256 sums[kPanels][2];
  for (int p = 0; p < kPanels; ++p) {
    for (int half = 0; half < 2; ++half) {
      sums[p][half] = _mm256_load_ps(product.sums[p].integers[half]);
    }
  }
  for (int64_t b = segment.first_block; b < segment.first_block + segment.blocks; ++b) {
    Dot<kBits == 4 ? 8 : 4> dot[kPanels][2];
#pragma GCC unroll 2
    for (int p = 0; p < kPanels; ++p) fetch_ahead<kBits>(tile + p * apart);
    // The two groups of a line, for all panels, then the next line's.
#pragma GCC unroll 4
    for (int g = 0; g < 8; g += 2) {
      const __m256i x[2] = {_mm256_set1_epi32(q[g]), _mm256_set1_epi32(q[g + 1])};
      const __m256i zero = _mm256_setzero_si256();
      const __m256i negative[2] = {_mm256_sub_epi8(zero, x[0]), _mm256_sub_epi8(zero, x[1])};
#pragma GCC unroll 2
      for (int p = 0; p < kPanels; ++p) {
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
          for (int i = 0; i < 2; ++i) {
            const uint8_t* const from = tile + p * apart;
            if constexpr (kBits == 4) {
              dot[p][half].add(g + i, unsigned_bytes<4>(from, g + i, half), x[i]);
            } else {
              const __m256i w =
                  e2m3_magnitudes(low_bits(from, g + i, half), high_bits(from, g + i, half, 7));
              const __m256i sign = high_bits(from, g + i, half, 6);
              dot[p][half].add(g + i, w, _mm256_blendv_epi8(x[i], negative[i], sign));
            }
          }
        }
      }
    }
#pragma GCC unroll 2
    for (int p = 0; p < kPanels; ++p) {
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        const __m256i scale = half_scales(scales + p * apart, b, half);
        sums[p][half] = scaled_sum<kWide>(sums[p][half], dot[p][half].over(row.start[b]), scale,
                                          row, b, part.rest);
      }
    }
    tile += kBits * kLine;
    q += mx::kBlock / sizeof(int32_t);
  }
  for (int p = 0; p < kPanels; ++p) {
    for (int half = 0; half < 2; ++half) {
      _mm256_store_ps(product.sums[p].integers[half], sums[p][half]);
    }
  }
  product.tile = tile;
  product.elements += segment.blocks * mx::kBlock;
}

// The next tiles of kPanels panels as floats over float16_factor: calls f(panel, pair of channels,
// quarter of the panel, 8 floats). Words 2n + h of half a line are channel c + 2h of row n.
// With several panels they are converted from memory: from registers that takes twice as long, and
// the ports that shift. With one, whose floats are stored, stores would be waited for.
template <mx::ElementFormat kFormat, int kPanels, typename F>
[[gnu::always_inline]] inline void for_each_quarter(const Product& product, const F& f) {
#pragma GCC unroll 8
  for (int g = 0; g < 8; ++g) {
    alignas(32) __m256i words[kPanels][2][2];  // panel, channel of a pair, half
#pragma GCC unroll 2
    for (int p = 0; p < kPanels; ++p) {
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        const __m256i codes = tile_codes<kFormat.bits>(product.tile + p * product.apart, g, half);
        words[p][0][half] = to_float16<kFormat>(codes);
        words[p][1][half] = to_float16<kFormat, true>(codes);
      }
    }
    if constexpr (kPanels > 1) asm("" : "+m"(words));
#pragma GCC unroll 2
    for (int p = 0; p < kPanels; ++p) {
#pragma GCC unroll 2
      for (int odd = 0; odd < 2; ++odd) {
        const __m128i* const quarters = reinterpret_cast<const __m128i*>(words[p][odd]);
#pragma GCC unroll 4
        for (int q = 0; q < 4; ++q) f(p, 2 * g + odd, q, _mm256_cvtph_ps(quarters[q]));
      }
    }
  }
}

// The scale bytes of a panel in a block, each twice, by quarters of the panel.
struct PairScales {
  __m256i quarters[4];

  [[gnu::always_inline]] PairScales(const uint8_t* scales, int64_t b) {
    const __m128i scale = _mm_load_si128(reinterpret_cast<const __m128i*>(scales + b * kTileRows));
    const __m128i low = _mm_unpacklo_epi8(scale, scale), high = _mm_unpackhi_epi8(scale, scale);
    quarters[0] = _mm256_cvtepu8_epi32(low);
    quarters[1] = _mm256_cvtepu8_epi32(_mm_srli_si128(low, 8));
    quarters[2] = _mm256_cvtepu8_epi32(high);
    quarters[3] = _mm256_cvtepu8_epi32(_mm_srli_si128(high, 8));
  }
};

// Adds a block's dot products of one row, a quarter of the panel each, to its sums.
template <bool kWide>
[[gnu::always_inline]] inline void add_pairs(Sums& sums, const __m256* dot,
                                             const PairScales& scales, const Prepared& row,
                                             int64_t b) {
#pragma GCC unroll 4
  for (int q = 0; q < 4; ++q) {
    const __m256 sum = _mm256_load_ps(sums.pairs[q]);
    _mm256_store_ps(sums.pairs[q],
                    scaled_sum<kWide>(sum, dot[q], scales.quarters[q], row, b, 1.0f));
  }
}

// A row's pairs of a block, from its elements on.
[[gnu::always_inline]] inline __m256 broadcast_pair(const uint8_t* elements, int pair) {
  return _mm256_castpd_ps(_mm256_broadcast_sd(reinterpret_cast<const double*>(elements) + pair));
}

// The products of a decoded tile with kRows rows. The sums of three rows and what they are made of
// take all registers.
template <bool kWide, int kRows>
[[gnu::always_inline]] inline void multiply_floats(const FloatTile& tile, const PairScales& scales,
                                                   const Rows& rows, int64_t b) {
  __m256 dot[kRows][4];
#pragma GCC unroll 3
  for (int i = 0; i < kRows; ++i) {
    for (int q = 0; q < 4; ++q) dot[i][q] = _mm256_setzero_ps();
  }
#pragma GCC unroll 4
  for (int pair = 0; pair < 16; ++pair) {
    __m256 x[kRows];
#pragma GCC unroll 3
    for (int i = 0; i < kRows; ++i) x[i] = broadcast_pair(rows.block(i), pair);
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q) {
      __m256 w = _mm256_load_ps(tile.values[pair][q]);
      // One load for all rows: as operands of FMAs they would be what the loop waits for.
      asm("" : "+x"(w));
#pragma GCC unroll 3
      for (int i = 0; i < kRows; ++i) dot[i][q] = _mm256_fmadd_ps(w, x[i], dot[i][q]);
    }
  }
#pragma GCC unroll 3
  for (int i = 0; i < kRows; ++i) add_pairs<kWide>(rows.sums[i], dot[i], scales, rows.row(i), b);
}

template <mx::ElementFormat kFormat, bool kWide>
[[gnu::noinline]] void float_blocks(Product& product, const Part& part) {
  const mx::Segment& segment = part.segment;
  Rows rows(product);
  FloatTile decoded;
  for (int64_t b = segment.first_block; b < segment.first_block + segment.blocks; ++b) {
    for_each_quarter<kFormat, 1>(
        product, [&](int, int pair, int q, __m256 w)
                     [[gnu::always_inline]] { _mm256_store_ps(decoded.values[pair][q], w); });
    const PairScales scales(product.scales, b);
    for_each_group<3>(rows, [&]<int kRows>(const Rows& some) __attribute__((always_inline)) {
      multiply_floats<kWide, kRows>(decoded, scales, some, b);
    });
    product.tile += tile_bytes(kFormat);
    rows.elements += part.element_bytes;
  }
  product.elements += segment.blocks * part.element_bytes;
}

template <mx::ElementFormat kFormat, bool kWide, int kPanels>
[[gnu::noinline]] void float_blocks_of_one_row(Product& product, const Part& part) {
  const mx::Segment& segment = part.segment;
  const Prepared row = product.row(0);
  for (int64_t b = segment.first_block; b < segment.first_block + segment.blocks; ++b) {
    const uint8_t* const elements = row.elements + product.elements;
    __m256 dot[kPanels][4];
    for (int p = 0; p < kPanels; ++p) {
      fetch_ahead<kFormat.bits>(product.tile + p * product.apart);
      for (int q = 0; q < 4; ++q) dot[p][q] = _mm256_setzero_ps();
    }
    for_each_quarter<kFormat, kPanels>(
        product, [&](int p, int pair, int q, __m256 w) [[gnu::always_inline]] {
          dot[p][q] = _mm256_fmadd_ps(w, broadcast_pair(elements, pair), dot[p][q]);
        });
#pragma GCC unroll 2
    for (int p = 0; p < kPanels; ++p) {
      const PairScales scales(product.scales + p * product.apart, b);
      add_pairs<kWide>(product.sums[p], dot[p], scales, row, b);
    }
    product.tile += tile_bytes(kFormat);
    product.elements += part.element_bytes;
  }
}

// kPanels: those that meet one row; 0 where there are several rows and one panel.
template <bool kWide, int kPanels>
void multiply(Product product) {
  for (const Part& part : *product.parts) {
    const auto of_format = [&]<mx::ElementFormat kFormat>() {
      if constexpr (mx::is_small_integer(kFormat)) {
        if (part.integers) {
          if constexpr (kPanels == 0) {
            return integer_blocks<kFormat.bits, kWide>(product, part);
          } else {
            return integer_blocks_of_one_row<kFormat.bits, kWide, kPanels>(product, part);
          }
        }
      }
      if constexpr (kPanels == 0) {
        float_blocks<kFormat, kWide>(product, part);
      } else {
        float_blocks_of_one_row<kFormat, kWide, kPanels>(product, part);
      }
    };
    if (part.weight == mx::E2M1) of_format.template operator()<mx::E2M1>();
    if (part.weight == mx::E2M3) of_format.template operator()<mx::E2M3>();
    if (part.weight == mx::E3M2) of_format.template operator()<mx::E3M2>();
    if (part.weight == mx::E4M3) of_format.template operator()<mx::E4M3>();
  }
}

// Sums of 8 rows of a panel.
[[gnu::always_inline]] inline __m256 half_sums(const Sums& sums, int half) {
  const __m256 pairs = _mm256_hadd_ps(_mm256_load_ps(sums.pairs[2 * half]),
                                      _mm256_load_ps(sums.pairs[2 * half + 1]));
  const __m256d in_order = _mm256_permute4x64_pd(_mm256_castps_pd(pairs), 0b11011000);
  return _mm256_add_ps(_mm256_load_ps(sums.integers[half]), _mm256_castpd_ps(in_order));
}

// Adds the bias, rounds once, and stores what a row has of a panel.
void finish(const LinearTask& task, int64_t row, int64_t panel, const Sums& sums) {
  for (int half = 0; half < 2; ++half) {
    const int64_t first = panel * kTileRows + 8 * half, left = task.n - first;
    __m256 x = half_sums(sums, half);
    if (left >= 8) {
      if (task.bias) x = _mm256_add_ps(x, load_floats(task.bias, task.bias_dtype, first));
      store_eight(task.out, task.out_dtype, row * task.n + first, x);
      continue;
    }
    alignas(32) float values[8];
    _mm256_store_ps(values, x);
    for (int c = 0; c < left; ++c) {
      const float bias = task.bias ? load_float(task.bias, task.bias_dtype, first + c) : 0.0f;
      store_float(task.out, task.out_dtype, row * task.n + first + c, values[c] + bias);
    }
  }
}

// One row takes as long as memory gives the weight, and it gives more to who reads at two places:
// panel i of either half of the range at once.
template <bool kWide>
void run_one_row(const LinearTask& task, Product product, const uint8_t* weight,
                 const PlacedLayout& sizes, int64_t first_panel, int64_t last_panel) {
  const int64_t half = (last_panel - first_panel) / 2;
  product.apart = half * sizes.panel_bytes;
  const auto at_panel = [&](int64_t p) {
    product.scales = weight + p * sizes.panel_bytes;
    product.tile = product.scales + sizes.scale_bytes;
    std::memset(product.sums, 0, 2 * sizeof(Sums));
  };
  for (int64_t p = first_panel; p < first_panel + half; ++p) {
    at_panel(p);
    multiply<kWide, 2>(product);
    finish(task, 0, p, product.sums[0]);
    finish(task, 0, p + half, product.sums[1]);
  }
  if (first_panel + 2 * half < last_panel) {
    at_panel(last_panel - 1);
    multiply<kWide, 1>(product);
    finish(task, 0, last_panel - 1, product.sums[0]);
  }
}

template <bool kWide>
void run_rows(const LinearTask& task, Product product, const uint8_t* weight,
              const PlacedLayout& sizes, int64_t first_panel, int64_t last_panel) {
  uint8_t* const prepared = product.rows;
  // Rows that stay in the second-level cache meet all panels, then the next do. Long rows meet a
  // decoded tile in smaller groups.
  constexpr int64_t kCached = 320 << 10, kFewest = 12;
  const int64_t cached = kCached / product.at.bytes;
  const int64_t group = cached > kMaxRows ? kMaxRows : cached < kFewest ? kFewest : cached;
  const int64_t chunk = cached > group ? cached / group * group : group;
  for (int64_t chunk_start = 0; chunk_start < task.m; chunk_start += chunk) {
    const int64_t chunk_end = chunk_start + chunk < task.m ? chunk_start + chunk : task.m;
    for (int64_t p = first_panel; p < last_panel; ++p) {
      product.scales = weight + p * sizes.panel_bytes;
      product.tile = product.scales + sizes.scale_bytes;
      for (int64_t m = chunk_start; m < chunk_end; m += group) {
        product.rows = prepared + m * product.at.bytes;
        product.count = static_cast<int>(chunk_end - m < group ? chunk_end - m : group);
        std::memset(product.sums, 0, product.count * sizeof(Sums));
        multiply<kWide, 0>(product);
        for (int i = 0; i < product.count; ++i) finish(task, m + i, p, product.sums[i]);
      }
    }
  }
}

void run(const LinearTask& task, const uint8_t* prepared, int64_t first_panel, int64_t last_panel,
         void* scratch_memory) {
  const Parts parts(task);
  const Product product = {
      .parts = &parts,
      .rows = const_cast<uint8_t*>(prepared),
      .at = RowLayout(task, parts),
      .count = 1,
      .sums = static_cast<Sums*>(scratch_memory),
  };
  const bool wide = reinterpret_cast<const PlacedHeader*>(task.weight)->has_wide_scales;
  const auto f = task.m == 1 ? (wide ? run_one_row<true> : run_one_row<false>)
                             : (wide ? run_rows<true> : run_rows<false>);
  f(task, product, task.weight + kLine, PlacedLayout(task.layout, task.n), first_panel, last_panel);
}

}  // namespace

const LinearKernel kLinearAvx2 = {"avx2",        1 << 13, 1 << 18, prepared_bytes,
                                  scratch_bytes, prepare, run};

}  // namespace micromix::cpu
