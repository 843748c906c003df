// micromix:: operators that quantise what they compute: a norm, an activation or a sum, row by row,
// so that the value itself need not go through memory. The numbers are those of the two steps
// apart.
#include <torch/csrc/stable/library.h>

#include <vector>

#include "checks.h"
#include "cpu/isa.h"
#include "cpu/memory.h"
#include "cpu/rows.h"

namespace {

using namespace micromix;
using cpu::RowInput;
using cpu::RowTask;
using Orders = std::vector<std::optional<Tensor>>;
using Layouts = std::vector<int64_t>;  // k4, k6, k8, format of each quantise

const cpu::RowKernels& row_kernels() {
#if defined(MICROMIX_X86)
  if (cpu::current_isa() >= cpu::Isa::kAvx512) return cpu::kRowsAvx512;
  if (cpu::current_isa() >= cpu::Isa::kAvx2) return cpu::kRowsAvx2;
#endif
  return cpu::kRowsPortable;
}

// The rows of `t` [..., K] where they lie, if they are evenly spaced, and of a dense copy
// otherwise.
RowInput rows_where_they_are(const char* op, const char* what, Tensor& t) {
  const int64_t last = t.dim() - 1;
  int64_t stride = last > 0 ? t.stride(last - 1) : 0;
  bool even = t.size(last) <= 1 || t.stride(last) == 1;
  for (int64_t i = last - 1; i > 0 && even; --i)
    even = t.size(i - 1) == 1 || t.stride(i - 1) == t.stride(i) * t.size(i);
  if (!even) {
    t = torch::stable::contiguous(t);
    stride = t.size(last);
  }
  return {t.const_data_ptr(), checked_dtype(op, what, t.scalar_type()), stride};
}

RowInput channel_vector(const char* op, const char* what, std::optional<Tensor>& t, int64_t k) {
  if (!t) return {};
  MICROMIX_CHECK(t->is_cpu() && t->dim() == 1 && t->size(0) == k, "micromix::", op, ": ", what,
                 " must be [", k, "] on the CPU");
  *t = dense(*t);
  return {t->const_data_ptr(), checked_dtype(op, what, t->scalar_type()), 0};
}

void check_same_sizes(const char* op, const char* what, const Tensor& x, const Tensor& other) {
  bool same = other.is_cpu() && other.dim() == x.dim();
  for (int64_t i = 0; i < x.dim() && same; ++i) same = other.size(i) == x.size(i);
  MICROMIX_CHECK(same, "micromix::", op, ": ", what, " must be on the CPU and have x's sizes");
}

int32_t shim_dtype(ScalarType dtype) {
  return torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
}

// Computes rows, stores them where `keep`, and quantises each once for every layout. `results`
// holds what comes before these in the operator's result.
std::vector<Tensor> run(const char* op, cpu::RowKernel kernel, const RowTask& task, const Tensor& x,
                        ScalarType dtype, bool keep, Orders& orders, const Layouts& layouts,
                        std::vector<Tensor> results) {
  MICROMIX_CHECK(layouts.size() == 4 * orders.size(), "micromix::", op,
                 ": layouts must hold k4, k6, k8 and format for each of ", orders.size(),
                 " orders; got ", layouts.size(), " numbers");
  const int64_t k = task.k, rows = rows_of(x);
  void* kept = nullptr;
  if (keep) {
    results.push_back(empty_rows(x, k, shim_dtype(dtype)));
    kept = results.back().mutable_data_ptr();
  }
  const auto store = row_kernels().store;
  const cpu::QuantizeKernel& quantize = cpu::quantize_kernel();
  std::vector<cpu::QuantizeTask> tasks;
  int64_t scratch_bytes = 0, channels = 0;
  for (size_t i = 0; i < orders.size(); ++i) {
    const int64_t* const l = layouts.data() + 4 * i;
    const mx::MixedLayout layout = checked_layout(op, l[0], l[1], l[2], l[3]);
    cpu::QuantizeTask one{layout, nullptr, Dtype::kFloat32, k, nullptr, nullptr, nullptr};
    one.order = checked_order(op, orders[i], layout, k);
    results.push_back(empty_rows(x, layout.row_bytes(), aoti_torch_dtype_uint8()));
    one.data = static_cast<uint8_t*>(results.back().mutable_data_ptr());
    results.push_back(empty_rows(x, layout.blocks(), aoti_torch_dtype_uint8()));
    one.scales = static_cast<uint8_t*>(results.back().mutable_data_ptr());
    const int64_t bytes = quantize.scratch_bytes(one);
    scratch_bytes = bytes > scratch_bytes ? bytes : scratch_bytes;
    channels += layout.channels();
    tasks.push_back(one);
  }
  const int64_t row_bytes = cpu::row_scratch_bytes(k);
  const int64_t grain = 1 + quantize.grain_channels / (channels + k + 1);
  parallel(rows, grain, [&](int64_t first, int64_t last) {
    cpu::ThreadBuffer buffer(cpu::Buffer::kScratch, row_bytes + scratch_bytes);
    auto* const row = reinterpret_cast<float*>(buffer.data());
    for (int64_t r = first; r < last; ++r) {
      kernel(task, r, row, row + k);
      if (kept) store(row, k, task.dtype, kept, r * k);
      for (cpu::QuantizeTask one : tasks) {
        one.x = row;
        one.data += r * one.layout.row_bytes();
        one.scales += r * one.layout.blocks();
        quantize.run(one, 0, 1, buffer.data() + row_bytes);
      }
    }
  });
  return results;
}

// What both norms do before their own: the first results, and the task.
RowTask norm_task(const char* op, Tensor& x, std::optional<Tensor>& residual,
                  std::optional<Tensor>& weight, double eps, ScalarType dtype,
                  std::vector<Tensor>& results) {
  MICROMIX_CHECK(x.dim() > 0, "micromix::", op, ": x needs at least one dimension, the channels");
  RowTask task;
  task.k = x.size(x.dim() - 1);
  task.x = rows_where_they_are(op, "x", x);
  if (residual) {
    check_same_sizes(op, "residual", x, *residual);
    MICROMIX_CHECK(residual->scalar_type() == x.scalar_type(), "micromix::", op,
                   ": residual must have x's type");
    task.second = rows_where_they_are(op, "residual", *residual);
    results.push_back(empty_rows(x, task.k, shim_dtype(x.scalar_type())));
    task.sum = results.back().mutable_data_ptr();
  }
  task.weight = channel_vector(op, "weight", weight, task.k);
  task.eps = static_cast<float>(eps);
  task.dtype = checked_dtype(op, "dtype", dtype);
  return task;
}

std::vector<Tensor> rms_norm_quantize(Tensor x, std::optional<Tensor> residual,
                                      std::optional<Tensor> weight, double eps, int64_t form,
                                      ScalarType dtype, bool keep, Orders orders, Layouts layouts) {
  constexpr const char* kOp = "rms_norm_quantize";
  std::vector<Tensor> results;
  RowTask task = norm_task(kOp, x, residual, weight, eps, dtype, results);
  MICROMIX_CHECK(form >= 0 && form <= 2, "micromix::", kOp, ": form must be 0, 1 or 2; got ", form);
  task.form = static_cast<cpu::RmsForm>(form);
  return run(kOp, row_kernels().rms_norm, task, x, dtype, keep, orders, layouts,
             std::move(results));
}

std::vector<Tensor> layer_norm_quantize(Tensor x, std::optional<Tensor> residual,
                                        std::optional<Tensor> weight, std::optional<Tensor> bias,
                                        double eps, ScalarType dtype, bool keep, Orders orders,
                                        Layouts layouts) {
  constexpr const char* kOp = "layer_norm_quantize";
  std::vector<Tensor> results;
  RowTask task = norm_task(kOp, x, residual, weight, eps, dtype, results);
  task.bias = channel_vector(kOp, "bias", bias, task.k);
  return run(kOp, row_kernels().layer_norm, task, x, dtype, keep, orders, layouts,
             std::move(results));
}

std::vector<Tensor> pointwise_quantize(Tensor x, std::optional<Tensor> other, int64_t function,
                                       ScalarType dtype, bool keep, Orders orders,
                                       Layouts layouts) {
  constexpr const char* kOp = "pointwise_quantize";
  MICROMIX_CHECK(x.dim() > 0, "micromix::", kOp, ": x needs at least one dimension, the channels");
  MICROMIX_CHECK(function >= 0 && function <= 6, "micromix::", kOp,
                 ": function must be 0 to 6; got ", function);
  RowTask task;
  task.k = x.size(x.dim() - 1);
  task.x = rows_where_they_are(kOp, "x", x);
  task.function = static_cast<cpu::Pointwise>(function);
  MICROMIX_CHECK(other || task.function != cpu::Pointwise::kAdd, "micromix::", kOp,
                 ": a sum needs two operands");
  if (other) {
    check_same_sizes(kOp, "other", x, *other);
    task.second = rows_where_they_are(kOp, "other", *other);
  }
  task.dtype = checked_dtype(kOp, "dtype", dtype);
  return run(kOp, row_kernels().pointwise, task, x, dtype, keep, orders, layouts, {});
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(micromix, m) {
  m.def(
      "rms_norm_quantize(Tensor x, Tensor? residual, Tensor? weight, float eps, int form, "
      "ScalarType dtype, bool keep, Tensor?[] orders, int[] layouts) -> Tensor[]");
  m.def(
      "layer_norm_quantize(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, float eps, "
      "ScalarType dtype, bool keep, Tensor?[] orders, int[] layouts) -> Tensor[]");
  m.def(
      "pointwise_quantize(Tensor x, Tensor? other, int function, ScalarType dtype, bool keep, "
      "Tensor?[] orders, int[] layouts) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(micromix, CPU, m) {
  m.impl("rms_norm_quantize", TORCH_BOX(&rms_norm_quantize));
  m.impl("layer_norm_quantize", TORCH_BOX(&layer_norm_quantize));
  m.impl("pointwise_quantize", TORCH_BOX(&pointwise_quantize));
}
