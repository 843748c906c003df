// The element formats as template arguments.
#pragma once

#include "../mx/elements.h"

namespace micromix::blackwell {

enum class Element : int { kE2M1, kE2M3, kE3M2, kE4M3 };

MX_HOST_DEVICE constexpr mx::ElementFormat format_of(Element element) {
  switch (element) {
    case Element::kE2M1:
      return mx::E2M1;
    case Element::kE2M3:
      return mx::E2M3;
    case Element::kE3M2:
      return mx::E3M2;
    case Element::kE4M3:
      return mx::E4M3;
  }
  return mx::E2M1;
}

MX_HOST_DEVICE constexpr int bits_of(Element element) { return format_of(element).bits; }

}  // namespace micromix::blackwell
