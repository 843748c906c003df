// The product in plain C++, for machines without AVX2 and as the plain statement of the others.
#include "float_rows.h"

namespace micromix::cpu {
namespace {

constexpr int kRows = 16;  // activation rows that share one decoded tile

// A prepared row: the elements as float32, unscaled, then one exponent per block. A block that is
// NaN has NaN elements.
int64_t prepared_row_bytes(const mx::MixedLayout& layout) {
  return layout.channels() * sizeof(float) + layout.blocks() * sizeof(int32_t);
}

int64_t prepared_bytes(const LinearTask& task) { return task.m * prepared_row_bytes(task.layout); }

int64_t scratch_bytes(const LinearTask&) { return 0; }

void prepare_floats(const LinearTask& task, int64_t first_row, int64_t last_row,
                    uint8_t* prepared) {
  const mx::MixedLayout& layout = task.layout;
  for (int64_t r = first_row; r < last_row; ++r) {
    float* const values = reinterpret_cast<float*>(prepared + r * prepared_row_bytes(layout));
    int32_t* const exponents = reinterpret_cast<int32_t*>(values + layout.channels());
    for (const mx::Segment& segment : layout.segments()) {
      for (int64_t b = segment.first_block; b < segment.first_block + segment.blocks; ++b) {
        load_block(task, r, b, segment.hadamard, values + b * mx::kBlock);
        exponents[b] = normalise_block(values + b * mx::kBlock) - mx::kFloat32Bias;
      }
    }
  }
}

void prepare(const LinearTask& task, int64_t first_row, int64_t last_row, uint8_t* prepared) {
  if (task.weight_only) return prepare_floats(task, first_row, last_row, prepared);
  const mx::MixedLayout& layout = task.layout;
  for (int64_t r = first_row; r < last_row; ++r) {
    float* const values = reinterpret_cast<float*>(prepared + r * prepared_row_bytes(layout));
    int32_t* const exponents = reinterpret_cast<int32_t*>(values + layout.channels());
    const uint8_t* const data = task.data + r * layout.row_bytes();
    const uint8_t* const scales = task.scales + r * layout.blocks();
    for (const mx::Segment& segment : layout.segments()) {
      for (int64_t b = 0; b < segment.blocks; ++b) {
        const int64_t block = segment.first_block + b;
        uint8_t codes[mx::kBlock];
        mx::unpack_block(data + segment.byte_start + b * mx::block_bytes(segment.format),
                         segment.format.bits, codes);
        const bool nan = scales[block] == mx::kNanScale;
        for (int k = 0; k < mx::kBlock; ++k) {
          values[block * mx::kBlock + k] =
              nan ? mx::scale_value(mx::kNanScale) : mx::decode(codes[k], segment.format);
        }
        exponents[block] = scales[block] - mx::kFloat32Bias;
      }
    }
  }
}

float power_of_two(int exponent) {  // exponent in [-127, 127]
  return mx::scale_value(static_cast<uint8_t>(exponent + mx::kFloat32Bias));
}

void decode_tile(const uint8_t* tile, mx::ElementFormat format, float (*values)[kTileRows]) {
  float table[256];
  for (int code = 0; code < 1 << format.bits; ++code) {
    table[code] = mx::decode(static_cast<uint8_t>(code), format);
  }
  for (int k = 0; k < mx::kBlock; ++k) {
    for (int n = 0; n < kTileRows; ++n) values[k][n] = table[tile_code(tile, format.bits, n, k)];
  }
}

void run_rows(const LinearTask& task, const uint8_t* prepared, const uint8_t* panel,
              int64_t scale_bytes, int64_t first_row, int rows, float (*sums)[kTileRows]) {
  const mx::MixedLayout& layout = task.layout;
  const uint8_t* tile = panel + scale_bytes;
  for (const mx::Segment& segment : layout.segments()) {
    const mx::ElementFormat format = layout.weight_format(segment);
    for (int64_t b = 0; b < segment.blocks; ++b, tile += tile_bytes(format)) {
      const int64_t block = segment.first_block + b;
      float weights[mx::kBlock][kTileRows];
      decode_tile(tile, format, weights);
      const uint8_t* const scales = panel + block * kTileRows;
      for (int m = 0; m < rows; ++m) {
        const float* const values =
            reinterpret_cast<const float*>(prepared + (first_row + m) * prepared_row_bytes(layout));
        const int exponent = reinterpret_cast<const int32_t*>(values + layout.channels())[block];
        float dot[kTileRows] = {};
        for (int k = 0; k < mx::kBlock; ++k) {
          for (int n = 0; n < kTileRows; ++n) {
            dot[n] += values[block * mx::kBlock + k] * weights[k][n];
          }
        }
        for (int n = 0; n < kTileRows; ++n) {
          // The two halves of the power are normal or harmless where their product is not.
          const int power = exponent + scales[n] - mx::kFloat32Bias;
          const float scaled = dot[n] * power_of_two(power / 2) * power_of_two(power - power / 2);
          sums[m][n] += scales[n] == mx::kNanScale ? mx::scale_value(mx::kNanScale) : scaled;
        }
      }
    }
  }
}

void run(const LinearTask& task, const uint8_t* prepared, int64_t first_panel, int64_t last_panel,
         void*) {
  const PlacedLayout sizes(task.layout, task.n);
  for (int64_t p = first_panel; p < last_panel; ++p) {
    const uint8_t* const panel = task.weight + kLine + p * sizes.panel_bytes;
    const int columns =
        static_cast<int>(task.n - p * kTileRows < kTileRows ? task.n - p * kTileRows : kTileRows);
    for (int64_t m0 = 0; m0 < task.m; m0 += kRows) {
      const int rows = static_cast<int>(task.m - m0 < kRows ? task.m - m0 : kRows);
      float sums[kRows][kTileRows] = {};
      run_rows(task, prepared, panel, sizes.scale_bytes, m0, rows, sums);
      for (int m = 0; m < rows; ++m) {
        for (int c = 0; c < columns; ++c) {
          const int64_t n = p * kTileRows + c;
          const float bias = task.bias ? load_float(task.bias, task.bias_dtype, n) : 0.0f;
          store_float(task.out, task.out_dtype, (m0 + m) * task.n + n, sums[m][c] + bias);
        }
      }
    }
  }
}

}  // namespace

const LinearKernel kLinearPortable = {"portable",    1 << 14, 1 << 16, prepared_bytes,
                                      scratch_bytes, prepare, run};

}  // namespace micromix::cpu
