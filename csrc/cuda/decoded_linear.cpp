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

#include "decode.h"

namespace micromix::cuda {
namespace {

using torch::stable::detail::from;
using torch::stable::detail::to;

// Of a decoded weight: a vocabulary's would be gigabytes.
constexpr int64_t kMostWeightBytes = 128 << 20;

const uint8_t* bytes_of(const Tensor& t) { return static_cast<const uint8_t*>(t.const_data_ptr()); }
uint8_t* writable_bytes_of(const Tensor& t) { return static_cast<uint8_t*>(t.mutable_data_ptr()); }

// Rows of a placed weight from `first` on, which begins a panel.
PlacedRows placed_rows(const mx::MixedLayout& own, const Layer& layer, int64_t first,
                       int64_t rows) {
  const Steps steps(own);
  const uint8_t* const panels = bytes_of(layer.weight);
  return {.panels = panels + first / kPanelRows * steps.panel_bytes(),
          .largest = panels + panels_of(layer.n) * steps.panel_bytes() + first,
          .rows = rows,
          .steps = steps,
          .e3m2 = own.format6() == mx::E3M2};
}

// Results of a layer from column `first` on.
Results results_of(const char* op, const Layer& layer, const Tensor& largest_of_rows,
                   const PlacedRows& weight, int64_t m, int64_t first) {
  const auto at = [&](const void* numbers, Dtype dtype) {
    return const_cast<char*>(static_cast<const char*>(numbers)) +
           first * (dtype == Dtype::kFloat32 ? 4 : 2);
  };
  Results results{};
  results.largest_of_rows = bytes_of(largest_of_rows);
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

Tensor empty_values(const Tensor& like, int64_t rows, int64_t channels) {
  const int64_t sizes[2] = {rows, channels};
  return empty_of(like, sizes, aoti_torch_dtype_bfloat16());
}

// a [m, k] times b [n, k] transposed, in float32.
Tensor product(const Tensor& a, const Tensor& b) {
  std::array stack{from(a), from(torch::stable::transpose(b, 0, 1)), from(ScalarType::Float)};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::mm", "dtype", stack.data(), TORCH_ABI_VERSION));
  return to<Tensor>(stack[0]);
}

template <typename Rows>
void products_of(const char* op, const Launcher& launcher, const Tensor& like, const Rows& rows,
                 std::span<Layer> layers, const mx::MixedLayout& layout) {
  const int64_t m = rows.rows;
  if (m == 0) return;
  const mx::MixedLayout own = layout.weight();
  const bool few = m <= kFewRows, tiled = !few && launcher.warpgroups;
  Tensor largest = empty_vector(like, tiled ? padded_rows(m) : m, aoti_torch_dtype_uint8());
  Tensor x = tiled ? empty_vector(like, tile_bytes(Steps(own), m), aoti_torch_dtype_uint8())
                   : empty_values(like, m, layout.channels());
  check(tiled ? launch_decode_tiles(rows, Steps(own), x.mutable_data_ptr(),
                                    writable_bytes_of(largest), launcher)
              : launch_decode(rows, x.mutable_data_ptr(), writable_bytes_of(largest), launcher),
        op);
  if (few || tiled) {
    static_assert(kMostLayers <= kMostProducts);
    std::array<LayerProduct, kMostProducts> products;
    size_t count = 0;
    for (const Layer& layer : layers) {
      if (layer.n == 0) continue;
      const PlacedRows weight = placed_rows(own, layer, 0, layer.n);
      products[count++] = {weight, results_of(op, layer, largest, weight, m, 0)};
    }
    if (count == 0) return;
    check((few ? launch_few_rows : launch_many_rows)(x.const_data_ptr(), {products.data(), count},
                                                     launcher),
          op);
    return;
  }
  for (const Layer& layer : layers) {
    if (layer.n == 0) continue;
    const int64_t row_bytes = 2 * std::max<int64_t>(own.channels(), 1);
    const int64_t most =
        std::max<int64_t>(kMostWeightBytes / row_bytes / kPanelRows, 1) * kPanelRows;
    for (int64_t first = 0; first < layer.n; first += most) {
      const PlacedRows weight = placed_rows(own, layer, first, std::min(most, layer.n - first));
      Tensor values = empty_values(like, weight.rows, own.channels());
      check(launch_decode_weight(weight, values.mutable_data_ptr(), launcher), op);
      const Tensor sums = product(x, values);
      check(launch_finish(static_cast<const float*>(sums.const_data_ptr()),
                          results_of(op, layer, largest, weight, m, first), launcher),
            op);
    }
  }
}

}  // namespace

void place_decoded(const char* op, const OnDevice& on, const Tensor& data, const Tensor& scales,
                   const mx::MixedLayout& layout, Tensor& placed) {
  const mx::MixedLayout own = layout.weight();
  const int64_t n = data.size(0);
  if (n == 0) return;
  check(launch_place(packed_rows(own, bytes_of(data), bytes_of(scales), n), Steps(own),
                     writable_bytes_of(placed), Launcher{on.stream, on.index}),
        op);
}

void decoded_products(const char* op, const Launcher& launcher, const Tensor& like,
                      const PackedRows& rows, std::span<Layer> layers,
                      const mx::MixedLayout& layout) {
  products_of(op, launcher, like, rows, layers, layout);
}
void decoded_products(const char* op, const Launcher& launcher, const Tensor& like,
                      const FloatRows& rows, std::span<Layer> layers,
                      const mx::MixedLayout& layout) {
  products_of(op, launcher, like, rows, layers, layout);
}

}  // namespace micromix::cuda
