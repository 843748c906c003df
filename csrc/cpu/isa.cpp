#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <iterator>
#include <stdexcept>

#if defined(MICROMIX_X86)
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace micromix::cpu {
namespace {

constexpr const char* kNames[] = {"portable", "avx2", "avx512", "avx512_bf16", "amx"};

#if defined(MICROMIX_X86)

struct Registers {
  unsigned a, b, c, d;
};

Registers cpuid(unsigned leaf, unsigned subleaf) {
  Registers r{};
  __get_cpuid_count(leaf, subleaf, &r.a, &r.b, &r.c, &r.d);
  return r;
}

constexpr bool has(unsigned value, unsigned bits) { return (value & bits) == bits; }

[[gnu::target("xsave")]] unsigned enabled_states() { return static_cast<unsigned>(_xgetbv(0)); }

// Linux grants the AMX tile registers to a process that asks for them.
bool request_amx_tiles() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

Isa detect() {
  const Registers leaf1 = cpuid(1, 0), leaf7 = cpuid(7, 0);
  constexpr unsigned kFma = bit_FMA | bit_F16C | bit_AVX | bit_OSXSAVE;
  if (!has(leaf1.c, kFma) || !has(leaf7.b, bit_AVX2)) return Isa::kPortable;
  const unsigned states = enabled_states();
  if (!has(states, 0x6)) return Isa::kPortable;  // XMM and YMM

  constexpr unsigned kAvx512 = bit_AVX512F | bit_AVX512BW | bit_AVX512DQ | bit_AVX512VL;
  constexpr unsigned kVectorBits = bit_AVX512VBMI | bit_AVX512VNNI;
  if (!has(leaf7.b, kAvx512) || !has(leaf7.c, kVectorBits) || !has(states, 0xE6)) return Isa::kAvx2;

  if (!has(cpuid(7, 1).a, bit_AVX512BF16)) return Isa::kAvx512;
  constexpr unsigned kAmx = 1u << 22 | 1u << 24 | 1u << 25;  // bfloat16, tiles, integers
  if (!has(leaf7.d, kAmx) || !has(states, 0x60000)) return Isa::kAvx512Bf16;
  return request_amx_tiles() ? Isa::kAmx : Isa::kAvx512Bf16;
}

#else

Isa detect() { return Isa::kPortable; }

#endif

Isa parse(const std::string& name, const char* origin) {
  for (int i = 0; i < static_cast<int>(std::size(kNames)); ++i) {
    if (name != kNames[i]) continue;
    if (static_cast<Isa>(i) <= best_isa()) return static_cast<Isa>(i);
    throw std::runtime_error(std::string(origin) + " asks for the instruction set \"" + name +
                             "\", which this machine or this build lacks; the best here is \"" +
                             name_of(best_isa()) + "\".");
  }
  throw std::runtime_error(std::string(origin) + " names no instruction set: \"" + name +
                           "\"; use portable, avx2, avx512, avx512_bf16 or amx.");
}

Isa from_environment() {
  const char* const name = std::getenv("MICROMIX_CPU_ISA");
  return name && *name ? parse(name, "MICROMIX_CPU_ISA") : best_isa();
}

std::atomic<int> chosen{-1};

// Rows from which decoding the weight to AMX tiles pays; below, it is decoded to registers. What is
// multiplied as floats there, because the activations or most of the weight are no integers, is
// several times the work.
constexpr int64_t kAmxRows = 5, kAmxFloatRows = 3;
bool has_amx_rows(const LinearTask& task) {
  int64_t floats = 0;
  for (const mx::Segment& segment : task.layout.segments()) {
    const mx::ElementFormat weight = task.layout.weight_format(segment);
    if (weight == mx::E3M2 || weight == mx::E4M3) floats += segment.blocks;
  }
  const bool most = task.weight_only || 2 * floats > task.layout.blocks();
  return task.m >= (most ? kAmxFloatRows : kAmxRows);
}

// Rows up to which AVX512-BF16 decodes the weight to registers.
constexpr int64_t kFewRows = 16;

}  // namespace

const char* name_of(Isa isa) { return kNames[static_cast<int>(isa)]; }

Isa best_isa() {
  static const Isa best = detect();
  return best;
}

Isa current_isa() {
  int isa = chosen.load(std::memory_order_relaxed);
  if (isa < 0) {
    isa = static_cast<int>(from_environment());
    chosen.store(isa, std::memory_order_relaxed);
  }
  return static_cast<Isa>(isa);
}

void set_isa(const std::string& name) {
  chosen.store(static_cast<int>(parse(name, "set_cpu_isa")), std::memory_order_relaxed);
}

const QuantizeKernel& quantize_kernel() {
#if defined(MICROMIX_X86)
  if (current_isa() >= Isa::kAvx512) return kQuantizeAvx512;
  if (current_isa() >= Isa::kAvx2) return kQuantizeAvx2;
#endif
  return kQuantizePortable;
}

const LinearKernel& linear_kernel(const LinearTask& task) {
#if defined(MICROMIX_X86)
  if (current_isa() == Isa::kAmx && has_amx_rows(task) && task.layout.blocks() > 0) {
    return kLinearAmx;
  }
  if (current_isa() == Isa::kAvx512Bf16) {
    const bool many = task.m > kFewRows && task.layout.blocks() > 0;
    return many ? kLinearAvx512Bf16 : kFewRowsAvx512Bf16;
  }
  if (current_isa() >= Isa::kAvx512) return kLinearAvx512;
  if (current_isa() >= Isa::kAvx2) return kLinearAvx2;
#endif
  return kLinearPortable;
}

const AttentionKernel& attention_kernel(const AttentionTask& task) {
#if defined(MICROMIX_X86)
  if (current_isa() == Isa::kAmx && task.dtype == Dtype::kBFloat16) return kAttentionAmx;
  if (current_isa() >= Isa::kAvx512) return kAttentionAvx512;
  if (current_isa() >= Isa::kAvx2) return kAttentionAvx2;
#endif
  return kAttentionPortable;
}

}  // namespace micromix::cpu
