// The atoms as sm_120a and sm_121a have them. See atoms.h.
#pragma once

namespace micromix::blackwell {

inline constexpr bool kNativeAtoms = true;

template <Element>
struct CuteType;
template <>
struct CuteType<Element::kE2M1> {
  using type = cute::float_e2m1_t;
};
template <>
struct CuteType<Element::kE2M3> {
  using type = cute::float_e2m3_t;
};
template <>
struct CuteType<Element::kE3M2> {
  using type = cute::float_e3m2_t;
};
template <>
struct CuteType<Element::kE4M3> {
  using type = cute::float_e4m3_t;
};

template <int kBits>
MICROMIX_DEVICE void load_matrices(uint32_t (&out)[4], uint32_t address) {
  // CuTe takes a generic reference, and converts it back to the address that it came from.
  const auto& from = *static_cast<const cute::uint128_t*>(__cvta_shared_to_generic(address));
  if constexpr (kBits == 8) {
    cute::SM75_U32x4_LDSM_N::copy(from, out[0], out[1], out[2], out[3]);
  } else if constexpr (kBits == 6) {
    cute::SM100_SU6_DU8x16_x4_LDSM_N::copy(from, out[0], out[1], out[2], out[3]);
  } else {
    cute::SM100_SU4_DU8x16_x4_LDSM_N::copy(from, out[0], out[1], out[2], out[3]);
#pragma unroll
    for (uint32_t& codes : out) codes <<= 2;
  }
}

template <bool kPacked, Element A, Element B>
MICROMIX_DEVICE void multiply(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                              uint32_t scale_a, uint32_t scale_b) {
  using CuteA = typename CuteType<A>::type;
  using CuteB = typename CuteType<B>::type;
  using Scale = cute::float_ue8m0_t;
  namespace scaled = cute::SM120::BLOCKSCALED;
  if constexpr (kPacked) {
    scaled::SM120_16x8x64_TN_VS<CuteA, CuteB, float, Scale, 32>::fma(
        sums[0], sums[1], sums[2], sums[3], a[0], a[1], a[2], a[3], b[0], b[1], sums[0], sums[1],
        sums[2], sums[3], static_cast<uint16_t>(scale_a), static_cast<uint16_t>(scale_b));
  } else {
    scaled::SM120_16x8x32_TN_VS<CuteA, CuteB, float, Scale, 32>::fma(
        sums[0], sums[1], sums[2], sums[3], a[0], a[1], a[2], a[3], b[0], b[1], sums[0], sums[1],
        sums[2], sums[3], static_cast<uint8_t>(scale_a), static_cast<uint8_t>(scale_b));
  }
}

}  // namespace micromix::blackwell
