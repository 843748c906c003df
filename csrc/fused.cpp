// micromix:: operators that quantise what they compute: a norm, an activation or a sum, row by row,
// so that the value itself need not go through memory. The numbers are those of the two steps
// apart.
#include <torch/csrc/stable/library.h>

#include "cpu/isa.h"
#include "cpu/memory.h"
#include "cpu/rows.h"
#include "row_operators.h"

namespace {

using namespace micromix;

const cpu::RowKernels& row_kernels() {
#if defined(MICROMIX_X86)
  if (cpu::current_isa() >= cpu::Isa::kAvx512) return cpu::kRowsAvx512;
  if (cpu::current_isa() >= cpu::Isa::kAvx2) return cpu::kRowsAvx2;
#endif
  return cpu::kRowsPortable;
}

void run(const Tensor&, const RowTask& task, int64_t rows, const std::vector<RowOutput>& outputs) {
  const int64_t k = task.k;
  const cpu::RowKernel kernel = row_kernels().of(task.row_function);
  const auto store = row_kernels().store;
  const cpu::QuantizeKernel& quantize = cpu::quantize_kernel();
  std::vector<cpu::QuantizeTask> tasks;
  int64_t scratch_bytes = 0, channels = 0;
  for (const RowOutput& output : outputs) {
    tasks.push_back(
        {output.layout, nullptr, Dtype::kFloat32, k, output.order, output.data, output.scales});
    const int64_t bytes = quantize.scratch_bytes(tasks.back());
    scratch_bytes = bytes > scratch_bytes ? bytes : scratch_bytes;
    channels += output.layout.channels();
  }
  const int64_t row_bytes = cpu::row_scratch_bytes(k);
  const int64_t grain = 1 + quantize.grain_channels / (channels + k + 1);
  parallel(rows, grain, [&](int64_t first, int64_t last) {
    cpu::ThreadBuffer buffer(cpu::Buffer::kScratch, row_bytes + scratch_bytes);
    auto* const row = reinterpret_cast<float*>(buffer.data());
    for (int64_t r = first; r < last; ++r) {
      kernel(task, r, row);
      if (task.kept) store(row, k, task.dtype, task.kept, r * k);
      for (cpu::QuantizeTask one : tasks) {
        one.x = row;
        one.data += r * one.layout.row_bytes();
        one.scales += r * one.layout.blocks();
        quantize.run(one, 0, 1, buffer.data() + row_bytes);
      }
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(micromix, m) {
  m.def(
      "rms_norm_quantize(Tensor x, Tensor? residual, Tensor? weight, float eps, int form, "
      "ScalarType dtype, bool keep, Tensor?[] orders, int[] layouts) -> Tensor[]");
  m.def(
      "layer_norm_quantize(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, float eps, "
      "ScalarType dtype, bool keep, Tensor?[] orders, int[] layouts) -> Tensor[]");
  m.def(
      "pointwise_quantize(Tensor x, Tensor? other, int function, ScalarType dtype, bool keep, "
      "Tensor?[] orders, int[] layouts) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(micromix, CPU, m) {
  m.impl("rms_norm_quantize", TORCH_BOX(&rms_norm_quantize<run>));
  m.impl("layer_norm_quantize", TORCH_BOX(&layer_norm_quantize<run>));
  m.impl("pointwise_quantize", TORCH_BOX(&pointwise_quantize<run>));
}
