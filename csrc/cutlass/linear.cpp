// micromix::linear, linears and place_weight on CUDA: the Blackwell kernel where a device has its
// instructions, that kernel in software where it is asked for by name, else the reference.
#include <torch/csrc/stable/library.h>

#include <array>
#include <atomic>
#include <optional>
#include <string>
#include <vector>

#include "../checks.h"
#include "../cuda/device.h"
#include "launch.h"

namespace {

using namespace micromix;
using blackwell::Atoms;
using blackwell::LinearArguments;
using cuda::OnDevice;
using torch::stable::detail::from;
using torch::stable::detail::to;

constexpr int64_t kEmulatedBit = 1 << 8;  // of `format`: ops.EMULATED
constexpr int kMaxDevices = 64;

struct Device {
  Atoms atoms;
  int multiprocessors;
};

// Of the current device, asked once.
Device device_of(int index) {
  static std::array<std::atomic<int>, kMaxDevices> known{};  // 0: not asked
  static std::array<std::atomic<int>, kMaxDevices> counts{};
  MICROMIX_CHECK(index < kMaxDevices, "micromix: at most ", kMaxDevices, " CUDA devices");
  if (known[index] == 0) {
    int count = 0;
    cuda::check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, index), "linear");
    counts[index] = count;
    known[index] = 1 + static_cast<int>(blackwell::atoms_of_current_device());
  }
  return {static_cast<Atoms>(known[index] - 1), counts[index]};
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

Tensor empty_bytes(const Tensor& like, int64_t bytes) {
  const int64_t stride = 1;
  AtenTensorHandle result;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(1, &bytes, &stride, aoti_torch_dtype_uint8(),
                                                  aoti_torch_device_type_cuda(),
                                                  like.get_device_index(), &result));
  return Tensor(result);
}

template <size_t kCount>
void call(const char* op, std::array<StableIValue, kCount>& stack) {
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(op, "", stack.data(), TORCH_ABI_VERSION));
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
  if (!runs_kernel("place_weight", device_of(on.index), format)) {
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
  data = dense(data);
  scales = dense(scales);
  const int64_t n = data.size(0);
  Tensor placed = empty_bytes(data, blackwell::PlacedWeight(layout).bytes(n));
  if (placed.numel() > 0) {
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
    partial = empty_bytes(like, arguments.splits * int64_t{arguments.m} * columns * 4);
    arguments.partial = static_cast<float*>(partial->mutable_data_ptr());
  }
  const bool e3m2 = layout.code & mx::MixedLayout::kFormat6Bit;
  const bool mxfp4 = layout.code & mx::MixedLayout::kWeightIsMxfp4Bit;
  const auto run =
      mxfp4 ? (e3m2 ? launch_e3m2_mxfp4 : launch_e2m3_mxfp4) : (e3m2 ? launch_e3m2 : launch_e2m3);
  cuda::check(run(tile, arguments, column_tiles, stream), op);
  if (arguments.splits > 1) cuda::check(launch_add_partial_sums(arguments, stream), op);
}

