// The products and place_weight on CUDA: the Blackwell kernel where a device has its instructions,
// or in software where it is asked for by name; else, and where only weights are quantised,
// operands decoded to bfloat16; or the reference on a device that this was not compiled for.
#include <torch/csrc/stable/library.h>

#include <array>
#include <atomic>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <tuple>

#include "../cuda/decoded_linear.h"
#include "../cuda/rows.h"
#include "../product_operators.h"
#include "launch.h"

namespace {

using namespace micromix;
using blackwell::Atoms;
using blackwell::LinearArguments;
using cuda::call;
using cuda::OnDevice;
using torch::stable::detail::from;
using torch::stable::detail::to;

constexpr int64_t kEmulatedBit = 1 << 8;  // of `format`: ops.EMULATED
using cuda::kMostDevices;

struct Device {
  Atoms atoms;
  int multiprocessors;
  bool early;       // starts a kernel before the one before it ends
  bool warpgroups;  // runs csrc/cuda/many_rows.cu
};

// Of the current device, asked once.
Device device_of(int index) {
  static std::array<std::atomic<bool>, kMostDevices> known{};
  static std::array<Device, kMostDevices> devices{};
  static std::mutex asking;
  MICROMIX_CHECK(index < kMostDevices, "micromix: at most ", kMostDevices, " CUDA devices");
  if (!known[index]) {
    const std::lock_guard lock(asking);
    if (known[index]) return devices[index];
    int count = 0, architecture = 0;
    cuda::check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, index), "linear");
    Atoms atoms = Atoms::kNone;
    bool warpgroups = false;
    cuda::check(blackwell::find_atoms(atoms), "linear");
    cuda::check(cuda::find_many_rows(warpgroups), "linear");
    if (atoms != Atoms::kNone) cuda::check(cuda::architecture_of_rows(architecture), "linear");
    devices[index] = {atoms, count, architecture >= 90, warpgroups};
    known[index] = true;
  }
  return devices[index];
}

// Whether the kernel runs, natively or because `format` names its emulation; false: the reference.
bool runs_kernel(const char* op, const Device& device, int64_t format) {
  const bool emulated = format >= 0 && format & kEmulatedBit;
  MICROMIX_CHECK(!emulated || device.atoms != Atoms::kNone, "micromix::", op,
                 ": kernel=\"mx_emulated\" needs compute capability 8.0 or later, and a build for "
                 "it; see python -m micromix_compile.env");
  return emulated || device.atoms == Atoms::kNative;
}

mx::MixedLayout layout_of(const char* op, int64_t k4, int64_t k6, int64_t k8, int64_t format) {
  return checked_layout(op, k4, k6, k8, format < 0 ? format : format & ~kEmulatedBit);
}

// Dense, and starting at a multiple of `alignment` bytes, which no copy of a view need do.
Tensor aligned(const Tensor& t, size_t alignment) {
  const Tensor result = dense(t);
  const auto address = reinterpret_cast<uintptr_t>(result.const_data_ptr());
  return address % alignment ? torch::stable::clone(result) : result;
}

