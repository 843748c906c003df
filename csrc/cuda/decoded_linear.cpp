// Products of operands that are decoded to bfloat16.
//
// An element times its scale, over the largest scale of its row, is a bfloat16 number, so decoding
// is exact but for blocks 2^124 below that. Few rows meet a weight that is decoded on the way to
// the tensor cores. For more it is decoded to memory, and cuBLAS sums in float32 and gives float32:
// in bfloat16 it may round partial sums. One kernel then applies the powers of two, adds the bias
// and rounds.
#include "decoded_linear.h"

#include <algorithm>
#include <array>

#include "decode.h"

namespace micromix::cuda {
namespace {

using torch::stable::detail::from;
using torch::stable::detail::to;

// Of a decoded weight: a vocabulary's would be gigabytes.
constexpr int64_t kMostWeightBytes = 128 << 20;

DecodedRows packed_rows(const mx::MixedLayout& layout, const uint8_t* data, const uint8_t* scales,
                        int64_t rows) {
  const auto segments = layout.segments();
  DecodedRows packed{};
  packed.data = data;
  packed.scales = scales;
  packed.rows = rows;
  packed.row_bytes = layout.row_bytes();
  packed.end4 = static_cast<int32_t>(segments[1].first_block);
  packed.end6 = static_cast<int32_t>(segments[2].first_block);
  packed.blocks = static_cast<int32_t>(layout.blocks());
  packed.start6 = static_cast<int32_t>(segments[1].byte_start);
  packed.start8 = static_cast<int32_t>(segments[2].byte_start);
  packed.e3m2 = layout.format6() == mx::E3M2;
  return packed;
}

struct Decoded {
  Tensor values, exponents;

  const int32_t* exponent() const {
    return static_cast<const int32_t*>(exponents.const_data_ptr());
  }
};

Decoded decode(const char* op, const OnDevice& on, const Tensor& like,
               const mx::MixedLayout& layout, DecodedRows packed) {
  const int64_t sizes[2] = {packed.rows, layout.channels()};
  Decoded decoded{empty_of(like, sizes, aoti_torch_dtype_bfloat16()),
                  empty_vector(like, packed.rows, aoti_torch_dtype_int32())};
  packed.values = decoded.values.mutable_data_ptr();
  packed.exponents = static_cast<int32_t*>(decoded.exponents.mutable_data_ptr());
  check(launch_decode(packed, on.stream), op);
  return decoded;
}

// a [m, k] times b [n, k] transposed, in float32.
Tensor product(const Tensor& a, const Tensor& b) {
  std::array stack{from(a), from(torch::stable::transpose(b, 0, 1)), from(ScalarType::Float)};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::mm", "dtype", stack.data(), TORCH_ABI_VERSION));
  return to<Tensor>(stack[0]);
}

}  // namespace

void decoded_products(const char* op, const OnDevice& on, const Tensor& data, const Tensor& scales,
                      int64_t m, std::span<Layer> layers, const mx::MixedLayout& layout) {
  if (m == 0) return;
  const auto bytes_of = [](const Tensor& t) {
    return static_cast<const uint8_t*>(t.const_data_ptr());
  };
  const auto at = [](const void* numbers, Dtype dtype, int64_t i) {
    return const_cast<char*>(static_cast<const char*>(numbers)) +
           i * (dtype == Dtype::kFloat32 ? 4 : 2);
  };
  const Decoded rows =
      decode(op, on, data, layout, packed_rows(layout, bytes_of(data), bytes_of(scales), m));
  const mx::MixedLayout own = layout.weight();
  const int64_t most =
      std::max<int64_t>(kMostWeightBytes / (2 * std::max<int64_t>(own.channels(), 1)), 1);
  for (Layer& layer : layers) {
    if (layer.n == 0) continue;
    const Dtype dtype = checked_dtype(op, "dtype", layer.result->scalar_type());
    const Dtype bias_dtype =
        layer.bias ? checked_dtype(op, "bias", layer.bias->scalar_type()) : Dtype::kFloat32;
    const void* const bias = layer.bias ? layer.bias->const_data_ptr() : nullptr;
    void* const out = layer.result->mutable_data_ptr();
    const uint8_t* const weight = bytes_of(layer.weight);
    const uint8_t* const weight_scales = weight + layer.n * own.row_bytes();
    if (m <= kFewRows) {
      FewRows task{};
      task.x = rows.values.const_data_ptr();
      task.row_exponents = rows.exponent();
      task.m = static_cast<int32_t>(m);
      task.weight = packed_rows(own, weight, weight_scales, layer.n);
      task.bias = bias;
      task.bias_dtype = bias_dtype;
      task.out = out;
      task.out_dtype = dtype;
      check(launch_few_rows(task, on.stream), op);
      continue;
    }
    for (int64_t first = 0; first < layer.n; first += most) {
      const int64_t n = std::min(most, layer.n - first);
      const Decoded columns = decode(op, on, data, own,
                                     packed_rows(own, weight + first * own.row_bytes(),
                                                 weight_scales + first * own.blocks(), n));
      const Tensor sums = product(rows.values, columns.values);
      FinishedSums finished{};
      finished.sums = static_cast<const float*>(sums.const_data_ptr());
      finished.row_exponents = rows.exponent();
      finished.column_exponents = columns.exponent();
      finished.m = m;
      finished.n = n;
      finished.stride = layer.n;
      finished.bias = bias ? at(bias, bias_dtype, first) : nullptr;
      finished.bias_dtype = bias_dtype;
      finished.out = at(out, dtype, first);
      finished.out_dtype = dtype;
      check(launch_finish(finished, on.stream), op);
    }
  }
}

}  // namespace micromix::cuda
