// Quantisation in plain C++.
#include "../mx/hadamard.h"
#include "convert.h"

namespace micromix::cpu {
namespace {

int64_t scratch_bytes(const QuantizeTask& task) { return (task.k + 1) * sizeof(float); }

void quantize_block(float* values, const mx::Segment& segment, uint8_t* data, uint8_t* scale) {
  if (segment.hadamard) mx::hadamard(values);
  uint32_t amax = 0;
  for (int i = 0; i < mx::kBlock; ++i) {
    const uint32_t magnitude = std::bit_cast<uint32_t>(values[i]) & mx::kFloat32Magnitude;
    if (magnitude > amax) amax = magnitude;
  }
  *scale =
      mx::scale_byte(amax, mx::scale_increment(segment.format, segment.rule), segment.format.emax);
  uint8_t codes[mx::kBlock] = {};
  if (*scale != mx::kNanScale) {
    const float factor = mx::inverse_scale(*scale);
    for (int i = 0; i < mx::kBlock; ++i) codes[i] = mx::encode(values[i] * factor, segment.format);
  }
  mx::pack_block(codes, segment.format.bits, data);
}

void run(const QuantizeTask& task, int64_t first_row, int64_t last_row, void* scratch) {
  const mx::MixedLayout& layout = task.layout;
  float* const row = static_cast<float*>(scratch);
  for (int64_t r = first_row; r < last_row; ++r) {
    for (int64_t i = 0; i < task.k; ++i) row[i] = load_float(task.x, task.x_dtype, r * task.k + i);
    row[task.k] = 0.0f;  // what padding channels read
    uint8_t* const data = task.data + r * layout.row_bytes();
    uint8_t* const scales = task.scales + r * layout.blocks();
    for (const mx::Segment& segment : layout.segments()) {
      for (int64_t b = 0; b < segment.blocks; ++b) {
        const int64_t block = segment.first_block + b;
        float values[mx::kBlock];
        for (int i = 0; i < mx::kBlock; ++i) {
          int64_t channel = block * mx::kBlock + i;
          if (task.order) channel = task.order[channel];
          values[i] = row[channel < 0 || channel > task.k ? task.k : channel];
        }
        quantize_block(values, segment,
                       data + segment.byte_start + b * mx::block_bytes(segment.format),
                       scales + block);
      }
    }
  }
}

}  // namespace

const QuantizeKernel kQuantizePortable = {"portable", 1 << 12, 1, scratch_bytes, run};

}  // namespace micromix::cpu
