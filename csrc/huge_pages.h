// Memory in pages of 2 MB: a result's first touch of 4 KB pages costs more than many a product.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>

namespace micromix {

inline constexpr int64_t kHugePage = 2 << 20;

// Asks for huge pages in [memory, memory + bytes), where they are not in use yet. The system gives
// them to whole 2 MB of the mapping alone; the small pages at its ends are brought in at once,
// which costs less than a fault each. A refusal costs speed only.
inline void ask_for_huge_pages(void* memory, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const auto address = reinterpret_cast<uintptr_t>(memory);
  const auto advise = [](uintptr_t from, uintptr_t to, int advice) {
    if (from < to) madvise(reinterpret_cast<void*>(from), to - from, advice);
  };
  // Outwards: what malloc gives begins a few bytes after its mapping.
  const uintptr_t start = address / page * page;
  const uintptr_t end = (address + static_cast<uintptr_t>(bytes) + page - 1) / page * page;
  advise(start, end, MADV_HUGEPAGE);
#if defined(MADV_POPULATE_WRITE)
  const uintptr_t first_huge = (start + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t last_huge = end / kHugePage * kHugePage;
  advise(start, first_huge < end ? first_huge : end, MADV_POPULATE_WRITE);
  advise(last_huge > first_huge ? last_huge : first_huge, end, MADV_POPULATE_WRITE);
#endif
#endif
}

}  // namespace micromix
