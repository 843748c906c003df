// Products whose operands are decoded to bfloat16: for devices that have tensor cores, but no
// instructions with block scales.
#pragma once

#include <span>

#include "../product_operators.h"
#include "decode.h"
#include "device.h"

namespace micromix::cuda {

// Fills in `placed`, decoded_weight_bytes of them.
void place_decoded(const char* op, const OnDevice& on, const Tensor& data, const Tensor& scales,
                   const mx::MixedLayout& layout, Tensor& placed);

// Brings the products of rows, of this layout, to the results of the layers, which are checked.
// `like`: a tensor on the device.
void decoded_products(const char* op, const Launcher& launcher, const Tensor& like,
                      const PackedRows& rows, std::span<Layer> layers,
                      const mx::MixedLayout& layout);
void decoded_products(const char* op, const Launcher& launcher, const Tensor& like,
                      const FloatRows& rows, std::span<Layer> layers,
                      const mx::MixedLayout& layout);

}  // namespace micromix::cuda
