// micromix::attention, scaled dot product attention on the CPU: what a compiled model runs between
// its products.
#include <torch/csrc/stable/library.h>

#include <atomic>
#include <optional>

#include "checks.h"
#include "cpu/isa.h"
#include "cpu/memory.h"

namespace {

using namespace micromix;

cpu::AttentionRows checked_rows(const char* what, Tensor& t, ScalarType type) {
  MICROMIX_CHECK(t.scalar_type() == type && t.is_cpu() && t.dim() == 4,
                 "micromix::attention: ", what,
                 " must be of query's type, [batch, heads, length, size] on the CPU");
  if (t.stride(3) != 1 && t.size(3) > 1) t = dense(t);
  return {t.const_data_ptr(), t.stride(0), t.stride(1), t.stride(2)};
}

// The stride of a dimension that may be broadcast.
int64_t mask_stride(const Tensor& mask, int64_t dimension, int64_t size) {
  MICROMIX_CHECK(mask.size(dimension) == size || mask.size(dimension) == 1,
                 "micromix::attention: size ", dimension, " of mask must be ", size, " or 1; got ",
                 mask.size(dimension));
  return mask.size(dimension) == 1 ? 0 : mask.stride(dimension);
}

void add_mask(cpu::AttentionTask& task, Tensor& mask) {
  MICROMIX_CHECK(mask.is_cpu() && mask.dim() == 4 && mask.size(3) == task.keys,
                 "micromix::attention: mask must be [batch, heads, queries, ", task.keys,
                 "] on the CPU");
  switch (mask.scalar_type()) {
    case ScalarType::Bool:
      task.mask_type = cpu::MaskType::kBool;
      break;
    case ScalarType::BFloat16:
      task.mask_type = cpu::MaskType::kBFloat16;
      break;
    case ScalarType::Float:
      task.mask_type = cpu::MaskType::kFloat32;
      break;
    default:
      MICROMIX_CHECK(false, "micromix::attention: mask must be bool, bfloat16 or float32; got ",
                     torch::headeronly::toString(mask.scalar_type()));
  }
  if (mask.stride(3) != 1 && task.keys > 1) mask = dense(mask);
  task.mask = mask.const_data_ptr();
  task.mask_batch = mask_stride(mask, 0, task.batches);
  task.mask_head = mask_stride(mask, 1, task.heads);
  task.mask_row = mask_stride(mask, 2, task.queries);
}

int64_t seen_keys(const cpu::AttentionKernel& kernel, const cpu::AttentionTask& task) {
  std::atomic<int64_t> most{0};
  parallel(task.mask_rows(), 1 + (1 << 19) / (task.keys + 1), [&](int64_t first, int64_t last) {
    const int64_t seen = kernel.seen_keys(task, first, last);
    int64_t before = most;
    while (seen > before && !most.compare_exchange_weak(before, seen)) {
    }
  });
  return most;
}

void launch(cpu::AttentionTask task) {
  const cpu::AttentionKernel& kernel = cpu::attention_kernel(task);
  if (kernel.seen_keys) task.keys = seen_keys(kernel, task);
  const int64_t channels = task.head_size + task.value_size;
  const auto grain = [&](int64_t items, int64_t products) {
    return items == 0 ? 1 : 1 + kernel.grain_products / (products / items + 1);
  };
  cpu::ThreadBuffer prepared(cpu::Buffer::kPrepared, kernel.prepared_bytes(task));
  const int64_t keys = task.batches * task.groups * task.keys * channels;
  const int64_t blocks = kernel.prepare_items(task), items = kernel.items(task);
  // To pack a number costs as much as some thirty products.
  parallel(blocks, grain(blocks, 32 * keys), [&](int64_t first, int64_t last) {
    kernel.prepare(task, first, last, prepared.data());
  });
  parallel(items, grain(items, keys * task.rows_of_group()), [&](int64_t first, int64_t last) {
    cpu::ThreadBuffer scratch(cpu::Buffer::kScratch, kernel.scratch_bytes(task));
    kernel.run(task, prepared.data(), first, last, scratch.data());
  });
}

Tensor attention(Tensor query, Tensor key, Tensor value, std::optional<Tensor> mask, bool is_causal,
                 double scale) {
  cpu::AttentionTask task{};
  const ScalarType type = query.scalar_type();
  MICROMIX_CHECK(type == ScalarType::BFloat16 || type == ScalarType::Float,
                 "micromix::attention: query must be bfloat16 or float32; got ",
                 torch::headeronly::toString(type));
  task.dtype = type == ScalarType::Float ? Dtype::kFloat32 : Dtype::kBFloat16;
  task.query = checked_rows("query", query, type);
  task.key = checked_rows("key", key, type);
  task.value = checked_rows("value", value, type);
  task.batches = query.size(0);
  task.heads = query.size(1);
  task.queries = query.size(2);
  task.head_size = query.size(3);
  task.groups = key.size(1);
  task.keys = key.size(2);
  task.value_size = value.size(3);
  MICROMIX_CHECK(key.size(0) == task.batches && value.size(0) == task.batches &&
                     value.size(1) == task.groups && value.size(2) == task.keys &&
                     key.size(3) == task.head_size,
                 "micromix::attention: the sizes of query, key and value do not fit together");
  MICROMIX_CHECK(task.groups > 0 && task.heads % task.groups == 0, "micromix::attention: the ",
                 task.heads, " heads of query must be a multiple of the ", task.groups, " of key");
  if (mask) add_mask(task, *mask);
  task.causal = is_causal;
  task.scale = static_cast<float>(scale);

  const int64_t sizes[4] = {task.batches, task.queries, task.heads, task.value_size};
  Tensor out = empty_of(query, sizes, shim_dtype(type));
  task.out = out.mutable_data_ptr();
  if (out.numel() > 0) launch(task);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(micromix, m) {
  m.def(
      "attention(Tensor query, Tensor key, Tensor value, Tensor? mask, bool is_causal, "
      "float scale) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(micromix, CPU, m) { m.impl("attention", TORCH_BOX(&attention)); }
