// The micromix:: operators: their schemas, the checks of their arguments, and their CPU kernels.
// LibTorch stable ABI only, so that one library serves every torch from 2.11 on.
#include <torch/csrc/stable/library.h>

#include <atomic>
#include <optional>
#include <span>
#include <string>
#include <tuple>

#include "abi.h"
#include "cpu/isa.h"
#include "cpu/memory.h"
#include "product_operators.h"

namespace {

using namespace micromix;

std::tuple<Tensor, Tensor> quantize(Tensor x, std::optional<Tensor> order, int64_t k4, int64_t k6,
                                    int64_t k8, int64_t format) {
  const mx::MixedLayout layout = checked_layout("quantize", k4, k6, k8, format);
  MICROMIX_CHECK(x.dim() > 0, "micromix::quantize: x needs at least one dimension, the channels");
  const Dtype dtype = checked_dtype("quantize", "x", x.scalar_type());
  const int64_t k = x.size(x.dim() - 1), rows = rows_of(x);
  x = dense(x);

  micromix::cpu::QuantizeTask task{layout, x.const_data_ptr(), dtype, k, nullptr, nullptr, nullptr};
  task.order = checked_order("quantize", x, order, layout, k);

  Tensor data = empty_rows(x, layout.row_bytes(), aoti_torch_dtype_uint8());
  Tensor scales = empty_rows(x, layout.blocks(), aoti_torch_dtype_uint8());
  task.data = static_cast<uint8_t*>(data.mutable_data_ptr());
  task.scales = static_cast<uint8_t*>(scales.mutable_data_ptr());
  const micromix::cpu::QuantizeKernel& kernel = micromix::cpu::quantize_kernel();
  const int64_t grain = 1 + kernel.grain_channels / (layout.channels() + 1);
  parallel(rows, grain, [&](int64_t first, int64_t last) {
    micromix::cpu::ThreadBuffer scratch(micromix::cpu::Buffer::kScratch,
                                        kernel.scratch_bytes(task));
    kernel.run(task, first, last, scratch.data());
  });
  return {data, scales};
}

Tensor place_weight(Tensor data, Tensor scales, int64_t k4, int64_t k6, int64_t k8,
                    int64_t format) {
  const mx::MixedLayout layout = checked_layout("place_weight", k4, k6, k8, format);
  const mx::MixedLayout own = layout.weight();
  check_bytes("place_weight", "data", data);
  check_bytes("place_weight", "scales", scales);
  MICROMIX_CHECK(data.dim() == 2 && data.size(1) == own.row_bytes(),
                 "micromix::place_weight: data must be [N, ", own.row_bytes(), "]; got ",
                 data.dim(), " dimensions, the last of ",
                 data.dim() ? data.size(data.dim() - 1) : 0);
  MICROMIX_CHECK(
      scales.dim() == 2 && scales.size(0) == data.size(0) && scales.size(1) == own.blocks(),
      "micromix::place_weight: scales must be [", data.size(0), ", ", own.blocks(), "]");
  data = dense(data);
  scales = dense(scales);

  const int64_t n = data.size(0);
  const micromix::cpu::PlacedLayout sizes(layout, n);
  uint8_t* const placed = micromix::cpu::allocate_weight(sizes.bytes());
  const int64_t size[1] = {sizes.bytes()}, stride[1] = {1};
  Tensor result = torch::stable::from_blob(
      placed, {size, 1}, {stride, 1}, data.device(), ScalarType::Byte,
      [bytes = sizes.bytes()](void* p) { micromix::cpu::free_weight(p, bytes); });
  std::atomic<bool> wide{false};
  const auto* codes = static_cast<const uint8_t*>(data.const_data_ptr());
  const auto* scale_bytes = static_cast<const uint8_t*>(scales.const_data_ptr());
  parallel(sizes.panels, 1 + (1 << 16) / (sizes.panel_bytes + 1), [&](int64_t first, int64_t last) {
    if (micromix::cpu::place_panels(layout, n, codes, scale_bytes, placed, first, last))
      wide = true;
  });
  *reinterpret_cast<micromix::cpu::PlacedHeader*>(placed) = {
      micromix::cpu::kPlacedMagic,        n,           k4, k6, k8,
      micromix::cpu::weight_code(layout), wide.load(), {}};
  return result;
}

void check_placed(const char* op, const Tensor& weight, const mx::MixedLayout& layout, int64_t n) {
  check_bytes(op, "weight", weight);
  MICROMIX_CHECK(n <= INT32_MAX && layout.channels() <= INT32_MAX, "micromix::", op,
                 ": n and k4 + k6 + k8 must be below 2^31");
  const micromix::cpu::PlacedLayout sizes(layout, n);
  MICROMIX_CHECK(weight.dim() == 1 && weight.is_contiguous() && weight.numel() == sizes.bytes(),
                 "micromix::", op, ": weight must be the flat buffer of ", sizes.bytes(),
                 " bytes that micromix::place_weight makes on the CPU for these arguments; got ",
                 weight.numel(), " bytes");
  const auto* header = static_cast<const micromix::cpu::PlacedHeader*>(weight.const_data_ptr());
  MICROMIX_CHECK(reinterpret_cast<uintptr_t>(header) % micromix::cpu::kLine == 0, "micromix::", op,
                 ": the weight's memory must be aligned to 64 bytes, as that of "
                 "micromix::place_weight is; do not copy a placed weight into a view");
  MICROMIX_CHECK(header->magic == micromix::cpu::kPlacedMagic && header->n == n &&
                     header->k4 == layout.k4 && header->k6 == layout.k6 &&
                     header->k8 == layout.k8 &&
                     header->weight_code == micromix::cpu::weight_code(layout),
                 "micromix::", op,
                 ": weight was not placed by micromix::place_weight on the CPU with "
                 "these n, k4, k6, k8 and format; place it again");
}

std::tuple<Tensor, Tensor> unplace_weight(Tensor weight, int64_t n, int64_t k4, int64_t k6,
                                          int64_t k8, int64_t format) {
  const mx::MixedLayout layout = checked_layout("unplace_weight", k4, k6, k8, format);
  MICROMIX_CHECK(n >= 0, "micromix::unplace_weight: n must not be negative; got ", n);
  check_placed("unplace_weight", weight, layout, n);
  const auto rows = [&](int64_t bytes) {
    const int64_t sizes[2] = {n, bytes};
    return empty_of(weight, sizes, aoti_torch_dtype_uint8());
  };
  Tensor data = rows(layout.weight().row_bytes()), scales = rows(layout.weight().blocks());
  const cpu::PlacedLayout sizes(layout, n);
  const auto* placed = static_cast<const uint8_t*>(weight.const_data_ptr());
  auto* codes = static_cast<uint8_t*>(data.mutable_data_ptr());
  auto* scale_bytes = static_cast<uint8_t*>(scales.mutable_data_ptr());
  parallel(sizes.panels, 1 + (1 << 16) / (sizes.panel_bytes + 1), [&](int64_t first, int64_t last) {
    cpu::unplace_panels(layout, n, placed, codes, scale_bytes, first, last);
  });
  return {data, scales};
}

// Runs `count` products that share their activations and their kernel.
void launch(const cpu::LinearKernel& kernel, cpu::LinearTask* tasks, size_t count) {
  cpu::LinearTask any = tasks[0];
  cpu::ThreadBuffer arranged(cpu::Buffer::kArranged,
                             kernel.arrange ? kernel.arranged_bytes(any) : 0);
  any.arranged = arranged.data();
  if (kernel.arrange) kernel.arrange(any, arranged.data());
  cpu::ThreadBuffer prepared(cpu::Buffer::kPrepared, kernel.prepared_bytes(any));
  const int64_t row_grain = 1 + kernel.grain_channels / (any.layout.channels() + 1);
  parallel(any.m, row_grain,
           [&](int64_t first, int64_t last) { kernel.prepare(any, first, last, prepared.data()); });

  int64_t panels = 0, scratch_bytes = 0;
  for (size_t i = 0; i < count; ++i) {
    panels += cpu::PlacedLayout(tasks[i].layout, tasks[i].n).panels;
    tasks[i].arranged = any.arranged;
    const int64_t bytes = kernel.scratch_bytes(tasks[i]);
    scratch_bytes = bytes > scratch_bytes ? bytes : scratch_bytes;
  }
  const int64_t panel_grain = 1 + kernel.grain_products / (any.m * any.layout.channels() * 16 + 1);
  parallel(panels, panel_grain, [&](int64_t first, int64_t last) {
    cpu::ThreadBuffer scratch(cpu::Buffer::kScratch, scratch_bytes);
    for (size_t i = 0; i < count && last > 0; ++i) {
      const int64_t own = cpu::PlacedLayout(tasks[i].layout, tasks[i].n).panels;
      const int64_t end = last < own ? last : own;
      if (first < end) kernel.run(tasks[i], prepared.data(), first, end, scratch.data());
      first = first > own ? first - own : 0;
      last -= own;
    }
  });
}

void check_row_count(const char* op, int64_t m) {
  MICROMIX_CHECK(m <= INT32_MAX, "micromix::", op, ": at most 2^31 - 1 rows; got ", m);
}

// Checks a layer, makes its result, rows of `like`, a tensor whose rows the activations are, and
// gives the task, which has its activations, what it lacks.
void add_layer(const char* op, cpu::LinearTask& task, const Tensor& like, Layer& layer,
               ScalarType dtype) {
  MICROMIX_CHECK(layer.n >= 0, "micromix::", op, ": n must not be negative; got ", layer.n);
  task.n = layer.n;
  task.out_dtype = checked_dtype(op, "dtype", dtype);
  check_placed(op, layer.weight, task.layout, layer.n);
  task.weight = static_cast<const uint8_t*>(layer.weight.const_data_ptr());
  if (std::optional<Tensor>& bias = layer.bias) {
    task.bias_dtype = checked_dtype(op, "bias", bias->scalar_type());
    MICROMIX_CHECK(bias->is_cpu() && bias->dim() == 1 && bias->size(0) == layer.n, "micromix::", op,
                   ": bias must be [", layer.n, "] on the CPU");
    *bias = dense(*bias);
    task.bias = bias->const_data_ptr();
  }
  layer.result = empty_rows(like, layer.n, shim_dtype(dtype));
  task.out = layer.result->mutable_data_ptr();
}

// One launch for as many of the products that share their activations as have one kernel.
void launch_all(cpu::LinearTask* tasks, size_t count) {
  for (size_t first = 0; first < count;) {
    const cpu::LinearKernel& kernel = cpu::linear_kernel(tasks[first]);
    size_t last = first + 1;
    while (last < count && &cpu::linear_kernel(tasks[last]) == &kernel) ++last;
    launch(kernel, tasks + first, last - first);
    first = last;
  }
}

// Products of one activation with several layers of one layout, in one launch: the activations are
// decoded once, and the panels of all weights are shared out together.
void products(const char* op, Tensor data, Tensor scales, std::span<Layer> layers, int64_t k4,
              int64_t k6, int64_t k8, int64_t format, ScalarType dtype) {
  const mx::MixedLayout layout = checked_layout(op, k4, k6, k8, format);
  check_bytes(op, "data", data);
  check_bytes(op, "scales", scales);
  const int64_t m = checked_rows(op, data, scales, layout);
  check_row_count(op, m);
  data = dense(data);
  scales = dense(scales);

  cpu::LinearTask tasks[kMostLayers];
  size_t count = 0;
  for (Layer& layer : layers) {
    cpu::LinearTask& task = tasks[count] = {layout, m, 0};
    task.data = static_cast<const uint8_t*>(data.const_data_ptr());
    task.scales = static_cast<const uint8_t*>(scales.const_data_ptr());
    add_layer(op, task, data, layer, dtype);
    count += m > 0 && layer.n > 0;
  }
  launch_all(tasks, count);
}

// Products of one float activation with several layers of one layout, the same way.
void weight_only_products(const char* op, Tensor x, std::optional<Tensor> order,
                          std::span<Layer> layers, int64_t k4, int64_t k6, int64_t k8,
                          int64_t format, ScalarType dtype) {
  const mx::MixedLayout layout = checked_layout(op, k4, k6, k8, format);
  MICROMIX_CHECK(x.dim() > 0, "micromix::", op, ": x needs at least one dimension, the channels");
  const Dtype x_dtype = checked_dtype(op, "x", x.scalar_type());
  const int64_t k = x.size(x.dim() - 1), m = rows_of(x);
  check_row_count(op, m);
  x = dense(x);
  const int32_t* const channels = checked_order(op, x, order, layout, k);

  cpu::LinearTask tasks[kMostLayers];
  size_t count = 0;
  for (Layer& layer : layers) {
    cpu::LinearTask& task = tasks[count] = {layout, m, 0};
    task.weight_only = true;
    task.x_dtype = x_dtype;
    task.k = k;
    task.x = x.const_data_ptr();
    task.order = channels;
    add_layer(op, task, x, layer, dtype);
    count += m > 0 && layer.n > 0;
  }
  launch_all(tasks, count);
}

// A copy. Inductor neither looks into it nor computes it again for each of its readers.
Tensor materialize(Tensor x) { return torch::stable::clone(x); }

// What was built, one "key=value" a line.
std::string build_info() {
  return "abi=" + std::to_string(MICROMIX_ABI) +
         "\n"
         "build_id=" MICROMIX_BUILD_ID
         "\n"
         "compiler=" MICROMIX_COMPILER "\ncpu_best=" +
         micromix::cpu::name_of(micromix::cpu::best_isa());
}

std::string cpu_isa() { return micromix::cpu::name_of(micromix::cpu::current_isa()); }

std::string set_cpu_isa(std::string name) {
  const std::string before = cpu_isa();
  micromix::cpu::set_isa(name);
  return before;
}

}  // namespace