std::vector<Tensor> products(const char* op, const Device& device, const OnDevice& on, Tensor data,
                             Tensor scales, const std::vector<Tensor>& weights,
                             std::vector<std::optional<Tensor>>& biases,
                             const std::vector<int64_t>& n, const mx::MixedLayout& layout,
                             ScalarType dtype) {
  using namespace blackwell;
  const Dtype out_dtype = checked_dtype(op, "dtype", dtype);
  MICROMIX_CHECK(data.dim() > 0 && data.size(data.dim() - 1) == layout.row_bytes(),
                 "micromix::", op, ": data must be [..., ", layout.row_bytes(),
                 "], the last dimension is ", data.dim() ? data.size(data.dim() - 1) : 0);
  const int64_t m = rows_of(data);
  MICROMIX_CHECK(scales.dim() == data.dim() && scales.size(scales.dim() - 1) == layout.blocks() &&
                     rows_of(scales) == m,
                 "micromix::", op, ": scales must be [..., ", layout.blocks(),
                 "] with the leading sizes of data");
  constexpr int64_t kMostRows = int64_t{1} << 22;  // what a grid holds of the largest tile
  MICROMIX_CHECK(m <= kMostRows, "micromix::", op, ": at most ", kMostRows, " rows; got ", m);
  data = aligned(data, 16);
  scales = aligned(scales, 4);

  LinearArguments arguments = arguments_of(layout);
  const PlacedWeight placed(layout);
  arguments.data = static_cast<const uint8_t*>(data.const_data_ptr());
  arguments.scales = static_cast<const uint8_t*>(scales.const_data_ptr());
  arguments.m = static_cast<int>(m);
  arguments.out_dtype = out_dtype;

  const int32_t shim_dtype = to<int32_t>(from(dtype));
  std::vector<Tensor> results, kept;  // kept: what the kernels read
  for (size_t i = 0; i < weights.size(); ++i) {
    check_bytes(op, "weight", weights[i], DeviceType::CUDA);
    MICROMIX_CHECK(n[i] >= 0 && n[i] < (int64_t{1} << 30), "micromix::", op,
                   ": n must not be negative, and below 2^30; got ", n[i]);
    MICROMIX_CHECK(weights[i].get_device_index() == on.index && weights[i].dim() == 1 &&
                       weights[i].is_contiguous() && weights[i].numel() == placed.bytes(n[i]),
                   "micromix::", op, ": weight must be the flat buffer of ", placed.bytes(n[i]),
                   " bytes that micromix::place_weight makes on this GPU for these arguments; got ",
                   weights[i].numel(), " bytes");
    kept.push_back(aligned(weights[i], 16));
    WeightArguments weight{};
    weight.placed = static_cast<const uint8_t*>(kept.back().const_data_ptr());
    weight.n = static_cast<int>(n[i]);
    if (biases[i]) {
      weight.bias_dtype = checked_dtype(op, "bias", biases[i]->scalar_type());
      MICROMIX_CHECK(biases[i]->is_cuda() && biases[i]->get_device_index() == on.index &&
                         biases[i]->dim() == 1 && biases[i]->size(0) == n[i],
                     "micromix::", op, ": bias must be [", n[i], "] on this GPU");
      kept.push_back(dense(*biases[i]));
      weight.bias = kept.back().const_data_ptr();
    }
    results.push_back(empty_rows(data, n[i], shim_dtype));
    if (m == 0 || n[i] == 0) continue;
    weight.out = results.back().mutable_data_ptr();
    arguments.weights[arguments.weight_count++] = weight;
    if (arguments.weight_count == kMaxWeights) {
      launch(op, arguments, layout, device, data, on.stream);
      arguments.weight_count = 0;
    }
  }
  if (arguments.weight_count > 0) launch(op, arguments, layout, device, data, on.stream);
  return results;
}

void check_operands(const char* op, const Tensor& data, const Tensor& scales) {
  check_bytes(op, "data", data, DeviceType::CUDA);
  check_bytes(op, "scales", scales, DeviceType::CUDA);
  MICROMIX_CHECK(data.get_device_index() == scales.get_device_index(), "micromix::", op,
                 ": data and scales must be on one GPU");
}

Tensor linear(Tensor data, Tensor scales, Tensor weight, std::optional<Tensor> bias, int64_t n,
              int64_t k4, int64_t k6, int64_t k8, int64_t format, ScalarType dtype) {
  const mx::MixedLayout layout = layout_of("linear", k4, k6, k8, format);
  check_operands("linear", data, scales);
  const OnDevice on(data);
  const Device device = device_of(on.index);
  if (!runs_kernel("linear", device, format)) {
    std::array stack{from(data), from(scales), from(weight), from(bias),   from(n),
                     from(k4),   from(k6),     from(k8),     from(format), from(dtype)};
    call("micromix::linear_reference", stack);
    return to<Tensor>(stack[0]);
  }
  std::vector<std::optional<Tensor>> biases{bias};
  return products("linear", device, on, data, scales, {weight}, biases, {n}, layout, dtype)[0];
}

std::vector<Tensor> linears(Tensor data, Tensor scales, std::vector<Tensor> weights,
                            std::vector<std::optional<Tensor>> biases, std::vector<int64_t> n,
                            int64_t k4, int64_t k6, int64_t k8, int64_t format, ScalarType dtype) {
  const mx::MixedLayout layout = layout_of("linears", k4, k6, k8, format);
  MICROMIX_CHECK(biases.size() == weights.size() && n.size() == weights.size(),
                 "micromix::linears: weights, biases and n must be of one length; got ",
                 weights.size(), ", ", biases.size(), " and ", n.size());
  check_operands("linears", data, scales);
  const OnDevice on(data);
  const Device device = device_of(on.index);
  if (!runs_kernel("linears", device, format)) {
    std::vector<Tensor> results;
    for (size_t i = 0; i < n.size(); ++i)
      results.push_back(
          linear(data, scales, weights[i], biases[i], n[i], k4, k6, k8, format, dtype));
    return results;
  }
  return products("linears", device, on, data, scales, weights, biases, n, layout, dtype);
}

// "native", "emulated" (it could be) or "none": what the Blackwell kernel is on a device.
std::string cuda_atoms(int64_t index) {
  MICROMIX_CHECK(index >= 0 && index < kMaxDevices, "micromix: no CUDA device ", index);
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
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("linears", TORCH_BOX(&linears));
  m.impl("place_weight", TORCH_BOX(&place_weight));
}
