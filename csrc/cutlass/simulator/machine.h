// A CUDA block on the host: one fiber a thread, run warp by warp in a random order. A copy lands
// either when it is issued or only when it is waited for: the earliest and latest legal moments, so
// a missing wait or barrier reads poison or stale data. Every address is checked.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>
#include <functional>

#define MICROMIX_DEVICE inline

namespace micromix::blackwell {

namespace simulator {

struct Options {
  bool late_copies;  // land when waited for
  unsigned seed;
};

int thread();
int block(int dimension);
void block_barrier();
uint8_t* shared(uint32_t address, int bytes);
void issue_copy(uint32_t to, const void* from, int bytes, int valid);
void commit();
void wait(int pending);
[[noreturn]] void fail(const char* what);

// Publishes `count` words of the calling thread to its warp, and returns the words of lane `l` at
// `l * 8`. Valid until the second exchange after this one.
const uint32_t* exchange(const uint32_t* words, int count);

// Memory that the kernel may read asynchronously.
void allow(const void* start, int64_t bytes);
void launch(int threads, const int (&grid)[3], int shared_bytes, const Options& options,
            const std::function<void()>& body);

}  // namespace simulator

MICROMIX_DEVICE int thread_index() { return simulator::thread(); }
MICROMIX_DEVICE int block_x() { return simulator::block(0); }
MICROMIX_DEVICE int block_y() { return simulator::block(1); }
MICROMIX_DEVICE int block_z() { return simulator::block(2); }
MICROMIX_DEVICE void barrier() { simulator::block_barrier(); }

MICROMIX_DEVICE uint32_t load_shared(uint32_t address) {
  uint32_t value;
  std::memcpy(&value, simulator::shared(address, 4), 4);
  return value;
}
MICROMIX_DEVICE uint32_t load_shared_byte(uint32_t address) {
  return *simulator::shared(address, 1);
}
MICROMIX_DEVICE void store_shared(uint32_t address, uint32_t value) {
  std::memcpy(simulator::shared(address, 4), &value, 4);
}
template <int kBytes>
MICROMIX_DEVICE void copy_async(uint32_t to, const uint8_t* from, int valid) {
  simulator::issue_copy(to, from, kBytes, valid);
}
MICROMIX_DEVICE void commit_copies() { simulator::commit(); }
template <int kPending>
MICROMIX_DEVICE void wait_copies() {
  simulator::wait(kPending);
}

MICROMIX_DEVICE uint32_t funnel_shift(uint32_t low, uint32_t high, int bits) {
  return static_cast<uint32_t>((uint64_t{high} << 32 | low) >> (bits & 31));
}
MICROMIX_DEVICE float as_float(uint32_t bits) { return std::bit_cast<float>(bits); }
MICROMIX_DEVICE uint32_t as_bits(float value) { return std::bit_cast<uint32_t>(value); }
MICROMIX_DEVICE uint16_t to_bfloat16(float value) {
  const uint32_t bits = as_bits(value);
  if (value != value) return 0x7FFF;
  return static_cast<uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}
MICROMIX_DEVICE uint16_t to_float16(float value) {
  return std::bit_cast<uint16_t>(static_cast<_Float16>(value));
}
MICROMIX_DEVICE float from_float16(uint16_t bits) { return std::bit_cast<_Float16>(bits); }

struct alignas(16) Vector {
  uint32_t words[4];
};

}  // namespace micromix::blackwell
