// Neighbouring channels of a row, from and to memory in any of the three types.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "encode.cuh"
#include "rows.h"

namespace micromix::cuda {

constexpr unsigned kWarp = 0xFFFFFFFF;  // all of its threads
constexpr int kLine = 128;              // bytes of the caches'
#if defined(__CUDA_ARCH__)
constexpr int kArchitecture = __CUDA_ARCH__ / 10;
#else
constexpr int kArchitecture = 0;  // the host's code
#endif

// A kernel may start before the one before it in its stream ends: it reads and writes no memory of
// the device until that one's results are there. It lets the next kernel start as soon as it runs.
__device__ __forceinline__ void wait_for_the_kernel_before() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ __forceinline__ void let_the_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// The same value. If `kKept` it stays in a register: what has come through a shuffle the compiler
// cannot compute again in every turn of a loop. All threads of the warp call it.
template <bool kKept>
__device__ __forceinline__ uint32_t kept_in_register(uint32_t x) {
  if constexpr (kKept) asm volatile("shfl.sync.bfly.b32 %0, %0, 0, 0x1F, 0xFFFFFFFF;" : "+r"(x));
  return x;
}
template <bool kKept>
__device__ __forceinline__ int kept_in_register(int x) {
  return static_cast<int>(kept_in_register<kKept>(static_cast<uint32_t>(x)));
}

// Asks for a line, or many, in the second-level cache. That reads nothing, so it may come before
// the wait: what the kernel before still writes goes to the same cache.
__device__ __forceinline__ void fetch_line(const void* line) {
#if __CUDA_ARCH__ >= 900
  asm volatile("prefetch.global.L2 [%0];" ::"l"(line));
#endif
}
// By all threads of a thread block; from null there is nothing.
__device__ __forceinline__ void fetch_lines(const void* from, int64_t bytes) {
#if __CUDA_ARCH__ >= 900
  if (from == nullptr) return;
  for (int64_t at = kLine * threadIdx.x; at < bytes; at += kLine * blockDim.x)
    fetch_line(static_cast<const char*>(from) + at);
#endif
}
template <Types kTypes>
__device__ __forceinline__ void fetch_row(const RowInput& from, int64_t row, int k) {
  static_assert(kTypes != Types::kAny);
  constexpr int kBytes = is_narrow(kTypes) ? 2 : 4;
  if (from.data == nullptr) return;
  fetch_lines(static_cast<const char*>(from.data) + row * from.stride * kBytes, k * kBytes);
}
// A norm's weight or bias, of any type.
__device__ __forceinline__ void fetch_vector(const RowInput& vector, int k) {
  fetch_lines(vector.data, int64_t{k} * (vector.dtype == Dtype::kFloat32 ? 4 : 2));
}

// The type of a tensor: known to the compiler, or decided as the kernel runs.
template <Types kTypes>
__device__ __forceinline__ Dtype type_of(Dtype dtype) {
  return kTypes == Types::kBFloat16  ? Dtype::kBFloat16
         : kTypes == Types::kFloat16 ? Dtype::kFloat16
         : kTypes == Types::kFloat32 ? Dtype::kFloat32
                                     : dtype;
}

__device__ __forceinline__ uint32_t bits_of(__half2 x) { return *reinterpret_cast<uint32_t*>(&x); }
__device__ __forceinline__ uint32_t bits_of(__nv_bfloat162 x) {
  return *reinterpret_cast<uint32_t*>(&x);
}

__device__ __forceinline__ float widen(uint16_t bits, bool bfloat16) {
  return bfloat16 ? __uint_as_float(static_cast<uint32_t>(bits) << 16)
                  : __half2float(__ushort_as_half(bits));
}
__device__ __forceinline__ float2 widen_pair(uint32_t word, bool bfloat16) {
  if (bfloat16) return {__uint_as_float(word << 16), __uint_as_float(word & 0xFFFF0000u)};
  return __half22float2(*reinterpret_cast<const __half2*>(&word));
}
// Rounds to nearest even.
__device__ __forceinline__ uint32_t narrow_pair(float low, float high, bool bfloat16) {
  return bfloat16 ? bits_of(__floats2bfloat162_rn(low, high))
                  : bits_of(__floats2half2_rn(low, high));
}
__device__ __forceinline__ float largest(float a, float b) {  // NaN if one of them is
  float c;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(c) : "f"(a), "f"(b));
  return c;
}
// In either half, the larger of two magnitudes, under any sign; NaN where one is.
__device__ __forceinline__ uint32_t largest_pair(uint32_t a, uint32_t b, bool bfloat16) {
#if __CUDA_ARCH__ >= 860
  uint32_t c;
  if (bfloat16) {
    asm("max.NaN.xorsign.abs.bf16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
  } else {
    asm("max.NaN.xorsign.abs.f16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
  }
  return c;
#else
  a &= 0x7FFF7FFF, b &= 0x7FFF7FFF;
  if (bfloat16)
    return bits_of(__hmax2_nan(*reinterpret_cast<const __nv_bfloat162*>(&a),
                               *reinterpret_cast<const __nv_bfloat162*>(&b)));
  return bits_of(
      __hmax2_nan(*reinterpret_cast<const __half2*>(&a), *reinterpret_cast<const __half2*>(&b)));
#endif
}

// Values in a 16-bit type.
template <int kCount>
struct Narrow {
  uint32_t word[kCount / 2];
};

template <int kCount>
__device__ __forceinline__ Values<kCount> unpack(const Narrow<kCount>& bits, bool bfloat16) {
  Values<kCount> x;
#pragma unroll
  for (int i = 0; i < kCount / 2; ++i) {
    const float2 pair = widen_pair(bits.word[i], bfloat16);
    x.v[2 * i] = pair.x, x.v[2 * i + 1] = pair.y;
  }
  return x;
}
template <int kCount>
__device__ __forceinline__ Narrow<kCount> pack(const Values<kCount>& x, bool bfloat16) {
  Narrow<kCount> bits;
#pragma unroll
  for (int i = 0; i < kCount / 2; ++i)
    bits.word[i] = narrow_pair(x.v[2 * i], x.v[2 * i + 1], bfloat16);
  return bits;
}

// The same values as pairs of channels i and i + 4 of every eight, the order of their codes.
template <int kCount>
struct Pairs {
  uint32_t word[kCount / 2];
};

template <int kWords>
__device__ __forceinline__ Pairs<2 * kWords> paired(const uint32_t (&words)[kWords]) {
  Pairs<2 * kWords> x;
#pragma unroll
  for (int i = 0; i < kWords; i += 4) {
    x.word[i] = permute_bytes<0x5410>(words[i], words[i + 2]);
    x.word[i + 1] = permute_bytes<0x7632>(words[i], words[i + 2]);
    x.word[i + 2] = permute_bytes<0x5410>(words[i + 1], words[i + 3]);
    x.word[i + 3] = permute_bytes<0x7632>(words[i + 1], words[i + 3]);
  }
  return x;
}
template <int kCount>
__device__ __forceinline__ Narrow<kCount> unpaired(const Pairs<kCount>& pairs) {
  Narrow<kCount> x;
#pragma unroll
  for (int i = 0; i < kCount / 2; i += 4) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      x.word[i + j] = permute_bytes<0x5410>(pairs.word[i + 2 * j], pairs.word[i + 2 * j + 1]);
      x.word[i + j + 2] = permute_bytes<0x7632>(pairs.word[i + 2 * j], pairs.word[i + 2 * j + 1]);
    }
  }
  return x;
}
template <int kCount>
__device__ __forceinline__ Values<kCount> unpack(const Pairs<kCount>& pairs, bool bfloat16) {
  Values<kCount> x;
#pragma unroll
  for (int i = 0; i < kCount / 2; ++i) {
    const float2 pair = widen_pair(pairs.word[i], bfloat16);
    const int first = i / 4 * 8 + i % 4;
    x.v[first] = pair.x, x.v[first + 4] = pair.y;
  }
  return x;
}
template <int kCount>
__device__ __forceinline__ Pairs<kCount> pack_pairs(const Values<kCount>& x, bool bfloat16) {
  Pairs<kCount> pairs;
#pragma unroll
  for (int i = 0; i < kCount / 2; ++i) {
    const int first = i / 4 * 8 + i % 4;
    pairs.word[i] = narrow_pair(x.v[first], x.v[first + 4], bfloat16);
  }
  return pairs;
}
// The products of two values in either half, rounded once: of 16-bit values they are exact in
// float32, so this is that product rounded to the type.
__device__ __forceinline__ uint32_t product_of_pairs(uint32_t a, uint32_t b, bool bfloat16) {
  return bfloat16 ? bits_of(__hmul2_rn(*reinterpret_cast<const __nv_bfloat162*>(&a),
                                       *reinterpret_cast<const __nv_bfloat162*>(&b)))
                  : bits_of(__hmul2_rn(*reinterpret_cast<const __half2*>(&a),
                                       *reinterpret_cast<const __half2*>(&b)));
}
template <int kCount>
__device__ __forceinline__ Pairs<kCount> product(const Pairs<kCount>& x, const Pairs<kCount>& y,
                                                 bool bfloat16) {
  Pairs<kCount> z;
#pragma unroll
  for (int i = 0; i < kCount / 2; ++i) z.word[i] = product_of_pairs(x.word[i], y.word[i], bfloat16);
  return z;
}

