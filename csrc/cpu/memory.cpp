#include "memory.h"

#include <cstdlib>
#include <new>

#include "../huge_pages.h"
#include "placed.h"

namespace micromix::cpu {
namespace {

constexpr int64_t kKept = 64 << 20;  // scratch above this size is given back after the call

uint8_t* aligned(int64_t alignment, int64_t bytes) {
  void* const memory = std::aligned_alloc(alignment, round_up(bytes > 0 ? bytes : 1, alignment));
  if (!memory) throw std::bad_alloc();
  return static_cast<uint8_t*>(memory);
}

struct Kept {
  uint8_t* data = nullptr;
  int64_t bytes = 0;
  ~Kept() { std::free(data); }
};

Kept& kept(Buffer kind) {
  thread_local Kept buffers[3];
  return buffers[static_cast<int>(kind)];
}

}  // namespace

uint8_t* allocate_weight(int64_t bytes) {
  if (bytes < kHugePage) return aligned(kLine, bytes);
  uint8_t* const memory = aligned(kHugePage, bytes);
  ask_for_huge_pages(memory, round_up(bytes, kHugePage));
  return memory;
}

void free_weight(void* memory, int64_t) { std::free(memory); }

ThreadBuffer::ThreadBuffer(Buffer kind, int64_t bytes) : kind_(kind) {
  Kept& buffer = kept(kind);
  if (buffer.bytes < bytes || !buffer.data) {
    std::free(buffer.data);
    buffer.data = nullptr;
    buffer.bytes = 0;
    buffer.data = aligned(bytes < kHugePage ? kLine : kHugePage, bytes);
    buffer.bytes = bytes;
    if (bytes >= kHugePage) ask_for_huge_pages(buffer.data, round_up(bytes, kHugePage));
  }
  data_ = buffer.data;
}

ThreadBuffer::~ThreadBuffer() {
  Kept& buffer = kept(kind_);
  if (buffer.bytes <= kKept) return;
  std::free(buffer.data);
  buffer.data = nullptr;
  buffer.bytes = 0;
}

}  // namespace micromix::cpu
