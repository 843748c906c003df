// What the CUDA library was built from and for.
#include <torch/csrc/stable/library.h>

#include <string>

#include "../abi.h"

namespace {

// One "key=value" a line.
std::string cuda_build_info() {
  return "abi=" + std::to_string(MICROMIX_ABI) +
         "\nbuild_id=" MICROMIX_BUILD_ID "\narchitectures=" MICROMIX_CUDA_ARCHITECTURES;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(micromix, m) { m.def("cuda_build_info() -> str"); }

STABLE_TORCH_LIBRARY_IMPL(micromix, CompositeExplicitAutograd, m) {
  m.impl("cuda_build_info", TORCH_BOX(&cuda_build_info));
}