// The sums of two values in either half, rounded once. Their sum in float32 rounded to the type is
// the same: 24 bits are enough for a second rounding to change nothing.
__device__ __forceinline__ uint32_t sum_of_pairs(uint32_t a, uint32_t b, bool bfloat16) {
  return bfloat16 ? bits_of(__hadd2_rn(*reinterpret_cast<const __nv_bfloat162*>(&a),
                                       *reinterpret_cast<const __nv_bfloat162*>(&b)))
                  : bits_of(__hadd2_rn(*reinterpret_cast<const __half2*>(&a),
                                       *reinterpret_cast<const __half2*>(&b)));
}

// Rounds to the values of a type.
template <int kCount>
__device__ __forceinline__ Values<kCount> rounded(const Values<kCount>& x, Dtype dtype) {
  if (dtype == Dtype::kFloat32) return x;
  const bool bfloat16 = dtype == Dtype::kBFloat16;
  return unpack(pack(x, bfloat16), bfloat16);
}

// How a group of values that are of their type waits: packed where the type is narrow and known.
template <Types kTypes, int kCount>
struct Kept {
  Values<kCount> x;
  __device__ __forceinline__ Kept() : x{} {}
  __device__ __forceinline__ explicit Kept(const Values<kCount>& x) : x(x) {}
  __device__ __forceinline__ Values<kCount> values() const { return x; }
};
template <Types kTypes, int kCount>
  requires(is_narrow(kTypes))