Tensor place_weight(Tensor data, Tensor scales, int64_t k4, int64_t k6, int64_t k8,
                    int64_t format) {
  const mx::MixedLayout layout = layout_of("place_weight", k4, k6, k8, format);
  const mx::MixedLayout own = layout.weight();
  check_bytes("place_weight", "data", data, DeviceType::CUDA);
  check_bytes("place_weight", "scales", scales, DeviceType::CUDA);
  MICROMIX_CHECK(data.get_device_index() == scales.get_device_index(),
                 "micromix::place_weight: data and scales must be on one GPU");
  const OnDevice on(data);
  const Device device = device_of(on.index);
  // Weight-only products decode their weight on every device.
  const bool is_blackwell = runs_kernel("place_weight", device, format) &&
                            !(layout.code & mx::MixedLayout::kWeightOnlyBit);
  if (!is_blackwell && device.atoms == Atoms::kNone) {
    std::array stack{from(data), from(scales), from(k4), from(k6), from(k8), from(format)};
    call("micromix::place_weight_reference", stack);
    return to<Tensor>(stack[0]);
  }
  MICROMIX_CHECK(data.dim() == 2 && data.size(1) == own.row_bytes(),
                 "micromix::place_weight: data must be [N, ", own.row_bytes(), "]; got ",
                 data.dim(), " dimensions, the last of ",
                 data.dim() ? data.size(data.dim() - 1) : 0);
  MICROMIX_CHECK(
      scales.dim() == 2 && scales.size(0) == data.size(0) && scales.size(1) == own.blocks(),
      "micromix::place_weight: scales must be [", data.size(0), ", ", own.blocks(), "]");
  data = aligned(data, 16);
  scales = dense(scales);
  const int64_t n = data.size(0);
  const int64_t bytes = is_blackwell ? blackwell::PlacedWeight(layout).bytes(n)
                                     : cuda::decoded_weight_bytes(layout, n);
  Tensor placed = empty_vector(data, bytes, aoti_torch_dtype_uint8());
  if (!is_blackwell) {
    cuda::place_decoded("place_weight", on, data, scales, layout, placed);
  } else if (placed.numel() > 0) {
    cuda::check(
        blackwell::launch_place(layout, static_cast<const uint8_t*>(data.const_data_ptr()),
                                static_cast<const uint8_t*>(scales.const_data_ptr()),
                                static_cast<uint8_t*>(placed.mutable_data_ptr()), n, on.stream),
        "place_weight");
  }
  return placed;
}

// One launch for arguments whose weights, bias and results are filled in. K is cut where there is
// too little to do otherwise; the partial sums live until the next kernel of this stream.
void launch(const char* op, LinearArguments& arguments, const mx::MixedLayout& layout,
            const Device& device, const Tensor& like, cudaStream_t stream) {
  using namespace blackwell;
  const TileId tile = choose_tile(arguments.m);
  int column_tiles = 0, columns = 0, stages = 0, row_tiles = 0;
  with_tile(tile, [&](auto t) {
    using T = decltype(t);
    stages = stages_of(arguments, T::kBlocks4, T::kBlocks8);
    row_tiles = (arguments.m + T::kM - 1) / T::kM;
    for (int i = 0; i < arguments.weight_count; ++i) {
      WeightArguments& weight = arguments.weights[i];
      weight.first_tile = column_tiles;
      weight.first_column = columns;
      column_tiles += (weight.n + T::kN - 1) / T::kN;
      columns += (weight.n + 7) / 8 * 8;
    }
  });
  arguments.columns = columns;
  arguments.splits =
      choose_splits(int64_t{column_tiles} * row_tiles, stages, device.multiprocessors);
  std::optional<Tensor> partial;
  if (arguments.splits > 1) {
    partial = empty_vector(like, arguments.splits * int64_t{arguments.m} * columns * 4,
                           aoti_torch_dtype_uint8());
    arguments.partial = static_cast<float*>(partial->mutable_data_ptr());
  }
  const bool e3m2 = layout.code & mx::MixedLayout::kFormat6Bit;
  const bool mxfp4 = layout.code & mx::MixedLayout::kWeightIsMxfp4Bit;
  const auto run =
      mxfp4 ? (e3m2 ? launch_e3m2_mxfp4 : launch_e2m3_mxfp4) : (e3m2 ? launch_e3m2 : launch_e2m3);
  cuda::check(run(tile, arguments, column_tiles, stream), op);
  if (arguments.splits > 1) cuda::check(launch_add_partial_sums(arguments, stream), op);
}

int64_t checked_row_count(const char* op, int64_t m) {
  constexpr int64_t kMostRows = int64_t{1} << 22;  // what a grid holds of the largest tile
  MICROMIX_CHECK(m <= kMostRows, "micromix::", op, ": at most ", kMostRows, " rows; got ", m);
  return m;
}

void check_columns(const char* op, int64_t n) {
  MICROMIX_CHECK(n >= 0 && n < (int64_t{1} << 29), "micromix::", op,
                 ": n must not be negative, and below 2^29; got ", n);
}

