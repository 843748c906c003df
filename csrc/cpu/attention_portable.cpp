// Attention in plain C++ and float32, a query at a time: for machines without AMX.
#include <algorithm>
#include <cmath>
#include <limits>

#include "attention.h"
#include "convert.h"

namespace micromix::cpu {
namespace {

constexpr float kNone = -std::numeric_limits<float>::infinity();

int64_t prepared_bytes(const AttentionTask&) { return 0; }

int64_t scratch_bytes(const AttentionTask& task) {
  return (task.keys + task.value_size) * static_cast<int64_t>(sizeof(float));
}

int64_t prepare_items(const AttentionTask&) { return 0; }

void prepare(const AttentionTask&, int64_t, int64_t, uint8_t*) {}

int64_t items(const AttentionTask& task) { return task.batches * task.heads * task.queries; }

// What is added to the score of key `k`; -inf leaves it out.
float added(const AttentionTask& task, int64_t mask, int64_t k) {
  if (task.mask_type == MaskType::kNone) return 0;
  if (task.mask_type == MaskType::kBool) {
    return static_cast<const uint8_t*>(task.mask)[mask + k] ? 0 : kNone;
  }
  const bool wide = task.mask_type == MaskType::kFloat32;
  return load_float(task.mask, wide ? Dtype::kFloat32 : Dtype::kBFloat16, mask + k);
}

void run_one(const AttentionTask& task, int64_t b, int64_t h, int64_t q, float* scores) {
  const int64_t g = h / task.heads_of_group();
  const int64_t keys = task.causal ? std::min(task.keys, q + 1) : task.keys;
  const int64_t mask = b * task.mask_batch + h * task.mask_head + q * task.mask_row;
  const uint16_t* const query = task.query.at(b, h, q);
  float* const sums = scores + task.keys;
  float most = kNone;
  for (int64_t k = 0; k < keys; ++k) {
    const float bias = added(task, mask, k);
    scores[k] = kNone;
    if (bias == kNone) continue;
    const uint16_t* const key = task.key.at(b, g, k);
    float sum = 0;
    for (int64_t c = 0; c < task.head_size; ++c) {
      sum += bfloat16_to_float(query[c]) * bfloat16_to_float(key[c]);
    }
    scores[k] = sum * task.scale + bias;
    if (!(scores[k] <= most)) most = scores[k];
  }
  float total = 0;
  std::fill(sums, sums + task.value_size, 0.f);
  for (int64_t k = 0; k < keys && most != kNone; ++k) {
    if (scores[k] == kNone) continue;
    const float weight = std::exp(scores[k] - most);
    const uint16_t* const value = task.value.at(b, g, k);
    total += weight;
    for (int64_t c = 0; c < task.value_size; ++c) sums[c] += weight * bfloat16_to_float(value[c]);
  }
  uint16_t* const out = task.out + ((b * task.queries + q) * task.heads + h) * task.value_size;
  for (int64_t c = 0; c < task.value_size; ++c) {
    out[c] = float_to_bfloat16(total == 0 ? 0 : sums[c] / total);
  }
}

void run(const AttentionTask& task, const uint8_t*, int64_t first, int64_t last, void* scratch) {
  for (int64_t i = first; i < last; ++i) {
    const int64_t q = i % task.queries, row = i / task.queries;
    run_one(task, row / task.heads, row % task.heads, q, static_cast<float*>(scratch));
  }
}

}  // namespace

const AttentionKernel kAttentionPortable = {"portable",    1 << 18, prepared_bytes, scratch_bytes,
                                            prepare_items, items,   prepare,        run};

}  // namespace micromix::cpu
