// micromix::quantize and the operators that quantise what they compute, on CUDA devices.
#include "rows.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <array>
#include <limits>
#include <stdexcept>

#include "../row_operators.h"
#include "device.h"
#include "no_code.h"

namespace micromix::cuda {
namespace {

constexpr int64_t kThreadsOf64Registers = 1024;      // that a multiprocessor has at once
constexpr int kThreadsOfFew = 64;                    // that share out a row
constexpr int64_t kMostChannels = int64_t{1} << 24;  // positions are 32-bit, with room for sums

bool aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

bool aligned(const RowInput& rows) {
  return aligned(rows.data) && rows.stride * (rows.dtype == Dtype::kFloat32 ? 4 : 2) % 16 == 0;
}

Output output_of(const RowOutput& from) {
  const auto segments = from.layout.segments();
  const auto increment = [&](int i) {
    return mx::scale_increment(segments[i].format, segments[i].rule);
  };
  Output to;
  to.order = from.order;
  to.order_aligned = aligned(from.order);
  to.data = from.data;
  to.scales = from.scales;
  to.row_bytes = from.layout.row_bytes();
  to.end4 = static_cast<int32_t>(segments[0].blocks);
  to.end6 = static_cast<int32_t>(segments[0].blocks + segments[1].blocks);
  to.blocks = static_cast<int32_t>(from.layout.blocks());
  to.start6 = static_cast<int32_t>(segments[1].byte_start);
  to.start8 = static_cast<int32_t>(segments[2].byte_start);
  to.aligned4 = to.row_bytes % 16 == 0;
  to.aligned8 = to.aligned4 && to.start8 % 16 == 0;
  to.increment4 = increment(0);
  to.increment6 = increment(1);
  to.increment8 = increment(2);
  const auto in_both_halves = [](uint32_t increment) { return (increment >> 16) * 0x10001; };
  to.increments4 = in_both_halves(to.increment4);
  to.increments6 = in_both_halves(to.increment6);
  to.e3m2 = segments[1].format == mx::E3M2;
  to.rotated = 0;
  for (int i = 0; i < 3; ++i) to.rotated |= static_cast<uint32_t>(segments[i].hadamard) << i;
  return to;
}

// The types that every operand has, if the rows are aligned and of whole groups.
Types types_of(const RowTask& task, const RowOutput& output) {
  const bool one = task.x.dtype == task.dtype &&
                   (task.second.data == nullptr || task.second.dtype == task.dtype);
  const bool regular = task.k % 16 == 0 && aligned(task.x) && aligned(task.second) &&
                       aligned(task.weight) && aligned(task.bias) && aligned(output.order);
  if (!one || !regular) return Types::kAny;
  return task.dtype == Dtype::kBFloat16  ? Types::kBFloat16
         : task.dtype == Dtype::kFloat16 ? Types::kFloat16
                                         : Types::kFloat32;
}

// The device is one that this library was not built for.
struct NoCode : std::runtime_error {
  NoCode()
      : std::runtime_error(
            "micromix: the CUDA kernels were not built for this GPU; `micromix env` says for "
            "which") {}
};

// What a launch depends on beside its arguments.
struct Limits {
  int shared_bytes, shared_bytes_of_all, multiprocessors;
  int architecture;  // that the device's code was compiled for, as 90

