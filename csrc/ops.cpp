// The micromix:: operators: their schemas, the checks of their arguments, and their CPU kernels.
// LibTorch stable ABI only, so that one library serves every torch from 2.11 on.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <atomic>
#include <optional>
#include <string>
#include <tuple>

#include "abi.h"
#include "cpu/isa.h"
#include "cpu/memory.h"

namespace {

using micromix::cpu::Dtype;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kMaxDims = 16;

mx::MixedLayout checked_layout(const char* op, int64_t k4, int64_t k6, int64_t k8, int64_t format) {
  const bool code_fits = format >= 0 && format < 256;
  const mx::MixedLayout layout{k4, k6, k8, code_fits ? static_cast<int>(format) : -1};
  STD_TORCH_CHECK(k4 >= 0 && k6 >= 0 && k8 >= 0 && k4 % mx::kBlock == 0 && k6 % mx::kBlock == 0 &&
                      k8 % mx::kBlock == 0,
                  "micromix::", op, ": k4, k6 and k8 must be multiples of 32, not negative; got ",
                  k4, ", ", k6, ", ", k8);
  STD_TORCH_CHECK(layout.valid(), "micromix::", op, ": ", format,
                  " is not a format code; use MixedLayout.code");
  return layout;
}

Dtype checked_dtype(const char* op, const char* what, ScalarType dtype) {
  switch (dtype) {
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    case ScalarType::Half:
      return Dtype::kFloat16;
    case ScalarType::Float:
      return Dtype::kFloat32;
    default:
      STD_TORCH_CHECK(false, "micromix::", op, ": ", what,
                      " must be bfloat16, float16 or float32; got ",
                      torch::headeronly::toString(dtype));
  }
}

void check_bytes(const char* op, const char* what, const Tensor& t) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Byte, "micromix::", op, ": ", what,
                  " must be uint8; got ", torch::headeronly::toString(t.scalar_type()));
  STD_TORCH_CHECK(t.is_cpu(), "micromix::", op, ": ", what, " must be on the CPU, as its data is");
}

Tensor dense(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

// The number of rows: the product of all sizes but the last.
int64_t rows_of(const Tensor& t) {
  int64_t rows = 1;
  for (int64_t i = 0; i + 1 < t.dim(); ++i) rows *= t.size(i);
  return rows;
}

// A new CPU tensor with the sizes of `like`, the last one replaced.
Tensor empty_rows(const Tensor& like, int64_t last, int32_t dtype) {
  const int64_t dims = like.dim();
  STD_TORCH_CHECK(dims <= kMaxDims, "micromix: at most ", kMaxDims, " dimensions, got ", dims);
  int64_t sizes[kMaxDims], strides[kMaxDims];
  for (int64_t i = 0; i < dims; ++i) sizes[i] = i + 1 < dims ? like.size(i) : last;
  int64_t stride = 1;
  for (int64_t i = dims - 1; i >= 0; --i) {
    strides[i] = stride;
    stride *= sizes[i] > 0 ? sizes[i] : 1;
  }
  AtenTensorHandle result;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dims, sizes, strides, dtype,
                                                  aoti_torch_device_type_cpu(), 0, &result));
  return Tensor(result);
}

// Runs f(first, last) over [0, count) on torch's threads; each gets at least `grain`.
template <typename F>
void parallel(int64_t count, int64_t grain, const F& f) {
  if (count <= grain) {
    if (count > 0) f(int64_t{0}, count);
  } else {
    torch::stable::parallel_for(0, count, grain, f);
  }
}

