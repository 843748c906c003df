// What a CPU kernel is given and what it offers. The operators (ops.cpp) check arguments, allocate,
// and run kernels over ranges on torch's threads; kernels know nothing of torch.
#pragma once

#include "../dtype.h"
#include "placed.h"

namespace micromix::cpu {

using micromix::Dtype;

// Reorders, pads and casts rows of `x`. `order` may be null: the identity, then zeros.
struct QuantizeTask {
  mx::MixedLayout layout;
  const void* x;
  Dtype x_dtype;
  int64_t k;             // channels of x
  const int32_t* order;  // [layout.channels()], -1 for padding
  uint8_t* data;
  uint8_t* scales;
};

struct QuantizeKernel {
  const char* name;
  int64_t grain_channels;  // work that pays for a second thread
  int64_t ordered_rows;    // so many rows of a 16-bit type are put in order together
  // Bytes of scratch, 64-byte aligned, that a call of `run` needs.
  int64_t (*scratch_bytes)(const QuantizeTask&);
  void (*run)(const QuantizeTask&, int64_t first_row, int64_t last_row, void* scratch);
};

// out[m, n] = sum over blocks of 2^(sa + sw - 254) * dot(qa, qw), + bias[n]. The activations are
// packed rows, `data` and `scales`; or, where the product is weight-only, float rows, `x`, which
// `prepare` puts in order, rotates and rounds to bfloat16 (float_rows.h).
struct LinearTask {
  mx::MixedLayout layout;
  int64_t m, n;
  const uint8_t* data = nullptr;
  const uint8_t* scales = nullptr;
  bool weight_only = false;
  const void* x = nullptr;  // [m, k]
  Dtype x_dtype = Dtype::kFloat32;
  int64_t k = 0;
  const int32_t* order = nullptr;   // [layout.channels()], -1 for padding; null is the identity
  const uint8_t* weight = nullptr;  // placed
  const void* bias = nullptr;       // [n], or null
  Dtype bias_dtype = Dtype::kFloat32;
  void* out = nullptr;  // [m, n]
  Dtype out_dtype = Dtype::kFloat32;
  const uint8_t* arranged = nullptr;  // what the kernel's `arrange` left
  // [m], the rows of `out`, where they are not the first m: of AVX-512's kernel alone.
  const int64_t* out_rows = nullptr;

  // The product of row r alone, to be prepared anew.
  LinearTask of_row(int64_t r) const {
    const auto bytes = [](Dtype dtype) -> int64_t {
      return dtype == Dtype::kFloat32 ? sizeof(float) : sizeof(uint16_t);
    };
    LinearTask one = *this;
    one.m = 1;
    if (weight_only) {
      one.x = static_cast<const uint8_t*>(x) + r * k * bytes(x_dtype);
    } else {
      one.data += r * layout.row_bytes();
      one.scales += r * layout.blocks();
    }
    one.out = static_cast<uint8_t*>(out) + r * n * bytes(out_dtype);
    return one;
  }
};

// First `arrange`, where a kernel has it, looks at all rows and says where they go; then `prepare`
// runs over them and decodes the activations into the form that the kernel wants, then `run` over
// all panels. Each range can be split in any way: no result depends on it.
// What `prepare` leaves depends on the activations, m and the layout alone: several weights share
// it.
struct LinearKernel {
  const char* name;
  int64_t grain_channels;  // work of `prepare` that pays for a second thread
  int64_t grain_products;  // the same of `run`
  int64_t (*prepared_bytes)(const LinearTask&);
  int64_t (*scratch_bytes)(const LinearTask&);
  void (*prepare)(const LinearTask&, int64_t first_row, int64_t last_row, uint8_t* prepared);
  void (*run)(const LinearTask&, const uint8_t* prepared, int64_t first_panel, int64_t last_panel,
              void* scratch);
  int64_t (*arranged_bytes)(const LinearTask&) = nullptr;
  void (*arrange)(const LinearTask&, uint8_t* arranged) = nullptr;
};

extern const QuantizeKernel kQuantizePortable;
extern const LinearKernel kLinearPortable;
#if defined(MICROMIX_X86)
extern const QuantizeKernel kQuantizeAvx2;
extern const QuantizeKernel kQuantizeAvx512;
extern const LinearKernel kLinearAvx2;
extern const LinearKernel kLinearAvx512;
extern const LinearKernel kFewRowsAvx512Bf16;
extern const LinearKernel kLinearAvx512Bf16;
extern const LinearKernel kLinearAmx;
#endif

// Regroups rows [N, row bytes] and [N, blocks] into panels of a placed weight. Returns whether some
// scale lies outside the plain range.
bool place_panels(const mx::MixedLayout& layout, int64_t n, const uint8_t* data,
                  const uint8_t* scales, uint8_t* placed, int64_t first_panel, int64_t last_panel);

// The way back. A block of zeros gets scale byte 0, as quantise gives it.
void unplace_panels(const mx::MixedLayout& layout, int64_t n, const uint8_t* placed, uint8_t* data,
                    uint8_t* scales, int64_t first_panel, int64_t last_panel);

}  // namespace micromix::cpu