struct Kept<kTypes, kCount> {
  Narrow<kCount> bits;
  __device__ __forceinline__ Kept() : bits{} {}
  __device__ __forceinline__ explicit Kept(const Values<kCount>& x)
      : bits(pack(x, kTypes == Types::kBFloat16)) {}
  __device__ __forceinline__ Values<kCount> values() const {
    return unpack(bits, kTypes == Types::kBFloat16);
  }
};

// 16 bytes at a time. `__ldg` is not for memory that the kernel writes.
template <int kWords>
__device__ __forceinline__ void load_words(const void* from, uint32_t (&words)[kWords]) {
#pragma unroll
  for (int i = 0; i < kWords / 4; ++i) {
    const uint4 four = __ldg(static_cast<const uint4*>(from) + i);
    words[4 * i] = four.x, words[4 * i + 1] = four.y;
    words[4 * i + 2] = four.z, words[4 * i + 3] = four.w;
  }
}
// 16 bytes; issued where it stands, and by the path of memory that may change: what the compiler
// takes for constant it may load before the wait for the kernel before.
__device__ __forceinline__ void load_words_now(const void* from, uint32_t (&words)[4]) {
  asm volatile("ld.global.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "l"(from)
               : "memory");
}
// 16 bytes if `there`; else `words` stay as they are.
__device__ __forceinline__ void load_words_if(bool there, const void* from, uint32_t (&words)[4]) {
  asm volatile(
      "{\n"
      ".reg .pred there;\n"
      "setp.ne.u32 there, %5, 0;\n"
      "@there ld.global.v4.b32 {%0, %1, %2, %3}, [%4];\n"
      "}"
      : "+r"(words[0]), "+r"(words[1]), "+r"(words[2]), "+r"(words[3])
      : "l"(from), "r"(static_cast<uint32_t>(there))
      : "memory");
}

