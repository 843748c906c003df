// Compares where the simulated atoms take each element, scale and sum from with CuTe's traits of
// the native ones: an element that is 1 is looked for in the result of products whose other operand
// tells rows, columns and channels apart. Prints the first mismatches.
#include <cute/atom/copy_traits_sm100.hpp>
#include <cute/atom/mma_traits_sm120.hpp>
#include <cute/tensor.hpp>

#include "cutlass/simulator/simulator.cpp"

namespace {

using namespace micromix::blackwell;

int mismatches = 0;

void expect(const char* what, int index, double found, double wanted) {
  if (found == wanted) return;
  std::printf("%s %d: %g, not %g\n", what, index, found, wanted);
  if (++mismatches == 10) std::exit(1);
}

// The registers of a warp.
struct Warp {
  uint32_t a[32][4] = {}, b[32][2] = {}, scale_a[32] = {}, scale_b[32] = {};
  float sums[32][4] = {};
};

template <bool kPacked, Element E>
void run(std::vector<Warp>& warps) {
  simulator::launch(32, {1, 1, 1}, 128, {}, [&] {
    const int lane = thread_index();
    for (Warp& warp : warps)
      multiply<kPacked, E, E>(warp.sums[lane], warp.a[lane], warp.b[lane], warp.scale_a[lane],
                              warp.scale_b[lane]);
  });
}

template <typename Traits, bool kPacked, Element E>
void compare(const char* name) {
  constexpr int kK = kPacked ? 64 : 32, kBits = kPacked ? 4 : 8, kCodes = 32 / kBits;
  constexpr mx::ElementFormat f = format_of(E);
  const uint32_t one = mx::encode(1.0f, f);
  const typename Traits::ALayout a_layout;
  const typename Traits::BLayout b_layout;
  const typename Traits::CLayout c_layout;
  const typename Traits::SFALayout scale_a_layout;
  const typename Traits::SFBLayout scale_b_layout;
  const auto put = [](auto& registers, int lane, int value, uint32_t code) {
    registers[lane][value / kCodes] |= code << (kBits * (value % kCodes));
  };

  // One element of A, and B whose columns hold one channel's bit of its number: the sums, over the
  // bits, give the channel; where they are gives the row.
  for (int lane = 0; lane < 32; ++lane)
    for (int value = 0; value < 4 * kCodes; ++value)
      for (const bool of_b : {false, true}) {
        if (of_b && value >= 2 * kCodes) continue;
        const int at = of_b ? b_layout(lane, value) : a_layout(lane, value);
        const int outer = at % (of_b ? 8 : 16), k = at / (of_b ? 8 : 16);
        std::vector<Warp> warps(6);
        for (int bit = 0; bit < 6; ++bit) {
          Warp& warp = warps[bit];
          std::fill_n(warp.scale_a, 32, 0x7F7F7F7F);
          std::fill_n(warp.scale_b, 32, 0x7F7F7F7F);
          of_b ? put(warp.b, lane, value, one) : put(warp.a, lane, value, one);
          for (int other = 0; other < 32; ++other)
            for (int v = 0; v < (of_b ? 4 : 2) * kCodes; ++v) {
              const int place = of_b ? a_layout(other, v) : b_layout(other, v);
              if (!(place / (of_b ? 16 : 8) >> bit & 1)) continue;
              of_b ? put(warp.a, other, v, one) : put(warp.b, other, v, one);
            }
        }
        run<kPacked, E>(warps);
        int found = 0;
        for (int bit = 0; bit < 6; ++bit)
          for (int l = 0; l < 32; ++l)
            for (int v = 0; v < 4; ++v) {
              const float sum = warps[bit].sums[l][v];
              const int m = c_layout(l, v) % 16, n = c_layout(l, v) / 16;
              expect(name, lane * 100 + value, sum, (of_b ? n : m) == outer && k >> bit & 1);
              found |= (sum != 0) << bit;
            }
        expect(name, lane * 100 + value, found, k);
      }

  // Ones, under scales that tell rows, columns and halves apart. CuTe's layouts have a scale for
  // each element; a lane's byte is that of its block.
  std::vector<Warp> warps(1);
  Warp& warp = warps[0];
  const auto exponent_a = [](int m, int half) { return 112 + m + 2 * half; };
  const auto exponent_b = [](int n, int half) { return 125 + n - 3 * half; };
  for (int lane = 0; lane < 32; ++lane) {
    for (int v = 0; v < 4 * kCodes; ++v) put(warp.a, lane, v, one);
    for (int v = 0; v < 2 * kCodes; ++v) put(warp.b, lane, v, one);
    for (int half = 0; half < kK / 32; ++half) {
      warp.scale_a[lane] |= exponent_a(scale_a_layout(lane, 32 * half) % 16, half) << (8 * half);
      warp.scale_b[lane] |= exponent_b(scale_b_layout(lane, 32 * half) % 8, half) << (8 * half);
    }
  }
  run<kPacked, E>(warps);
  for (int lane = 0; lane < 32; ++lane)
    for (int v = 0; v < 4; ++v) {
      const int m = c_layout(lane, v) % 16, n = c_layout(lane, v) / 16;
      double wanted = 0;
      for (int half = 0; half < kK / 32; ++half)
        wanted += std::ldexp(32, exponent_a(m, half) + exponent_b(n, half) - 254);
      expect("scale", lane * 100 + v, warp.sums[lane][v], wanted);
    }
}

// The unpacking load: what lane l's register j holds, by the layout of bytes that CuTe gives.
template <typename Copy, int kBits>
void compare_load(const char* name) {
  using Traits = cute::Copy_Traits<Copy>;
  const typename Traits::SrcLayout source;
  const typename Traits::DstLayout destination;
  uint32_t out[32][4];
  simulator::launch(32, {1, 1, 1}, 512, {}, [&] {
    const int lane = thread_index();
    uint8_t* const row = simulator::shared(16 * lane, 16);
    std::memset(row, 0, 16);
    for (int i = 0; i < 16; ++i) {  // code: 5 bits or 4 of the place in its row and the row
      const uint32_t code = (i + 3 * lane) % (1 << kBits);
      const int bit = i * kBits;
      row[bit / 8] |= code << (bit % 8);
      if (bit % 8 + kBits > 8) row[bit / 8 + 1] |= code >> (8 - bit % 8);
    }
    load_matrices<kBits>(out[lane], 16 * lane);
  });
  for (int lane = 0; lane < 32; ++lane)
    for (int byte = 0; byte < 16; ++byte) {
      const int at = destination(lane, 8 * byte) / 8;  // of 32 rows of 16 bytes, unpacked
      const int row = at / 16, i = at % 16;
      expect("address", lane, source(row, 8 * i), row * 128 + 8 * i);
      const uint32_t code = (i + 3 * row) % (1 << kBits);
      expect(name, lane * 100 + byte, out[lane][byte / 4] >> (8 * (byte % 4)) & 0xFF,
             kBits == 4 ? code << 2 : code);
    }
}

}  // namespace

int main() {
  using Scale = cute::float_ue8m0_t;
  namespace scaled = cute::SM120::BLOCKSCALED;
  compare<cute::MMA_Traits<scaled::SM120_16x8x32_TN_VS<cute::float_e4m3_t, cute::float_e4m3_t,
                                                       float, Scale, 32>>,
          false, Element::kE4M3>("16x8x32");
  compare<cute::MMA_Traits<scaled::SM120_16x8x64_TN_VS<cute::float_e2m1_t, cute::float_e2m1_t,
                                                       float, Scale, 32>>,
          true, Element::kE2M1>("16x8x64");
  compare_load<cute::SM100_SU6_DU8x16_x4_LDSM_N, 6>("6-bit load");
  compare_load<cute::SM100_SU4_DU8x16_x4_LDSM_N, 4>("4-bit load");
  std::printf("%d mismatches\n", mismatches);
  return mismatches != 0;
}
