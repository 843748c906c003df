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

void run(const Tensor&, const RowTask& task, int64_t rows, const RowOutput& output) {
  const int64_t k = task.k;
  const cpu::RowKernel kernel = row_kernels().of(task.row_function);
  const cpu::QuantizeKernel& quantize = cpu::quantize_kernel();
  const cpu::QuantizeTask all{output.layout, nullptr,     task.dtype,   k,
                              output.order,  output.data, output.scales};
  const int64_t together = output.order ? quantize.ordered_rows : 1;
  const int64_t y_bytes = k * (task.dtype == Dtype::kFloat32 ? sizeof(float) : sizeof(uint16_t));
  // Scratch: a row as float32, rows of y, and what quantise needs.
  const int64_t rows_at = cpu::round_up(k * static_cast<int64_t>(sizeof(float)), cpu::kLine);
  const int64_t quantize_at = rows_at + cpu::round_up(together * y_bytes, cpu::kLine);
  const int64_t scratch_bytes = quantize_at + quantize.scratch_bytes(all);
  const int64_t grain = 1 + quantize.grain_channels / (output.layout.channels() + k + 1);
  parallel(rows, grain, [&](int64_t first, int64_t last) {
    cpu::ThreadBuffer buffer(cpu::Buffer::kScratch, scratch_bytes);
    auto* const values = reinterpret_cast<float*>(buffer.data());
    for (int64_t r = first; r < last; r += together) {
      const int64_t count = last - r < together ? last - r : together;
      uint8_t* const y =
          task.kept ? static_cast<uint8_t*>(task.kept) + r * y_bytes : buffer.data() + rows_at;
      for (int64_t i = 0; i < count; ++i) kernel(task, r + i, values, y + i * y_bytes);
      cpu::QuantizeTask some = all;
      some.x = y;
      some.data += r * some.layout.row_bytes();
      some.scales += r * some.layout.blocks();
      quantize.run(some, 0, count, buffer.data() + quantize_at);
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(micromix, m) {
  m.def(
      "rms_norm_quantize(Tensor x, Tensor? residual, Tensor? weight, float eps, int form, "
      "ScalarType dtype, bool keep, Tensor? order, int k4, int k6, int k8, int format) "
      "-> (Tensor sum, Tensor y, Tensor data, Tensor scales)");
  m.def(
      "layer_norm_quantize(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, float eps, "
      "ScalarType dtype, bool keep, Tensor? order, int k4, int k6, int k8, int format) "
      "-> (Tensor sum, Tensor y, Tensor data, Tensor scales)");
  m.def(
      "pointwise_quantize(Tensor x, Tensor? other, int function, ScalarType dtype, bool keep, "
      "Tensor? order, int k4, int k6, int k8, int format) "
      "-> (Tensor y, Tensor data, Tensor scales)");
}

STABLE_TORCH_LIBRARY_IMPL(micromix, CPU, m) {
  m.impl("rms_norm_quantize", TORCH_BOX(&rms_norm_quantize<run>));
  m.impl("layer_norm_quantize", TORCH_BOX(&layer_norm_quantize<run>));
  m.impl("pointwise_quantize", TORCH_BOX(&pointwise_quantize<run>));
}
