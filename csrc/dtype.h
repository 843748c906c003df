// The floating-point types that operators read and write.
#pragma once

namespace micromix {

enum class Dtype : int { kBFloat16, kFloat16, kFloat32 };

}  // namespace micromix