template <int kWords>
__device__ __forceinline__ void store_words(void* to, const uint32_t (&words)[kWords]) {
#pragma unroll
  for (int i = 0; i < kWords / 4; ++i)
    static_cast<uint4*>(to)[i] = {words[4 * i], words[4 * i + 1], words[4 * i + 2],
                                  words[4 * i + 3]};
}

// From and to shared memory, by its own 32-bit addresses.
__device__ __forceinline__ Narrow<8> load_shared(uint32_t from) {
  Narrow<8> x;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.word[0]), "=r"(x.word[1]), "=r"(x.word[2]), "=r"(x.word[3])
               : "r"(from));
  return x;
}
// Zeros unless `there`.
__device__ __forceinline__ Narrow<8> load_shared_if(bool there, uint32_t from) {
  Narrow<8> x{};
  asm volatile(
      "{\n"
      ".reg .pred there;\n"
      "setp.ne.u32 there, %5, 0;\n"
      "@there ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];\n"
      "}"
      : "+r"(x.word[0]), "+r"(x.word[1]), "+r"(x.word[2]), "+r"(x.word[3])
      : "r"(from), "r"(static_cast<uint32_t>(there)));
  return x;
}
__device__ __forceinline__ uint32_t load_shared_half(uint32_t from) {
  uint16_t x;
  asm volatile("ld.shared.b16 %0, [%1];" : "=h"(x) : "r"(from));
  return x;
}
__device__ __forceinline__ void store_shared(uint32_t to, const uint32_t (&words)[4]) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(words[0]), "r"(words[1]),
               "r"(words[2]), "r"(words[3])
               : "memory");
}

__device__ __forceinline__ const void* element(const void* data, Dtype dtype, int64_t i) {
  return static_cast<const char*>(data) + i * (dtype == Dtype::kFloat32 ? 4 : 2);
}
__device__ __forceinline__ void* element(void* data, Dtype dtype, int64_t i) {
  return static_cast<char*>(data) + i * (dtype == Dtype::kFloat32 ? 4 : 2);
}
__device__ __forceinline__ float load_one(const void* data, Dtype dtype, int64_t i) {
  const void* const from = element(data, dtype, i);
  if (dtype == Dtype::kFloat32) return __ldg(static_cast<const float*>(from));
  return widen(__ldg(static_cast<const uint16_t*>(from)), dtype == Dtype::kBFloat16);
}

// Values [i, i + kCount) of a tensor, aligned to 16 bytes.
template <int kCount>
__device__ __forceinline__ Values<kCount> load_aligned(const void* data, Dtype dtype, int64_t i) {
  if (dtype != Dtype::kFloat32) {
    Narrow<kCount> bits;
    load_words(element(data, dtype, i), bits.word);
    return unpack(bits, dtype == Dtype::kBFloat16);
  }
  uint32_t words[kCount];
  load_words(element(data, dtype, i), words);
  Values<kCount> x;
#pragma unroll
  for (int j = 0; j < kCount; ++j) x.v[j] = __uint_as_float(words[j]);
  return x;
}
// Any values; `count` of them are there, the others are 0.
template <int kCount>
__device__ __forceinline__ Values<kCount> load_any(const void* data, Dtype dtype, int64_t i,
                                                   int count) {
  Values<kCount> x;
#pragma unroll
  for (int j = 0; j < kCount; ++j) x.v[j] = j < count ? load_one(data, dtype, i + j) : 0.0f;
  return x;
}

template <int kCount>
__device__ __forceinline__ void store_any(void* data, Dtype dtype, int64_t i, int count,
                                          const Values<kCount>& x) {
#pragma unroll
  for (int j = 0; j < kCount; ++j) {
    if (j >= count) continue;
    void* const to = element(data, dtype, i + j);
    if (dtype == Dtype::kFloat32) {
      *static_cast<float*>(to) = x.v[j];
    } else {
      *static_cast<uint16_t*>(to) =
          static_cast<uint16_t>(narrow_pair(x.v[j], 0.0f, dtype == Dtype::kBFloat16));
    }
  }
}

}  // namespace micromix::cuda
