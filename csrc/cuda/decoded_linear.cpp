// Products of operands that are decoded to bfloat16.
//
// An element times its scale, over the largest scale of its row, is a bfloat16 number, so decoding
// is exact but for blocks 2^124 below that. Few rows meet a weight that is decoded on the way to
// the tensor cores, and so do many on Hopper. Elsewhere many rows have it decoded to memory, and
// cuBLAS sums in float32 and gives float32: in bfloat16 it may round partial sums. One kernel then
// applies the powers of two, adds the bias and rounds.
#include "decoded_linear.h"

#include <algorithm>
#include <array>
#include <limits>

#include "decode.h"

namespace micromix::cuda {
namespace {

using torch::stable::detail::from;
using torch::stable::detail::to;

// Of a decoded weight: a vocabulary's would be gigabytes.
constexpr int64_t kMostWeightBytes = 128 << 20;

const uint8_t* bytes_of(const Tensor& t) { return static_cast<const uint8_t*>(t.const_data_ptr()); }
uint8_t* writable_bytes_of(const Tensor& t) { return static_cast<uint8_t*>(t.mutable_data_ptr()); }

PackedRows packed_rows(const mx::MixedLayout& layout, const uint8_t* data, const uint8_t* scales,
                       const uint8_t* largest, int64_t rows) {
  const auto segments = layout.segments();
  return {.data = data,
          .scales = scales,
          .largest = largest,
          .rows = rows,
          .row_bytes = layout.row_bytes(),
          .end4 = static_cast<int32_t>(segments[1].first_block),
          .end6 = static_cast<int32_t>(segments[2].first_block),
          .blocks = static_cast<int32_t>(layout.blocks()),
          .start6 = static_cast<int32_t>(segments[1].byte_start),
          .start8 = static_cast<int32_t>(segments[2].byte_start),
          .e3m2 = layout.format6() == mx::E3M2};
}

// Rows [first, first + count) of a placed weight of n.
PackedRows placed_rows(const mx::MixedLayout& own, const uint8_t* placed, int64_t n, int64_t first,
                       int64_t count) {
  const uint8_t* const scales = placed + n * own.row_bytes();
  const uint8_t* const largest = scales + n * own.blocks();
  return packed_rows(own, placed + first * own.row_bytes(), scales + first * own.blocks(),
                     largest + first, count);
}

// Results of a layer from column `first` on.
Results results_of(const char* op, const Layer& layer, const uint8_t* largest_of_rows,
                   const PackedRows& weight, int64_t m, int64_t first) {
  const auto at = [&](const void* numbers, Dtype dtype) {
    return const_cast<char*>(static_cast<const char*>(numbers)) +
           first * (dtype == Dtype::kFloat32 ? 4 : 2);
  };
  Results results{};
  results.largest_of_rows = largest_of_rows;
  results.largest_of_columns = weight.largest;
  results.m = m;
  results.n = weight.rows;
  results.stride = layer.n;
  if (layer.bias) {
    results.bias_dtype = checked_dtype(op, "bias", layer.bias->scalar_type());
    results.bias = at(layer.bias->const_data_ptr(), results.bias_dtype);
  }
  results.out_dtype = checked_dtype(op, "dtype", layer.result->scalar_type());
  results.out = at(layer.result->mutable_data_ptr(), results.out_dtype);
  return results;
}

Tensor decoded(const char* op, const OnDevice& on, const Tensor& like, int64_t channels,
               const PackedRows& rows, uint8_t* largest) {
  const int64_t sizes[2] = {rows.rows, channels};
  Tensor values = empty_of(like, sizes, aoti_torch_dtype_bfloat16());
  check(launch_decode(rows, values.mutable_data_ptr(), largest, on.stream), op);
  return values;
}

// a [m, k] times b [n, k] transposed, in float32.
Tensor product(const Tensor& a, const Tensor& b) {
  std::array stack{from(a), from(torch::stable::transpose(b, 0, 1)), from(ScalarType::Float)};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::mm", "dtype", stack.data(), TORCH_ABI_VERSION));
  return to<Tensor>(stack[0]);
}

}  // namespace

void place_decoded(const char* op, const OnDevice& on, const Tensor& data, const Tensor& scales,
                   const mx::MixedLayout& layout, Tensor& placed) {
  const mx::MixedLayout own = layout.weight();
  const int64_t n = data.size(0);
  uint8_t* const to = writable_bytes_of(placed);
  const auto copy = [&](uint8_t* to, const Tensor& from) {
    check(cudaMemcpyAsync(to, bytes_of(from), from.numel(), cudaMemcpyDeviceToDevice, on.stream),
          op);
  };
  if (n == 0) return;
  copy(to, data);
  copy(to + n * own.row_bytes(), scales);
  check(launch_find_largest(packed_rows(own, bytes_of(data), bytes_of(scales), nullptr, n),
                            to + n * (own.row_bytes() + own.blocks()), on.stream),
        op);
}

void decoded_products(const char* op, const OnDevice& on, int multiprocessors, const Tensor& data,
                      const Tensor& scales, int64_t m, std::span<Layer> layers,
                      const mx::MixedLayout& layout) {
  if (m == 0) return;
  const mx::MixedLayout own = layout.weight();
  const PackedRows rows = packed_rows(layout, bytes_of(data), bytes_of(scales), nullptr, m);
  const Tensor largest = empty_vector(data, m, aoti_torch_dtype_uint8());
  if (m > kFewRows && has_many_rows()) {
    const PackedRows weight = packed_rows(own, nullptr, nullptr, nullptr, 0);
    const Tiles tiles{{weight.end4, weight.end6, weight.blocks}, padded_rows(m)};
    const Tensor x = empty_vector(data, tiles.bytes(), aoti_torch_dtype_uint8());
    check(launch_decode_tiles(rows, tiles, x.mutable_data_ptr(), writable_bytes_of(largest),
                              on.stream),
          op);
    for (const Layer& layer : layers) {
      if (layer.n == 0) continue;
      const PackedRows packed = placed_rows(own, bytes_of(layer.weight), layer.n, 0, layer.n);
      check(launch_many_rows(x.const_data_ptr(), tiles, packed,
                             results_of(op, layer, bytes_of(largest), packed, m, 0),
                             multiprocessors, on.stream),
            op);
    }
    return;
  }
  const Tensor x = decoded(op, on, data, layout.channels(), rows, writable_bytes_of(largest));
  const int64_t most =
      m <= kFewRows
          ? std::numeric_limits<int64_t>::max()
          : std::max<int64_t>(kMostWeightBytes / (2 * std::max<int64_t>(own.channels(), 1)), 1);
  for (const Layer& layer : layers) {
    for (int64_t first = 0; first < layer.n; first += std::min(most, layer.n - first)) {
      const PackedRows weight =
          placed_rows(own, bytes_of(layer.weight), layer.n, first, std::min(most, layer.n - first));
      const Results results = results_of(op, layer, bytes_of(largest), weight, m, first);
      if (m <= kFewRows) {
        check(launch_few_rows(x.const_data_ptr(), weight, results, on.stream), op);
        continue;
      }
      const Tensor sums = product(x, decoded(op, on, data, own.channels(), weight, nullptr));
      check(launch_finish(static_cast<const float*>(sums.const_data_ptr()), results, on.stream),
            op);
    }
  }
}

}  // namespace micromix::cuda
