// Attention, softmax(query . key^T * scale + mask) . value: what a kernel is given and what it
// offers. Like all kernels it knows nothing of torch.
#pragma once

#include <cstdint>

#include "../dtype.h"

namespace micromix::cpu {

// A mask's type. Of kBool, what is false is left out; the others are added to the scores.
enum class MaskType : int { kNone, kBool, kBFloat16, kFloat32 };

// Rows of numbers, each dense. Strides are in elements.
struct AttentionRows {
  const void* data;
  int64_t batch, head, row;

  // `T`: float, or bfloat16's bits.
  template <typename T>
  const T* at(int64_t b, int64_t h, int64_t r) const {
    return static_cast<const T*>(data) + b * batch + h * head + r * row;
  }
};

// `heads` query heads share the keys and values of `groups` heads, in order. Query i sees keys up
// to i where `causal`. A query that sees no key gets zeros.
struct AttentionTask {
  int64_t batches, heads, groups, queries, keys, head_size, value_size;
  Dtype dtype;  // of query, key, value and out: bfloat16 or float32
  AttentionRows query, key, value;
  MaskType mask_type;
  const void* mask;  // [batches, heads, queries, keys], the last stride 1, others in elements
  int64_t mask_batch, mask_head, mask_row;
  bool causal;
  float scale;
  void* out;  // [batches, queries, heads, value_size]

  // The query heads of a group and their queries are the rows that its keys meet, query by query.
  int64_t heads_of_group() const { return heads / groups; }
  int64_t rows_of_group() const { return heads_of_group() * queries; }

  // The rows of the mask that lie in different places, and where one of them begins.
  int64_t mask_rows() const {
    return (mask_batch ? batches : 1) * (mask_head ? heads : 1) * mask_queries();
  }
  int64_t mask_row_at(int64_t i) const {
    const int64_t q = i % mask_queries(), bh = i / mask_queries();
    const int64_t h = mask_head ? bh % heads : 0, b = mask_head ? bh / heads : bh;
    return b * mask_batch + h * mask_head + q * mask_row;
  }
  int64_t mask_queries() const { return mask_row ? queries : 1; }
};

// `seen_keys`, where a kernel has it, says after how many keys no row sees any: the task is given
// to all others with so few. Then `prepare` runs over [0, prepare_items), then `run` over [0,
// items); each range can be split in any way.
struct AttentionKernel {
  const char* name;
  int64_t grain_products;  // work that pays for a second thread
  int64_t (*prepared_bytes)(const AttentionTask&);
  int64_t (*scratch_bytes)(const AttentionTask&);
  int64_t (*prepare_items)(const AttentionTask&);
  int64_t (*items)(const AttentionTask&);
  void (*prepare)(const AttentionTask&, int64_t first, int64_t last, uint8_t* prepared);
  void (*run)(const AttentionTask&, const uint8_t* prepared, int64_t first, int64_t last,
              void* scratch);
  int64_t (*seen_keys)(const AttentionTask&, int64_t first, int64_t last) = nullptr;
};

extern const AttentionKernel kAttentionPortable;
#if defined(MICROMIX_X86)
extern const AttentionKernel kAttentionAvx2;
extern const AttentionKernel kAttentionAvx512;
extern const AttentionKernel kAttentionAmx;  // of bfloat16
#endif

}  // namespace micromix::cpu