  explicit Limits(int device) {
    const auto attribute = [&](cudaDeviceAttr name) {
      int value;
      check(cudaDeviceGetAttribute(&value, name, device), "quantize");
      return value;
    };
    shared_bytes = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) - kOtherSharedBytes;
    shared_bytes_of_all = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
    multiprocessors = attribute(cudaDevAttrMultiProcessorCount);
    const cudaError_t error = architecture_of_rows(architecture);
    if (has_no_code(error)) throw NoCode();
    check(error, "quantize");
  }
};

// Many regular rows of a 16-bit type, with enough for every thread block that stays to go on with.
bool are_many(const RowTask& task, Types types, int64_t count, const Limits& limits) {
  const auto of_type = [&](const RowInput& vector) {
    return vector.data == nullptr || vector.dtype == task.dtype;
  };
  return is_narrow(types) && task.kept == nullptr && of_type(task.weight) && of_type(task.bias) &&
         count >= 4 * limits.multiprocessors;
}
// Neither a norm nor an order: of long rows, or of two operands, the direct kernel is faster.
bool is_plain(const RowTask& task, const RowOutput& output) {
  return output.order == nullptr && task.row_function == RowFunction::kPointwise;
}

// Without threads where two rows at a time are too many channels, or the rows too many.
Launch paired(const RowTask& task, Types types, int64_t count, const RowOutput& output,
              const Limits& limits) {
  const int64_t groups =
      (std::max(task.k, output.layout.channels()) + kPairedGroup - 1) / kPairedGroup;
  const int64_t threads = (groups + 31) / 32 * 32;
  Launch launch{};
  const bool ordered = output.order != nullptr, two = task.second.data != nullptr;
  const auto is_near = [](const RowInput& rows) {  // 32 bits are enough for a row's bytes
    return rows.stride <= std::numeric_limits<int32_t>::max() / 2;
  };
  if (is_plain(task, output) && two) return launch;
  if (!is_paired(limits.architecture, task.row_function, ordered, two)) return launch;
  if (threads > kPairedThreads || count > std::numeric_limits<int32_t>::max() / 2 ||
      !is_near(task.x) || !is_near(task.second))
    return launch;
  launch.types = types;
  launch.placement = Placement::kPaired;
  launch.threads = static_cast<int>(threads);
  launch.bytes =
      paired_bytes(launch.threads, task.row_function, types, ordered, two, limits.architecture);
  launch.blocks = static_cast<int>(
      std::min(limits.multiprocessors * (kThreadsOf64Registers / threads), (count + 1) / 2));
  return launch;
}

// Without threads where a row does not fit, or the device cannot.
Launch streamed(const RowTask& task, Types types, int64_t count, const RowOutput& output,
                const Limits& limits) {
  const int64_t groups =
      (std::max(task.k, output.layout.channels()) + kStreamedGroup - 1) / kStreamedGroup;
  const int threads = static_cast<int>((groups + 31) / 32 * 32);
  const bool ordered = output.order != nullptr;
  const int operands = task.second.data != nullptr ? 2 : 1;
  const auto bytes = [&](int stages) {
    return streamed_bytes(task.k, operands, stages, threads, task.row_function);
  };
  // Thread blocks of a multiprocessor: as many as have registers and shared memory, but three rows
  // for each.
  const auto each = [&](int stages) {
    return std::min({int64_t{kStreamedThreads / threads},
                     limits.shared_bytes_of_all / (bytes(stages) + 1024 + kOtherSharedBytes),
                     std::max<int64_t>(count / (3 * limits.multiprocessors), 1)});
  };
  Launch launch{};
  if (is_plain(task, output) || limits.architecture < 90) return launch;
  if (threads > kStreamedThreads || bytes(kLeastStages) > limits.shared_bytes) return launch;
  // Beside the parameters that an order gathers, two rows at first. More stages help a thread block
  // that is alone.
  const int64_t blocks = std::max<int64_t>(each(kLeastStages), 1);
  const int wanted = !ordered      ? kLeastStages
                     : blocks == 1 ? kMostStages
                                   : 2 + streamed_parameters(task.row_function) / operands;
  launch.stages = kLeastStages;
  while (launch.stages < wanted && bytes(launch.stages + 1) <= limits.shared_bytes &&
         each(launch.stages + 1) >= blocks)
    ++launch.stages;
  launch.types = types;
  launch.placement = Placement::kStreamed;
  launch.blocks = static_cast<int>(blocks * limits.multiprocessors);
  launch.threads = threads;
  launch.bytes = static_cast<int>(bytes(launch.stages));
  return launch;
}

Launch choose(const RowTask& task, int64_t count, const RowOutput& output, const Limits& limits) {
  Launch launch{};
  launch.types = types_of(task, output);
  if (task.k > 0 && are_many(task, launch.types, count, limits)) {
    const Launch pairs = paired(task, launch.types, count, output, limits);
    if (pairs.threads > 0) return pairs;
    const Launch stream = streamed(task, launch.types, count, output, limits);
    if (stream.threads > 0) return stream;
  }
  launch.placement = output.order == nullptr ? Placement::kDirect : Placement::kStaged;
  const bool direct = launch.placement == Placement::kDirect;
  const bool waits = !direct || task.row_function != RowFunction::kPointwise;
  const int64_t bytes = waits ? staged_bytes(task.k, launch.types) : 0;
  launch.blocks = static_cast<int>(count);
  if (bytes <= limits.shared_bytes) {
    launch.bytes = static_cast<int>(bytes);
  } else {
    launch.placement = Placement::kRecomputed;
  }

  const int64_t channels = std::max(task.k, output.layout.channels());
  const int64_t group = direct && launch.types != Types::kAny ? 16 : 8;
  const int64_t groups = (channels + group - 1) / group;
  // Where there are few rows, thread blocks that would have nothing share them, if that is
  // possible, and else a row has more threads. Smaller thread blocks overlap better where several
  // rows fit on a multiprocessor.
  const bool few = count <= limits.multiprocessors;
  if (few && direct && task.row_function == RowFunction::kPointwise) {
    launch.threads = kThreadsOfFew;
    launch.parts = static_cast<int>(std::clamp<int64_t>(
        (groups + kThreadsOfFew - 1) / kThreadsOfFew, 1, limits.multiprocessors / count));
    return launch;
  }
  const int64_t most = groups <= 512 && !few ? 256 : max_threads(launch.placement);
  const int64_t each = std::max<int64_t>((groups + most - 1) / most, 1);  // groups of a thread
  launch.threads = static_cast<int>(std::clamp<int64_t>((groups / each + 31) / 32 * 32, 32, most));
  return launch;
}

void launch(const OnDevice& device, const Limits& limits, const RowTask& task, int64_t count,
            const RowOutput& output) {
  Rows rows{};
  rows.task = task;
  rows.k = static_cast<int32_t>(task.k);
  rows.count = static_cast<int32_t>(count);
  rows.output = output_of(output);
  Launch launch = choose(task, count, output, limits);
  rows.inverse_k = 1.0f / static_cast<float>(task.k);
  rows.stages = launch.stages;
  const auto strides = [&](int64_t row_bytes) {
    return Strides{static_cast<uint32_t>(row_bytes),
                   2 * static_cast<uint64_t>(row_bytes) * launch.blocks};
  };
  rows.x = strides(2 * task.x.stride);
  rows.second = strides(2 * task.second.stride);
  rows.data = strides(rows.output.row_bytes);
  rows.scales = strides(rows.output.blocks);
  rows.fetched = limits.multiprocessors;  // more get in the way of those that run
  launch.stream = device.stream;
  launch.early = limits.architecture >= 90;
  launch.most_bytes = limits.shared_bytes;
  const auto function = task.row_function == RowFunction::kRmsNorm     ? launch_rms_norm
                        : task.row_function == RowFunction::kLayerNorm ? launch_layer_norm
                                                                       : launch_pointwise;
  check(function(rows, launch), "quantize");
}

void run(const Tensor& x, const RowTask& task, int64_t rows, const RowOutput& output) {
  const int64_t channels = output.layout.channels();
  MICROMIX_CHECK(task.k <= kMostChannels && rows <= std::numeric_limits<int32_t>::max(),
                 "micromix: the CUDA kernels take up to ", kMostChannels,
                 " channels and 2^31 - 1 rows; got ", task.k, " and ", rows);
  MICROMIX_CHECK(channels <= kMostChannels, "micromix: the CUDA kernels take up to ", kMostChannels,
                 " channels; got ", channels);
  const OnDevice device(x);
  launch(device, Limits(device.index), task, rows, output);
}

std::tuple<Tensor, Tensor> quantize(Tensor x, std::optional<Tensor> order, int64_t k4, int64_t k6,
                                    int64_t k8, int64_t format) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  const OnDevice device(x);
  const RowTask task = row_task("quantize", RowFunction::kPointwise, x, x.scalar_type());
  try {
    std::optional<Tensor> dense_order = order;
    return quantise_rows<run>("quantize", task, x, dense_order, k4, k6, k8, format);
  } catch (const NoCode&) {  // the reference, as for the products; nothing is fused there
    std::array stack{from(x), from(order), from(k4), from(k6), from(k8), from(format)};
    call("micromix::quantize_reference", stack);
    return {to<Tensor>(stack[0]), to<Tensor>(stack[1])};
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(micromix, CUDA, m) {
  m.impl("quantize", TORCH_BOX(&quantize));
  m.impl("rms_norm_quantize", TORCH_BOX(&rms_norm_quantize<run>));
  m.impl("layer_norm_quantize", TORCH_BOX(&layer_norm_quantize<run>));
  m.impl("pointwise_quantize", TORCH_BOX(&pointwise_quantize<run>));
}

}  // namespace micromix::cuda
