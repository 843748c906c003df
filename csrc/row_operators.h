// The operators that quantise what they compute: the checks of their arguments and the allocation
// of their results, the same on every device. `kRun` is the device's own part: it computes `rows`
// rows of a task and quantises them.
//
// No operator takes or returns a list, which Inductor's C++ wrapper could not call without Python.
// So each has a fixed number of results, and one that was not asked for is empty.
#pragma once

#include <tuple>

#include "checks.h"
#include "rows.h"

namespace micromix {

using RunRows = void (*)(const Tensor& x, const RowTask&, int64_t rows, const RowOutput&);

// The rows of `t` [..., K] where they lie, if they are evenly spaced, and of a dense copy
// otherwise.
inline RowInput rows_where_they_are(const char* op, const char* what, Tensor& t) {
  const int64_t last = t.dim() - 1;
  int64_t stride = 0, rows = 1;
  bool even = t.size(last) <= 1 || t.stride(last) == 1;
  for (int64_t i = last - 1; i >= 0 && even; --i) {
    if (t.size(i) == 1) continue;  // its stride says nothing
    if (rows == 1) stride = t.stride(i);
    even = t.stride(i) == stride * rows;
    rows *= t.size(i);
  }
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

// Rows like x's for a result that was asked for, with their memory in `data`; else a tensor [0].
inline Tensor if_asked_for(bool asked, const Tensor& x, int64_t k, ScalarType dtype, void*& data) {
  if (!asked) return empty_vector(x, 0, shim_dtype(dtype));
  Tensor rows = empty_rows(x, k, shim_dtype(dtype));
  data = rows.mutable_data_ptr();
  return rows;
}

// Runs a task: data and scales.
template <RunRows kRun>
std::tuple<Tensor, Tensor> quantise_rows(const char* op, const RowTask& task, const Tensor& x,
                                         std::optional<Tensor>& order, int64_t k4, int64_t k6,
                                         int64_t k8, int64_t format) {
  const mx::MixedLayout layout = checked_layout(op, k4, k6, k8, format);
  const int32_t* const channels = checked_order(op, x, order, layout, task.k);
  Tensor data = empty_rows(x, layout.row_bytes(), aoti_torch_dtype_uint8());
  Tensor scales = empty_rows(x, layout.blocks(), aoti_torch_dtype_uint8());
  const int64_t rows = rows_of(x);
  if (rows > 0) {
    kRun(x, task, rows,
         {layout, channels, static_cast<uint8_t*>(data.mutable_data_ptr()),
          static_cast<uint8_t*>(scales.mutable_data_ptr())});
  }
  return {data, scales};
}

// What both norms do before their own.
inline RowTask norm_task(const char* op, RowFunction function, Tensor& x,
                         std::optional<Tensor>& residual, std::optional<Tensor>& weight, double eps,
                         ScalarType dtype) {
  RowTask task = row_task(op, function, x, dtype);
  if (residual) {
    check_same_sizes(op, "residual", x, *residual);
    MICROMIX_CHECK(residual->scalar_type() == x.scalar_type(), "micromix::", op,
                   ": residual must have x's type");
    task.second = rows_where_they_are(op, "residual", *residual);
  }
  task.weight = channel_vector(op, "weight", x, weight, task.k);
  task.eps = static_cast<float>(eps);
  return task;
}

// What both norms do after their own: sum, y, data and scales.
template <RunRows kRun>
std::tuple<Tensor, Tensor, Tensor, Tensor> quantise_norm(const char* op, RowTask& task,
                                                         const Tensor& x, bool has_sum,
                                                         ScalarType dtype, bool keep,
                                                         std::optional<Tensor>& order, int64_t k4,
                                                         int64_t k6, int64_t k8, int64_t format) {
  Tensor sum = if_asked_for(has_sum, x, task.k, x.scalar_type(), task.sum);
  Tensor y = if_asked_for(keep, x, task.k, dtype, task.kept);
  const auto [data, scales] = quantise_rows<kRun>(op, task, x, order, k4, k6, k8, format);
  return {sum, y, data, scales};
}

template <RunRows kRun>
std::tuple<Tensor, Tensor, Tensor, Tensor> rms_norm_quantize(
    Tensor x, std::optional<Tensor> residual, std::optional<Tensor> weight, double eps,
    int64_t form, ScalarType dtype, bool keep, std::optional<Tensor> order, int64_t k4, int64_t k6,
    int64_t k8, int64_t format) {
  constexpr const char* kOp = "rms_norm_quantize";
  RowTask task = norm_task(kOp, RowFunction::kRmsNorm, x, residual, weight, eps, dtype);
  MICROMIX_CHECK(form >= 0 && form <= 2, "micromix::", kOp, ": form must be 0, 1 or 2; got ", form);
  task.form = static_cast<RmsForm>(form);
  return quantise_norm<kRun>(kOp, task, x, residual.has_value(), dtype, keep, order, k4, k6, k8,
                             format);
}

template <RunRows kRun>
std::tuple<Tensor, Tensor, Tensor, Tensor> layer_norm_quantize(
    Tensor x, std::optional<Tensor> residual, std::optional<Tensor> weight,
    std::optional<Tensor> bias, double eps, ScalarType dtype, bool keep,
    std::optional<Tensor> order, int64_t k4, int64_t k6, int64_t k8, int64_t format) {
  constexpr const char* kOp = "layer_norm_quantize";
  RowTask task = norm_task(kOp, RowFunction::kLayerNorm, x, residual, weight, eps, dtype);
  task.bias = channel_vector(kOp, "bias", x, bias, task.k);
  return quantise_norm<kRun>(kOp, task, x, residual.has_value(), dtype, keep, order, k4, k6, k8,
                             format);
}

template <RunRows kRun>
std::tuple<Tensor, Tensor, Tensor> pointwise_quantize(Tensor x, std::optional<Tensor> other,
                                                      int64_t function, ScalarType dtype, bool keep,
                                                      std::optional<Tensor> order, int64_t k4,
                                                      int64_t k6, int64_t k8, int64_t format) {
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
  Tensor y = if_asked_for(keep, x, task.k, dtype, task.kept);
  const auto [data, scales] = quantise_rows<kRun>(kOp, task, x, order, k4, k6, k8, format);
  return {y, data, scales};
}

}  // namespace micromix
