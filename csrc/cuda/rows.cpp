// micromix::quantize and the operators that quantise what they compute, on CUDA devices.
#include "rows.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <limits>

#include "../row_operators.h"
#include "device.h"

namespace micromix::cuda {
namespace {

constexpr int64_t kMostChannels = int64_t{1} << 24;  // positions are 32-bit, with room for sums

bool aligned(const void* data, int64_t stride, Dtype dtype) {
  const int64_t bytes = dtype == Dtype::kFloat32 ? 4 : 2;
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride * bytes % 16 == 0;
}

Output output_of(const RowOutput& from) {
  const auto segments = from.layout.segments();
  const auto increment = [&](int i) {
    return mx::scale_increment(segments[i].format, segments[i].rule);
  };
  Output to;
  to.order = from.order;
  to.order_aligned = reinterpret_cast<uintptr_t>(from.order) % 16 == 0;
  to.data = from.data;
  to.scales = from.scales;
  to.row_bytes = from.layout.row_bytes();
  to.end4 = static_cast<int32_t>(segments[0].blocks);
  to.end6 = static_cast<int32_t>(segments[0].blocks + segments[1].blocks);
  to.blocks = static_cast<int32_t>(from.layout.blocks());
  to.start6 = static_cast<int32_t>(segments[1].byte_start);
  to.start8 = static_cast<int32_t>(segments[2].byte_start);
  to.increment4 = increment(0);
  to.increment6 = increment(1);
  to.increment8 = increment(2);
  to.e3m2 = segments[1].format == mx::E3M2;
  return to;
}

Types types_of(const RowTask& task) {
  const bool one = task.x.dtype == task.dtype &&
                   (task.second.data == nullptr || task.second.dtype == task.dtype);
  if (!one) return Types::kAny;
  return task.dtype == Dtype::kBFloat16  ? Types::kBFloat16
         : task.dtype == Dtype::kFloat16 ? Types::kFloat16
                                         : Types::kFloat32;
}

// One launch: at most kMaxOutputs outputs.
void launch_some(int device, cudaStream_t stream, const RowTask& task, int64_t count,
                 const RowOutput* outputs, int output_count) {
  Rows rows{};
  rows.task = task;
  rows.k = static_cast<int32_t>(task.k);
  rows.x_aligned = aligned(task.x.data, task.x.stride, task.x.dtype);
  rows.second_aligned = aligned(task.second.data, task.second.stride, task.second.dtype);
  rows.weight_aligned = aligned(task.weight.data, 0, task.weight.dtype);
  rows.bias_aligned = aligned(task.bias.data, 0, task.bias.dtype);
  rows.sum_aligned = aligned(task.sum, task.k, task.x.dtype);
  rows.kept_aligned = aligned(task.kept, task.k, task.dtype);
  rows.groups = static_cast<int32_t>((task.k + 7) / 8);
  rows.outputs = output_count;
  int32_t widest = rows.groups;
  for (int i = 0; i < output_count; ++i) {
    rows.output[i] = output_of(outputs[i]);
    const int32_t groups = 4 * rows.output[i].blocks;
    widest = std::max(widest, groups);
    if (outputs[i].order == nullptr) rows.groups = std::max(rows.groups, groups);
    rows.ordered = rows.ordered || outputs[i].order != nullptr;
  }

  Launch launch{};
  launch.rows = static_cast<unsigned>(count);
  const int per_thread = 2;
  const int most = widest > 2048 ? 1024 : 512;
  launch.threads = std::clamp((widest / per_thread + 31) / 32 * 32, 32, most);
  launch.types = types_of(task);
  launch.stream = stream;
  const bool waits = rows.ordered || task.row_function != RowFunction::kPointwise;
  const int64_t bytes = waits ? staged_bytes(task.k, launch.types) : 0;
  int largest = 0;
  check(cudaDeviceGetAttribute(&largest, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
        "quantize");
  launch.staged = bytes + kOtherSharedBytes <= largest;
  launch.bytes = launch.staged ? static_cast<int>(bytes) : 0;

  const auto function = task.row_function == RowFunction::kRmsNorm     ? launch_rms_norm
                        : task.row_function == RowFunction::kLayerNorm ? launch_layer_norm
                                                                       : launch_pointwise;
  check(function(rows, launch), "quantize");
}

void run(const Tensor& x, const RowTask& task, int64_t rows,
         const std::vector<RowOutput>& outputs) {
  MICROMIX_CHECK(task.k <= kMostChannels && rows <= std::numeric_limits<int32_t>::max(),
                 "micromix: the CUDA kernels take up to ", kMostChannels,
                 " channels and 2^31 - 1 rows; got ", task.k, " and ", rows);
  for (const RowOutput& output : outputs)
    MICROMIX_CHECK(output.layout.channels() <= kMostChannels,
                   "micromix: the CUDA kernels take up to ", kMostChannels, " channels; got ",
                   output.layout.channels());
  const OnDevice device(x);
  const int count = static_cast<int>(outputs.size());
  RowTask own = task;
  for (int first = 0; first == 0 || first < count; first += kMaxOutputs) {
    launch_some(device.index, device.stream, own, rows, outputs.data() + first,
                std::min(kMaxOutputs, count - first));
    own.kept = own.sum = nullptr;  // stored by the first launch
  }
}

std::tuple<Tensor, Tensor> quantize(Tensor x, std::optional<Tensor> order, int64_t k4, int64_t k6,
                                    int64_t k8, int64_t format) {
  constexpr const char* kOp = "quantize";
  const mx::MixedLayout layout = checked_layout(kOp, k4, k6, k8, format);
  const OnDevice device(x);
  RowTask task = row_task(kOp, RowFunction::kPointwise, x, x.scalar_type());
  std::vector<Tensor> results;
  const RowOutput output = row_output(kOp, x, task.k, order, layout, results);
  const int64_t rows = rows_of(x);
  if (rows > 0) run(x, task, rows, {output});
  return {results[0], results[1]};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(micromix, CUDA, m) {
  m.impl("quantize", TORCH_BOX(&quantize));
  m.impl("rms_norm_quantize", TORCH_BOX(&rms_norm_quantize<run>));
  m.impl("layer_norm_quantize", TORCH_BOX(&layer_norm_quantize<run>));
  m.impl("pointwise_quantize", TORCH_BOX(&pointwise_quantize<run>));
}

}  // namespace micromix::cuda