STABLE_TORCH_LIBRARY(micromix, m) {
  m.def(
      "quantize(Tensor x, Tensor? order, int k4, int k6, int k8, int format) "
      "-> (Tensor data, Tensor scales)");
  m.def(
      "linear(Tensor data, Tensor scales, Tensor weight, Tensor? bias, int n, int k4, int k6, "
      "int k8, int format, ScalarType dtype) -> Tensor");
  m.def(
      "linears.two(Tensor data, Tensor scales, Tensor weight0, Tensor? bias0, int n0, "
      "Tensor weight1, Tensor? bias1, int n1, int k4, int k6, int k8, int format, "
      "ScalarType dtype) -> (Tensor, Tensor)");
  m.def(
      "linears.three(Tensor data, Tensor scales, Tensor weight0, Tensor? bias0, int n0, "
      "Tensor weight1, Tensor? bias1, int n1, Tensor weight2, Tensor? bias2, int n2, int k4, "
      "int k6, int k8, int format, ScalarType dtype) -> (Tensor, Tensor, Tensor)");
  m.def(
      "weight_only_linear(Tensor x, Tensor? order, Tensor weight, Tensor? bias, int n, int k4, "
      "int k6, int k8, int format, ScalarType dtype) -> Tensor");
  m.def(
      "weight_only_linears.two(Tensor x, Tensor? order, Tensor weight0, Tensor? bias0, int n0, "
      "Tensor weight1, Tensor? bias1, int n1, int k4, int k6, int k8, int format, "
      "ScalarType dtype) -> (Tensor, Tensor)");
  m.def(
      "weight_only_linears.three(Tensor x, Tensor? order, Tensor weight0, Tensor? bias0, int n0, "
      "Tensor weight1, Tensor? bias1, int n1, Tensor weight2, Tensor? bias2, int n2, int k4, "
      "int k6, int k8, int format, ScalarType dtype) -> (Tensor, Tensor, Tensor)");
  m.def("place_weight(Tensor data, Tensor scales, int k4, int k6, int k8, int format) -> Tensor");
  m.def(
      "unplace_weight(Tensor weight, int n, int k4, int k6, int k8, int format) "
      "-> (Tensor data, Tensor scales)");
  m.def("materialize(Tensor x) -> Tensor");
  m.def("build_info() -> str");
  m.def("cpu_isa() -> str");
  m.def("set_cpu_isa(str name) -> str");
}

STABLE_TORCH_LIBRARY_IMPL(micromix, CPU, m) {
  m.impl("quantize", TORCH_BOX(&quantize));
  m.impl("linear", TORCH_BOX(&linear<products>));
  m.impl("linears.two", TORCH_BOX(&linears_two<products>));
  m.impl("linears.three", TORCH_BOX(&linears_three<products>));
  m.impl("weight_only_linear", TORCH_BOX(&weight_only_linear<weight_only_products>));
  m.impl("weight_only_linears.two", TORCH_BOX(&weight_only_linears_two<weight_only_products>));
  m.impl("weight_only_linears.three", TORCH_BOX(&weight_only_linears_three<weight_only_products>));
  m.impl("materialize", TORCH_BOX(&materialize));
  m.impl("place_weight", TORCH_BOX(&place_weight));
  m.impl("unplace_weight", TORCH_BOX(&unplace_weight));
}

STABLE_TORCH_LIBRARY_IMPL(micromix, CompositeExplicitAutograd, m) {
  m.impl("build_info", TORCH_BOX(&build_info));
  m.impl("cpu_isa", TORCH_BOX(&cpu_isa));
  m.impl("set_cpu_isa", TORCH_BOX(&set_cpu_isa));
}
