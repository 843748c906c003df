// What every operator does with its arguments: check them, make them dense, allocate results, and
// run a kernel over ranges on torch's threads.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <span>

#include "dtype.h"
#include "error.h"
#include "huge_pages.h"
#include "mx/layout.h"

namespace micromix {

using torch::headeronly::DeviceType;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kMaxDims = 16;

inline mx::MixedLayout checked_layout(const char* op, int64_t k4, int64_t k6, int64_t k8,
                                      int64_t format) {
  const bool code_fits = format >= 0 && format < mx::MixedLayout::kCodes;
  const mx::MixedLayout layout{k4, k6, k8, code_fits ? static_cast<int>(format) : -1};
  MICROMIX_CHECK(k4 >= 0 && k6 >= 0 && k8 >= 0 && k4 % mx::kBlock == 0 && k6 % mx::kBlock == 0 &&
                     k8 % mx::kBlock == 0,
                 "micromix::", op, ": k4, k6 and k8 must be multiples of 32, not negative; got ",
                 k4, ", ", k6, ", ", k8);
  MICROMIX_CHECK(k4 <= INT32_MAX && k6 <= INT32_MAX && k8 <= INT32_MAX, "micromix::", op,
                 ": k4, k6 and k8 must be below 2^31; got ", k4, ", ", k6, ", ", k8);
  MICROMIX_CHECK(layout.valid(), "micromix::", op, ": ", format,
                 " is not a format code; use MixedLayout.code");
  return layout;
}

inline Dtype checked_dtype(const char* op, const char* what, ScalarType dtype) {
  switch (dtype) {
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    case ScalarType::Half:
      return Dtype::kFloat16;
    case ScalarType::Float:
      return Dtype::kFloat32;
    default:
      MICROMIX_CHECK(false, "micromix::", op, ": ", what,
                     " must be bfloat16, float16 or float32; got ",
                     torch::headeronly::toString(dtype));
  }
}

inline void check_bytes(const char* op, const char* what, const Tensor& t,
                        DeviceType device = DeviceType::CPU) {
  MICROMIX_CHECK(t.scalar_type() == ScalarType::Byte, "micromix::", op, ": ", what,
                 " must be uint8; got ", torch::headeronly::toString(t.scalar_type()));
  MICROMIX_CHECK(t.device().type() == device, "micromix::", op, ": ", what, " must be on the ",
                 device == DeviceType::CPU ? "CPU" : "GPU", ", as its data is");
}

inline Tensor dense(const Tensor& t) {
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

inline bool same_device(const Tensor& a, const Tensor& b) { return a.device() == b.device(); }

// The number of rows: the product of all sizes but the last.
inline int64_t rows_of(const Tensor& t) {
  int64_t rows = 1;
  for (int64_t i = 0; i + 1 < t.dim(); ++i) rows *= t.size(i);
  return rows;
}

// A new dense tensor of these sizes on the device of `like`. On the CPU a large one gets huge pages
// where its memory is fresh.
inline Tensor empty_of(const Tensor& like, std::span<const int64_t> sizes, int32_t dtype) {
  const int64_t dims = static_cast<int64_t>(sizes.size());
  MICROMIX_CHECK(dims <= kMaxDims, "micromix: at most ", kMaxDims, " dimensions, got ", dims);
  int64_t strides[kMaxDims];
  int64_t stride = 1;
  for (int64_t i = dims - 1; i >= 0; --i) {
    strides[i] = stride;
    stride *= sizes[i] > 0 ? sizes[i] : 1;
  }
  AtenTensorHandle result;
  int32_t device;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  // torch's own message is lost on the way here. Who catches it looks for these words.
  const AOTITorchError error = aoti_torch_empty_strided(dims, sizes.data(), strides, dtype, device,
                                                        like.get_device_index(), &result);
  MICROMIX_CHECK(
      error == AOTI_TORCH_SUCCESS, "micromix: no memory for a result of ", stride, " elements: ",
      like.is_cpu() ? "DefaultCPUAllocator: can't allocate memory" : "CUDA out of memory.");
  Tensor tensor(result);
  const int64_t bytes = tensor.numel() * static_cast<int64_t>(tensor.element_size());
  if (bytes >= 2 * kHugePage && tensor.is_cpu()) {
    ask_for_huge_pages(tensor.mutable_data_ptr(), bytes);
  }
  return tensor;
}

// The same of one dimension.
inline Tensor empty_vector(const Tensor& like, int64_t size, int32_t dtype) {
  return empty_of(like, {&size, 1}, dtype);
}

// The same with the sizes of `like`, the last one replaced.
inline Tensor empty_rows(const Tensor& like, int64_t last, int32_t dtype) {
  const int64_t dims = like.dim();
  MICROMIX_CHECK(dims <= kMaxDims, "micromix: at most ", kMaxDims, " dimensions, got ", dims);
  int64_t sizes[kMaxDims];
  for (int64_t i = 0; i < dims; ++i) sizes[i] = i + 1 < dims ? like.size(i) : last;
  return empty_of(like, {sizes, static_cast<size_t>(dims)}, dtype);
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

// One layer of a product: its arguments, and its result once there is one.
struct Layer {
  Tensor weight;
  std::optional<Tensor> bias;
  int64_t n;
  std::optional<Tensor> result = std::nullopt;
};

// The most layers of one product: the overloads of micromix::linears.
constexpr size_t kMostLayers = 3;

inline int32_t shim_dtype(ScalarType dtype) {
  return torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
}

// The channel order of a quantise of k channels as the kernels take it, null for the identity
// alone. `order` is made dense in place.
inline const int32_t* checked_order(const char* op, const Tensor& x, std::optional<Tensor>& order,
                                    const mx::MixedLayout& layout, int64_t k) {
  if (!order) {
    MICROMIX_CHECK(layout.channels() >= k, "micromix::", op,
                   ": the layout has k4 + k6 + k8 = ", layout.channels(), " channels, x has ", k);
    return nullptr;
  }
  MICROMIX_CHECK(order->scalar_type() == ScalarType::Int && same_device(*order, x),
                 "micromix::", op, ": order must be an int32 tensor on the device of x");
  MICROMIX_CHECK(order->dim() == 1 && order->size(0) == layout.channels(), "micromix::", op,
                 ": order must have k4 + k6 + k8 = ", layout.channels(), " entries; got ",
                 order->numel());
  MICROMIX_CHECK(k <= INT32_MAX, "micromix::", op, ": x has ", k,
                 " channels, an order names at most 2^31 - 1");
  *order = dense(*order);
  alignas(16) static constexpr int32_t kNoChannels[1] = {};
  if (layout.channels() == 0) return kNoChannels;  // an empty tensor's data is null
  const auto* const channels = static_cast<const int32_t*>(order->const_data_ptr());
  // On a GPU the check would have to wait for the device: its kernels read NaN for such a channel.
  if (!order->is_cpu()) return channels;
  int32_t least = 0, greatest = -1;
  for (int64_t i = 0; i < layout.channels(); ++i) {
    least = channels[i] < least ? channels[i] : least;
    greatest = channels[i] > greatest ? channels[i] : greatest;
  }
  MICROMIX_CHECK(least >= -1 && greatest < k, "micromix::", op, ": order must hold channels below ",
                 k, ", or -1 for padding; got ", least < -1 ? least : greatest);
  return channels;
}

}  // namespace micromix
