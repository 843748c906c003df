// Memory in pages of 2 MB: a result's first touch of 4 KB pages costs more than many a product.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>

namespace micromix {

inline constexpr int64_t kHugePage = 2 << 20;

// Asks for huge pages in [memory, memory + bytes), where they are not in use yet. The system gives
// them to whole 2 MB of the mapping alone; a refusal costs speed only.
inline void ask_for_huge_pages(void* memory, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const auto address = reinterpret_cast<uintptr_t>(memory);
  // Outwards: what malloc gives begins a few bytes after its mapping.
  const uintptr_t start = address / page * page;
  const uintptr_t end = (address + static_cast<uintptr_t>(bytes) + page - 1) / page * page;
  madvise(reinterpret_cast<void*>(start), end - start, MADV_HUGEPAGE);
#endif
}

}  // namespace micromix