// Checks a layer and makes its result, rows of `like`, a tensor whose rows the activations are. Its
// placed weight has `bytes`.
void check_layer(const char* op, Layer& layer, int64_t bytes, const Tensor& like, int device,
                 ScalarType dtype) {
  const int64_t n = layer.n;
  check_bytes(op, "weight", layer.weight, DeviceType::CUDA);
  MICROMIX_CHECK(layer.weight.get_device_index() == device && layer.weight.dim() == 1 &&
                     layer.weight.is_contiguous() && layer.weight.numel() == bytes,
                 "micromix::", op, ": weight must be the flat buffer of ", bytes,
                 " bytes that micromix::place_weight makes on this GPU for these arguments; got ",
                 layer.weight.numel(), " bytes");
  layer.weight = aligned(layer.weight, 16);
  if (std::optional<Tensor>& bias = layer.bias) {
    checked_dtype(op, "bias", bias->scalar_type());
    MICROMIX_CHECK(bias->is_cuda() && bias->get_device_index() == device && bias->dim() == 1 &&
                       bias->size(0) == n,
                   "micromix::", op, ": bias must be [", n, "] on this GPU");
    *bias = dense(*bias);
  }
  layer.result = empty_rows(like, n, shim_dtype(dtype));
}

cuda::Launcher launcher_of(const Device& device, const OnDevice& on) {
  return {on.stream, on.index, device.early, device.warpgroups, device.multiprocessors};
}

void blackwell_products(const char* op, const Device& device, const OnDevice& on,
                        const Tensor& data, const Tensor& scales, int64_t m,
                        std::span<Layer> layers, const mx::MixedLayout& layout, ScalarType dtype) {
  using namespace blackwell;
  LinearArguments arguments = arguments_of(layout);
  arguments.data = static_cast<const uint8_t*>(data.const_data_ptr());
  arguments.scales = static_cast<const uint8_t*>(scales.const_data_ptr());
  arguments.m = static_cast<int>(m);
  arguments.out_dtype = checked_dtype(op, "dtype", dtype);
  for (Layer& layer : layers) {
    if (m == 0 || layer.n == 0) continue;
    WeightArguments weight{};
    weight.placed = static_cast<const uint8_t*>(layer.weight.const_data_ptr());
    weight.n = static_cast<int>(layer.n);
    if (layer.bias) {
      weight.bias_dtype = checked_dtype(op, "bias", layer.bias->scalar_type());
      weight.bias = layer.bias->const_data_ptr();
    }
    weight.out = layer.result->mutable_data_ptr();
    arguments.weights[arguments.weight_count++] = weight;
  }
  static_assert(kMostLayers <= kMaxWeights);
  if (arguments.weight_count > 0) launch(op, arguments, layout, device, data, on.stream);
}

// Fills in the results of the layers: one launch of the Blackwell kernel, or one product after the
// other.
void run(const char* op, Tensor data, Tensor scales, std::span<Layer> layers, int64_t k4,
         int64_t k6, int64_t k8, int64_t format, ScalarType dtype) {
  const mx::MixedLayout layout = layout_of(op, k4, k6, k8, format);
  check_bytes(op, "data", data, DeviceType::CUDA);
  check_bytes(op, "scales", scales, DeviceType::CUDA);
  MICROMIX_CHECK(data.get_device_index() == scales.get_device_index(), "micromix::", op,
                 ": data and scales must be on one GPU");
  const OnDevice on(data);
  const Device device = device_of(on.index);
  const bool is_blackwell = runs_kernel(op, device, format);
  if (!is_blackwell && device.atoms == Atoms::kNone) {
    for (Layer& layer : layers) {
      std::array stack{from(data),    from(scales), from(layer.weight), from(layer.bias),
                       from(layer.n), from(k4),     from(k6),           from(k8),
                       from(format),  from(dtype)};
      call("micromix::linear_reference", stack);
      layer.result = to<Tensor>(stack[0]);
    }
    return;
  }

  checked_dtype(op, "dtype", dtype);
  const int64_t m = checked_row_count(op, checked_rows(op, data, scales, layout));
  data = aligned(data, 16);
  scales = aligned(scales, 4);
  for (Layer& layer : layers) {
    check_columns(op, layer.n);
    const int64_t bytes = is_blackwell ? blackwell::PlacedWeight(layout).bytes(layer.n)
                                       : cuda::decoded_weight_bytes(layout, layer.n);
    check_layer(op, layer, bytes, data, on.index, dtype);
  }
  if (is_blackwell) {
    blackwell_products(op, device, on, data, scales, m, layers, layout, dtype);
  } else {
    const auto rows = cuda::packed_rows(layout, static_cast<const uint8_t*>(data.const_data_ptr()),
                                        static_cast<const uint8_t*>(scales.const_data_ptr()), m);
    cuda::decoded_products(op, launcher_of(device, on), data, rows, layers, layout);
  }
}

