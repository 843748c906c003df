// Errors that reach the user as RuntimeError.
//
// The stable ABI's own STD_TORCH_CHECK formats with std::ostringstream. Where the compiler links
// libstdc++ into the library (seen with g++ 13 of a CUDA image), its stream classes and those of
// torch's libstdc++ mix, and the formatting crashes instead of throwing. Strings have no such
// state.
#pragma once

#include <concepts>
#include <stdexcept>
#include <string>

namespace micromix {

inline void append(std::string& message, const char* part) { message += part; }
inline void append(std::string& message, const std::string& part) { message += part; }
template <std::integral T>
void append(std::string& message, T part) {
  message += std::to_string(part);
}

template <typename... Parts>
[[noreturn, gnu::cold]] void fail(const Parts&... parts) {
  std::string message;
  (append(message, parts), ...);
  throw std::runtime_error(message);
}

}  // namespace micromix

#define MICROMIX_CHECK(condition, ...) \
  if (!(condition)) [[unlikely]] {     \
    ::micromix::fail(__VA_ARGS__);     \
  }
