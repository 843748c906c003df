// Memory for weights and for scratch.
#pragma once

#include <cstdint>

namespace micromix::cpu {

// Memory for a placed weight. A large one gets whole 2 MB pages where the system gives them: with 4
// KB pages, address translation and not the memory sets the speed of a product with one row.
uint8_t* allocate_weight(int64_t bytes);
void free_weight(void* memory, int64_t bytes);

enum class Buffer : int { kArranged = 0, kPrepared = 1, kScratch = 2 };

// 64-byte aligned memory of the calling thread, kept for the next call unless it is very large. A
// thread uses each kind of buffer once at a time.
class ThreadBuffer {
 public:
  ThreadBuffer(Buffer kind, int64_t bytes);
  ~ThreadBuffer();
  ThreadBuffer(const ThreadBuffer&) = delete;
  ThreadBuffer& operator=(const ThreadBuffer&) = delete;
  uint8_t* data() const { return data_; }

 private:
  uint8_t* data_;
  Buffer kind_;
};

}  // namespace micromix::cpu
