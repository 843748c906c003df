// The operators that quantise what they compute: the checks of their arguments and the allocation
// of their results, the same on every device. `kRun` is the device's own part: it computes `rows`
// rows of a task and quantises each for every output.
#pragma once

#include <vector>

#include "checks.h"
#include "rows.h"

namespace micromix {

using Orders = std::vector<std::optional<Tensor>>;
using Layouts = std::vector<int64_t>;  // k4, k6, k8, format of each quantise
using RunRows = void (*)(const Tensor& x, const RowTask&, int64_t rows,
                         const std::vector<RowOutput>&);

// The rows of `t` [..., K] where they lie, if they are evenly spaced, and of a dense copy
// otherwise.
inline RowInput rows_where_they_are(const char* op, const char* what, Tensor& t) {
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

inline RowInput channel_vector(const char* op, const char* what, const Tensor& x,
                               std::optional<Tensor>& t, int64_t k) {
  if (!t) return {};
  MICROMIX_CHECK(same_device(*t, x) && t->dim() == 1 && t->size(0) == k, "micromix::", op, ": ",
                 what, " must be [", k, "], on the device of x");
  *t = dense(*t);
  return {t->const_data_ptr(), checked_dtype(op, what, t->scalar_type()), 0};
}

inline void check_same_sizes(const char* op, const char* what, const Tensor& x,
                             const Tensor& other) {
  bool same = same_device(other, x) && other.dim() == x.dim();
  for (int64_t i = 0; i < x.dim() && same; ++i) same = other.size(i) == x.size(i);
  MICROMIX_CHECK(same, "micromix::", op, ": ", what,
                 " must be on the device of x and have x's sizes");
}

inline int32_t shim_dtype(ScalarType dtype) {
  return torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
}

// The task of x alone.
inline RowTask row_task(const char* op, RowFunction function, Tensor& x, ScalarType dtype) {
  MICROMIX_CHECK(x.dim() > 0, "micromix::", op, ": x needs at least one dimension, the channels");
  RowTask task;
  task.row_function = function;
  task.k = x.size(x.dim() - 1);
  task.x = rows_where_they_are(op, "x", x);
  task.dtype = checked_dtype(op, "dtype", dtype);
  return task;
}

// One quantise of a task; its results are appended to `results`. `order` is made dense in place.
inline RowOutput row_output(const char* op, const Tensor& x, int64_t k,
                            std::optional<Tensor>& order, const mx::MixedLayout& layout,
                            std::vector<Tensor>& results) {
  RowOutput output{layout, checked_order(op, x, order, layout, k), nullptr, nullptr};
  results.push_back(empty_rows(x, layout.row_bytes(), aoti_torch_dtype_uint8()));
  output.data = static_cast<uint8_t*>(results.back().mutable_data_ptr());
  results.push_back(empty_rows(x, layout.blocks(), aoti_torch_dtype_uint8()));
  output.scales = static_cast<uint8_t*>(results.back().mutable_data_ptr());
  return output;
}

// Allocates the results of a task and runs it. `results` holds what comes before these in the
// operator's result.
template <RunRows kRun>
std::vector<Tensor> run_rows(const char* op, RowTask task, const Tensor& x, ScalarType dtype,
                             bool keep, Orders& orders, const Layouts& layouts,
                             std::vector<Tensor> results) {
  MICROMIX_CHECK(layouts.size() == 4 * orders.size(), "micromix::", op,
                 ": layouts must hold k4, k6, k8 and format for each of ", orders.size(),
                 " orders; got ", layouts.size(), " numbers");
  if (keep) {
    results.push_back(empty_rows(x, task.k, shim_dtype(dtype)));
    task.kept = results.back().mutable_data_ptr();
  }
  std::vector<RowOutput> outputs;
  for (size_t i = 0; i < orders.size(); ++i) {
    const int64_t* const l = layouts.data() + 4 * i;
    const mx::MixedLayout layout = checked_layout(op, l[0], l[1], l[2], l[3]);
    outputs.push_back(row_output(op, x, task.k, orders[i], layout, results));
  }
  const int64_t rows = rows_of(x);
  if (rows > 0) kRun(x, task, rows, outputs);
  return results;
}

// What both norms do before their own: the first results, and the task.
inline RowTask norm_task(const char* op, RowFunction function, Tensor& x,
                         std::optional<Tensor>& residual, std::optional<Tensor>& weight, double eps,
                         ScalarType dtype, std::vector<Tensor>& results) {
  RowTask task = row_task(op, function, x, dtype);
  if (residual) {
    check_same_sizes(op, "residual", x, *residual);
    MICROMIX_CHECK(residual->scalar_type() == x.scalar_type(), "micromix::", op,
                   ": residual must have x's type");
    task.second = rows_where_they_are(op, "residual", *residual);
    results.push_back(empty_rows(x, task.k, shim_dtype(x.scalar_type())));
    task.sum = results.back().mutable_data_ptr();
  }
  task.weight = channel_vector(op, "weight", x, weight, task.k);
  task.eps = static_cast<float>(eps);
  return task;
}

template <RunRows kRun>
std::vector<Tensor> rms_norm_quantize(Tensor x, std::optional<Tensor> residual,
                                      std::optional<Tensor> weight, double eps, int64_t form,
                                      ScalarType dtype, bool keep, Orders orders, Layouts layouts) {
  constexpr const char* kOp = "rms_norm_quantize";
  std::vector<Tensor> results;
  RowTask task = norm_task(kOp, RowFunction::kRmsNorm, x, residual, weight, eps, dtype, results);
  MICROMIX_CHECK(form >= 0 && form <= 2, "micromix::", kOp, ": form must be 0, 1 or 2; got ", form);
  task.form = static_cast<RmsForm>(form);
  return run_rows<kRun>(kOp, task, x, dtype, keep, orders, layouts, std::move(results));
}

template <RunRows kRun>
std::vector<Tensor> layer_norm_quantize(Tensor x, std::optional<Tensor> residual,
                                        std::optional<Tensor> weight, std::optional<Tensor> bias,
                                        double eps, ScalarType dtype, bool keep, Orders orders,
                                        Layouts layouts) {
  constexpr const char* kOp = "layer_norm_quantize";
  std::vector<Tensor> results;
  RowTask task = norm_task(kOp, RowFunction::kLayerNorm, x, residual, weight, eps, dtype, results);
  task.bias = channel_vector(kOp, "bias", x, bias, task.k);
  return run_rows<kRun>(kOp, task, x, dtype, keep, orders, layouts, std::move(results));
}

template <RunRows kRun>
std::vector<Tensor> pointwise_quantize(Tensor x, std::optional<Tensor> other, int64_t function,
                                       ScalarType dtype, bool keep, Orders orders,
                                       Layouts layouts) {
  constexpr const char* kOp = "pointwise_quantize";
  RowTask task = row_task(kOp, RowFunction::kPointwise, x, dtype);
  MICROMIX_CHECK(function >= 0 && function <= 6, "micromix::", kOp,
                 ": function must be 0 to 6; got ", function);
  task.function = static_cast<Pointwise>(function);
  MICROMIX_CHECK(other || task.function != Pointwise::kAdd, "micromix::", kOp,
                 ": a sum needs two operands");
  if (other) {
    check_same_sizes(kOp, "other", x, *other);
    task.second = rows_where_they_are(kOp, "other", *other);
  }
  return run_rows<kRun>(kOp, task, x, dtype, keep, orders, layouts, {});
}

}  // namespace micromix
