// What one thread of this machine can do: bytes read from memory, float32 products on AVX2, and
// bfloat16 products on AMX (zero where there is none). Built and called by linear_cpu.py.
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>
#include <ctime>

namespace {

double seconds() {  // of this thread's CPU time: other work on the machine is not counted
  timespec now{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

bool has_amx() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  __get_cpuid_count(7, 0, &a, &b, &c, &d);
  const unsigned tile = 1u << 24, bf16 = 1u << 22;
  return (d & tile) && (d & bf16) && syscall(SYS_arch_prctl, 0x1023, 18) == 0;
}

}  // namespace

// Bytes a second of one pass over `memory`, a line of each of `places` equal parts in turn.
extern "C" double read_rate(const uint64_t* memory, int64_t words, int64_t places) {
  uint64_t sums[8] = {};
  const int64_t part = words / places / 8 * 8;
  const double start = seconds();
  for (int64_t i = 0; i < part; i += 8) {
    for (int64_t p = 0; p < places; ++p) {
      const uint64_t* const line = memory + p * part + i;
      __builtin_prefetch(line + 512);
      for (int j = 0; j < 8; ++j) sums[j] ^= line[j];
    }
  }
  const double elapsed = seconds() - start;
  asm volatile("" : : "r"(sums) : "memory");
  return static_cast<double>(part * places) * sizeof(uint64_t) / elapsed;
}

// Operations a second of AVX2's fused multiply-adds of float32 numbers that stay in registers.
extern "C" [[gnu::target("avx2,fma")]] double fma_rate() {
  __m256 sums[12];
  for (int j = 0; j < 12; ++j) sums[j] = _mm256_set1_ps(static_cast<float>(j));
  __m256 x = _mm256_set1_ps(0.5f);
  const int64_t rounds = 4000000;
  const double start = seconds();
  for (int64_t i = 0; i < rounds; ++i) {
    asm volatile("" : "+x"(x));
#pragma GCC unroll 12
    for (int j = 0; j < 12; ++j) sums[j] = _mm256_fmadd_ps(x, x, sums[j]);
  }
  for (int j = 1; j < 12; ++j) sums[0] = _mm256_add_ps(sums[0], sums[j]);
  asm volatile("" : : "x"(sums[0]));
  return static_cast<double>(rounds) * 12 * 2 * 8 / (seconds() - start);
}

// Operations a second of AMX bfloat16 products of random tiles that stay in registers.
extern "C" [[gnu::target("amx-tile,amx-bf16")]] double amx_rate() {
  if (!has_amx()) return 0;
  alignas(64) static uint16_t tile[512];
  uint32_t state = 1;
  for (uint16_t& value : tile) {
    state = state * 1664525 + 1013904223;
    value = static_cast<uint16_t>(0x3F00 | (state >> 16 & 0x80FF));
  }
  const TileConfig config;
  asm volatile("" : : "r"(&config), "r"(tile) : "memory");
  _tile_loadconfig(&config);
  _tile_loadd(4, tile, 64);
  _tile_loadd(5, tile, 64);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  const int64_t rounds = 1000000;
  const double start = seconds();
  for (int64_t i = 0; i < rounds; ++i) {
    _tile_dpbf16ps(0, 4, 5);
    _tile_dpbf16ps(1, 5, 4);
    _tile_dpbf16ps(2, 4, 5);
    _tile_dpbf16ps(3, 5, 4);
  }
  const double elapsed = seconds() - start;
  _tile_release();
  return static_cast<double>(rounds) * 4 * 2 * 16 * 16 * 32 / elapsed;
}