// The same for float activations, whose weights are decoded on every device.
void run_weight_only(const char* op, Tensor x, std::optional<Tensor> order, std::span<Layer> layers,
                     int64_t k4, int64_t k6, int64_t k8, int64_t format, ScalarType dtype) {
  const mx::MixedLayout layout = checked_layout(op, k4, k6, k8, format);
  MICROMIX_CHECK(x.is_cuda(), "micromix::", op, ": x must be on the GPU, as its weight is");
  MICROMIX_CHECK(x.dim() > 0, "micromix::", op, ": x needs at least one dimension, the channels");
  const OnDevice on(x);
  const Device device = device_of(on.index);
  if (device.atoms == Atoms::kNone) {
    for (Layer& layer : layers) {
      std::array stack{from(x),  from(order), from(layer.weight), from(layer.bias), from(layer.n),
                       from(k4), from(k6),    from(k8),           from(format),     from(dtype)};
      call("micromix::weight_only_linear_reference", stack);
      layer.result = to<Tensor>(stack[0]);
    }
    return;
  }
  checked_dtype(op, "dtype", dtype);
  const int64_t k = x.size(x.dim() - 1);
  MICROMIX_CHECK(k <= INT32_MAX && layout.channels() <= INT32_MAX, "micromix::", op,
                 ": at most 2^31 - 1 channels; got ", k);
  cuda::FloatRows rows{};
  rows.dtype = checked_dtype(op, "x", x.scalar_type());
  rows.rows = checked_row_count(op, rows_of(x));
  rows.k = static_cast<int32_t>(k);
  x = dense(x);
  rows.data = x.const_data_ptr();
  if (checked_order(op, x, order, layout, k) != nullptr) {
    order = aligned(*order, 16);
    rows.order = static_cast<const int32_t*>(order->const_data_ptr());
  }
  const auto segments = layout.segments();
  rows.end4 = static_cast<int32_t>(segments[1].first_block);
  rows.end6 = static_cast<int32_t>(segments[2].first_block);
  rows.blocks = static_cast<int32_t>(layout.blocks());
  for (int i = 0; i < 3; ++i)
    rows.rotated |= static_cast<uint32_t>(segments[i].hadamard && segments[i].blocks > 0) << i;
  for (Layer& layer : layers) {
    check_columns(op, layer.n);
    check_layer(op, layer, cuda::decoded_weight_bytes(layout, layer.n), x, on.index, dtype);
  }
  cuda::decoded_products(op, launcher_of(device, on), x, rows, layers, layout);
}

// "native", "emulated" (it could be) or "none": what the Blackwell kernel is on a device.
std::string cuda_atoms(int64_t index) {
  MICROMIX_CHECK(index >= 0 && index < kMostDevices, "micromix: no CUDA device ", index);
  const torch::stable::accelerator::DeviceGuard guard(static_cast<int32_t>(index));
  switch (device_of(static_cast<int>(index)).atoms) {
    case Atoms::kNative:
      return "native";
    case Atoms::kEmulated:
      return "emulated";
    default:
      return "none";
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(micromix, m) { m.def("cuda_atoms(int device) -> str"); }

STABLE_TORCH_LIBRARY_IMPL(micromix, CompositeExplicitAutograd, m) {
  m.impl("cuda_atoms", TORCH_BOX(&cuda_atoms));
}

STABLE_TORCH_LIBRARY_IMPL(micromix, CUDA, m) {
  m.impl("linear", TORCH_BOX(&linear<run>));
  m.impl("linears.two", TORCH_BOX(&linears_two<run>));
  m.impl("linears.three", TORCH_BOX(&linears_three<run>));
  m.impl("weight_only_linear", TORCH_BOX(&weight_only_linear<run_weight_only>));
  m.impl("weight_only_linears.two", TORCH_BOX(&weight_only_linears_two<run_weight_only>));
  m.impl("weight_only_linears.three", TORCH_BOX(&weight_only_linears_three<run_weight_only>));
  m.impl("place_weight", TORCH_BOX(&place_weight));
}
