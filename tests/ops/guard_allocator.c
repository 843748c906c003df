// Memory that ends where memory ends, to be preloaded: what posix_memalign and aligned_alloc give
// lies before a page that cannot be touched, as near as its alignment lets it. The few bytes
// between, and a few before it, are looked at when it is freed. Nothing is used twice.
#include <errno.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

extern void __libc_free(void*);

enum { PAGE = 4096, MARK = 0xA5 };
struct head {
  uint64_t bytes, mark;
};
static const uint64_t ROOM = 1ull << 40, HEAD_MARK = 0xA5A5A5A5A5A5A5A5;
static uint8_t* arena;
static uint64_t used;

static uint64_t up(uint64_t value, uint64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// Before main, and so before there are threads.
__attribute__((constructor)) static void reserve(void) {
  const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  arena = mmap(NULL, ROOM, PROT_NONE, flags, -1, 0);
  if (arena == MAP_FAILED) abort();
}

static void* allocate(uint64_t alignment, uint64_t bytes) {
  if (!arena) reserve();
  const uint64_t room = up(bytes + alignment + sizeof(struct head), PAGE) + PAGE;
  uint8_t* const start = arena + __atomic_fetch_add(&used, room, __ATOMIC_SEQ_CST);
  uint8_t* const end = start + room - PAGE;
  if (end >= arena + ROOM || mprotect(start, room - PAGE, PROT_READ | PROT_WRITE)) return NULL;
  uint8_t* const memory = (uint8_t*)((uintptr_t)(end - bytes) / alignment * alignment);
  ((struct head*)memory)[-1] = (struct head){bytes, HEAD_MARK};
  memset(memory + bytes, MARK, end - memory - bytes);
  return memory;
}

int posix_memalign(void** memory, size_t alignment, size_t bytes) {
  *memory = allocate(alignment, bytes);
  return *memory ? 0 : ENOMEM;
}

void* aligned_alloc(size_t alignment, size_t bytes) { return allocate(alignment, bytes); }

void free(void* pointer) {
  uint8_t* const memory = pointer;
  if (!arena || memory < arena || memory >= arena + ROOM) return __libc_free(pointer);
  const struct head* const head = (struct head*)memory - 1;
  if (head->mark != HEAD_MARK) {
    fprintf(stderr, "written before %p\n", pointer);
    abort();
  }
  uint8_t* const end = (uint8_t*)up((uintptr_t)memory + head->bytes, PAGE);
  for (uint8_t* p = memory + head->bytes; p < end; ++p) {
    if (*p == MARK) continue;
    fprintf(stderr, "written %ld bytes beyond the %lu bytes at %p\n",
            (long)(p - memory - head->bytes), (unsigned long)head->bytes, pointer);
    abort();
  }
  uint8_t* const start = (uint8_t*)((uintptr_t)head / PAGE * PAGE);
  madvise(start, end - start, MADV_DONTNEED);
  mprotect(start, end - start, PROT_NONE);
}