std::tuple<Tensor, Tensor> quantize(Tensor x, std::optional<Tensor> order, int64_t k4, int64_t k6,
                                    int64_t k8, int64_t format) {
  const mx::MixedLayout layout = checked_layout("quantize", k4, k6, k8, format);
  STD_TORCH_CHECK(x.dim() > 0, "micromix::quantize: x needs at least one dimension, the channels");
  const Dtype dtype = checked_dtype("quantize", "x", x.scalar_type());
  const int64_t k = x.size(x.dim() - 1), rows = rows_of(x);
  x = dense(x);

  micromix::cpu::QuantizeTask task{layout, x.const_data_ptr(), dtype, k, nullptr, nullptr, nullptr};
  if (order) {
    STD_TORCH_CHECK(order->scalar_type() == ScalarType::Int && order->is_cpu(),
                    "micromix::quantize: order must be an int32 tensor on the CPU, as x is");
    STD_TORCH_CHECK(order->dim() == 1 && order->size(0) == layout.channels(),
                    "micromix::quantize: order must have k4 + k6 + k8 = ", layout.channels(),
                    " entries; got ", order->numel());
    *order = dense(*order);
    task.order = static_cast<const int32_t*>(order->const_data_ptr());
    int32_t least = 0, greatest = -1;
    for (int64_t i = 0; i < layout.channels(); ++i) {
      least = task.order[i] < least ? task.order[i] : least;
      greatest = task.order[i] > greatest ? task.order[i] : greatest;
    }
    STD_TORCH_CHECK(least >= -1 && greatest < k,
                    "micromix::quantize: order must hold channels below ", k,
                    ", or -1 for padding; got ", least < -1 ? least : greatest);
  } else {
    STD_TORCH_CHECK(layout.channels() >= k,
                    "micromix::quantize: the layout has k4 + k6 + k8 = ", layout.channels(),
                    " channels, x has ", k);
  }

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
  STD_TORCH_CHECK(data.dim() == 2 && data.size(1) == own.row_bytes(),
                  "micromix::place_weight: data must be [N, ", own.row_bytes(), "]; got ",
                  data.dim(), " dimensions, the last of ",
                  data.dim() ? data.size(data.dim() - 1) : 0);
  STD_TORCH_CHECK(
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

void check_placed(const Tensor& weight, const mx::MixedLayout& layout, int64_t n) {
  check_bytes("linear", "weight", weight);
  const micromix::cpu::PlacedLayout sizes(layout, n);
  STD_TORCH_CHECK(weight.dim() == 1 && weight.is_contiguous() && weight.numel() == sizes.bytes(),
                  "micromix::linear: weight must be the flat buffer of ", sizes.bytes(),
                  " bytes that micromix::place_weight makes on the CPU for these arguments; got ",
                  weight.numel(), " bytes");
  const auto* header = static_cast<const micromix::cpu::PlacedHeader*>(weight.const_data_ptr());
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(header) % micromix::cpu::kLine == 0,
                  "micromix::linear: the weight's memory must be aligned to 64 bytes, as that of "
                  "micromix::place_weight is; do not copy a placed weight into a view");
  STD_TORCH_CHECK(
      header->magic == micromix::cpu::kPlacedMagic && header->n == n && header->k4 == layout.k4 &&
          header->k6 == layout.k6 && header->k8 == layout.k8 &&
          header->weight_code == micromix::cpu::weight_code(layout),
      "micromix::linear: weight was not placed by micromix::place_weight on the CPU with "
      "these n, k4, k6, k8 and format; place it again");
}

Tensor linear(Tensor data, Tensor scales, Tensor weight, std::optional<Tensor> bias, int64_t n,
              int64_t k4, int64_t k6, int64_t k8, int64_t format, ScalarType dtype) {
  const mx::MixedLayout layout = checked_layout("linear", k4, k6, k8, format);
  check_bytes("linear", "data", data);
  check_bytes("linear", "scales", scales);
  const Dtype out_dtype = checked_dtype("linear", "dtype", dtype);
  STD_TORCH_CHECK(data.dim() > 0 && data.size(data.dim() - 1) == layout.row_bytes(),
                  "micromix::linear: data must be [..., ", layout.row_bytes(),
                  "], the last dimension is ", data.dim() ? data.size(data.dim() - 1) : 0);
  const int64_t m = rows_of(data);
  STD_TORCH_CHECK(scales.dim() == data.dim() && scales.size(scales.dim() - 1) == layout.blocks() &&
                      rows_of(scales) == m,
                  "micromix::linear: scales must be [..., ", layout.blocks(),
                  "] with the leading sizes of data");
  STD_TORCH_CHECK(n >= 0, "micromix::linear: n must not be negative; got ", n);
  check_placed(weight, layout, n);
  data = dense(data);
  scales = dense(scales);

  micromix::cpu::LinearTask task{layout, m, n};
  task.data = static_cast<const uint8_t*>(data.const_data_ptr());
  task.scales = static_cast<const uint8_t*>(scales.const_data_ptr());
  task.weight = static_cast<const uint8_t*>(weight.const_data_ptr());
  if (bias) {
    task.bias_dtype = checked_dtype("linear", "bias", bias->scalar_type());
    STD_TORCH_CHECK(bias->is_cpu() && bias->dim() == 1 && bias->size(0) == n,
                    "micromix::linear: bias must be [", n, "] on the CPU");
    *bias = dense(*bias);
    task.bias = bias->const_data_ptr();
  }
  const int32_t shim_dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  Tensor out = empty_rows(data, n, shim_dtype);
  if (m == 0 || n == 0) return out;
  task.out = out.mutable_data_ptr();
  task.out_dtype = out_dtype;

  const micromix::cpu::LinearKernel& kernel = micromix::cpu::linear_kernel(task);
  micromix::cpu::ThreadBuffer prepared(micromix::cpu::Buffer::kPrepared,
                                       kernel.prepared_bytes(task));
  const int64_t row_grain = 1 + kernel.grain_channels / (layout.channels() + 1);
  parallel(m, row_grain, [&](int64_t first, int64_t last) {
    kernel.prepare(task, first, last, prepared.data());
  });
  const micromix::cpu::PlacedLayout sizes(layout, n);
  const int64_t panel_grain = 1 + kernel.grain_products / (m * layout.channels() * 16 + 1);
  parallel(sizes.panels, panel_grain, [&](int64_t first, int64_t last) {
    micromix::cpu::ThreadBuffer scratch(micromix::cpu::Buffer::kScratch,
                                        kernel.scratch_bytes(task));
    kernel.run(task, prepared.data(), first, last, scratch.data());
  });
  return out;
}

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
  m.def("place_weight(Tensor data, Tensor scales, int k4, int k6, int k8, int format) -> Tensor");
  m.def("build_info() -> str");
  m.def("cpu_isa() -> str");
  m.def("set_cpu_isa(str name) -> str");
}

STABLE_TORCH_LIBRARY_IMPL(micromix, CPU, m) {
  m.impl("quantize", TORCH_BOX(&quantize));
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("place_weight", TORCH_BOX(&place_weight));
}

STABLE_TORCH_LIBRARY_IMPL(micromix, CompositeExplicitAutograd, m) {
  m.impl("build_info", TORCH_BOX(&build_info));
  m.impl("cpu_isa", TORCH_BOX(&cpu_isa));
  m.impl("set_cpu_isa", TORCH_BOX(&set_cpu_isa));
}
