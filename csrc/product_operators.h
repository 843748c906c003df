// micromix::linear, micromix::weight_only_linear and the overloads of both for several layers, the
// same on every device. `kRun` is the device's own part: it checks the operands and fills in the
// results of the layers.
#pragma once

#include <span>
#include <tuple>

#include "checks.h"

namespace micromix {

// The number of packed rows that a product is given.
inline int64_t checked_rows(const char* op, const Tensor& data, const Tensor& scales,
                            const mx::MixedLayout& layout) {
  MICROMIX_CHECK(data.dim() > 0 && data.size(data.dim() - 1) == layout.row_bytes(),
                 "micromix::", op, ": data must be [..., ", layout.row_bytes(),
                 "], the last dimension is ", data.dim() ? data.size(data.dim() - 1) : 0);
  const int64_t m = rows_of(data);
  bool same = scales.dim() == data.dim() && scales.size(scales.dim() - 1) == layout.blocks();
  for (int64_t i = 0; i + 1 < data.dim() && same; ++i) same = scales.size(i) == data.size(i);
  MICROMIX_CHECK(same, "micromix::", op, ": scales must be [..., ", layout.blocks(),
                 "] with the leading sizes of data");
  return m;
}

using RunProduct = void (*)(const char* op, Tensor data, Tensor scales, std::span<Layer> layers,
                            int64_t k4, int64_t k6, int64_t k8, int64_t format, ScalarType dtype);

template <RunProduct kRun>
Tensor linear(Tensor data, Tensor scales, Tensor weight, std::optional<Tensor> bias, int64_t n,
              int64_t k4, int64_t k6, int64_t k8, int64_t format, ScalarType dtype) {
  Layer layers[] = {{weight, bias, n}};
  kRun("linear", data, scales, std::span<Layer>(layers), k4, k6, k8, format, dtype);
  return *layers[0].result;
}

template <RunProduct kRun>
std::tuple<Tensor, Tensor> linears_two(Tensor data, Tensor scales, Tensor weight0,
                                       std::optional<Tensor> bias0, int64_t n0, Tensor weight1,
                                       std::optional<Tensor> bias1, int64_t n1, int64_t k4,
                                       int64_t k6, int64_t k8, int64_t format, ScalarType dtype) {
  Layer layers[] = {{weight0, bias0, n0}, {weight1, bias1, n1}};
  kRun("linears", data, scales, std::span<Layer>(layers), k4, k6, k8, format, dtype);
  return {*layers[0].result, *layers[1].result};
}

template <RunProduct kRun>
std::tuple<Tensor, Tensor, Tensor> linears_three(Tensor data, Tensor scales, Tensor weight0,
                                                 std::optional<Tensor> bias0, int64_t n0,
                                                 Tensor weight1, std::optional<Tensor> bias1,
                                                 int64_t n1, Tensor weight2,
                                                 std::optional<Tensor> bias2, int64_t n2,
                                                 int64_t k4, int64_t k6, int64_t k8, int64_t format,
                                                 ScalarType dtype) {
  Layer layers[] = {{weight0, bias0, n0}, {weight1, bias1, n1}, {weight2, bias2, n2}};
  kRun("linears", data, scales, std::span<Layer>(layers), k4, k6, k8, format, dtype);
  return {*layers[0].result, *layers[1].result, *layers[2].result};
}

using RunWeightOnly = void (*)(const char* op, Tensor x, std::optional<Tensor> order,
                               std::span<Layer> layers, int64_t k4, int64_t k6, int64_t k8,
                               int64_t format, ScalarType dtype);

template <RunWeightOnly kRun>
Tensor weight_only_linear(Tensor x, std::optional<Tensor> order, Tensor weight,
                          std::optional<Tensor> bias, int64_t n, int64_t k4, int64_t k6, int64_t k8,
                          int64_t format, ScalarType dtype) {
  Layer layers[] = {{weight, bias, n}};
  kRun("weight_only_linear", x, order, std::span<Layer>(layers), k4, k6, k8, format, dtype);
  return *layers[0].result;
}

template <RunWeightOnly kRun>
std::tuple<Tensor, Tensor> weight_only_linears_two(Tensor x, std::optional<Tensor> order,
                                                   Tensor weight0, std::optional<Tensor> bias0,
                                                   int64_t n0, Tensor weight1,
                                                   std::optional<Tensor> bias1, int64_t n1,
                                                   int64_t k4, int64_t k6, int64_t k8,
                                                   int64_t format, ScalarType dtype) {
  Layer layers[] = {{weight0, bias0, n0}, {weight1, bias1, n1}};
  kRun("weight_only_linears", x, order, std::span<Layer>(layers), k4, k6, k8, format, dtype);
  return {*layers[0].result, *layers[1].result};
}

template <RunWeightOnly kRun>
std::tuple<Tensor, Tensor, Tensor> weight_only_linears_three(
    Tensor x, std::optional<Tensor> order, Tensor weight0, std::optional<Tensor> bias0, int64_t n0,
    Tensor weight1, std::optional<Tensor> bias1, int64_t n1, Tensor weight2,
    std::optional<Tensor> bias2, int64_t n2, int64_t k4, int64_t k6, int64_t k8, int64_t format,
    ScalarType dtype) {
  Layer layers[] = {{weight0, bias0, n0}, {weight1, bias1, n1}, {weight2, bias2, n2}};
  kRun("weight_only_linears", x, order, std::span<Layer>(layers), k4, k6, k8, format, dtype);
  return {*layers[0].result, *layers[1].result, *layers[2].result};
}

}  // namespace micromix
