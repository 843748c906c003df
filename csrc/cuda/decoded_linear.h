// Products whose operands are decoded to bfloat16: for devices that have tensor cores, but no
// instructions with block scales.
#pragma once

#include <span>

#include "../product_operators.h"
#include "device.h"

namespace micromix::cuda {

// A placed weight: its packed rows, their scales, and the largest scale of each row.
inline int64_t decoded_weight_bytes(const mx::MixedLayout& layout, int64_t n) {
  return n * (layout.weight().row_bytes() + layout.weight().blocks() + 1);
}
void place_decoded(const char* op, const OnDevice& on, const Tensor& data, const Tensor& scales,
                   const mx::MixedLayout& layout, Tensor& placed);

// Brings the products of `m` packed rows to the results of the layers, which are checked.
void decoded_products(const char* op, const OnDevice& on, int multiprocessors, const Tensor& data,
                      const Tensor& scales, int64_t m, std::span<Layer> layers,
                      const mx::MixedLayout& layout);

}  // namespace micromix::cuda
