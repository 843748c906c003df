// How the codes of a block lie in a placed weight: so that few instructions bring them to where
// bfloat16 has them.
//
// There, two channels in the halves of a register, a code has its sign in bit 15 of a half and its
// magnitude around bit 7, where exponent and mantissa meet. Those bits of some registers, a unit,
// fill some words exactly. A piece is what a register has of a word: the word turned, and masked.
#pragma once

#include <bit>
#include <span>
#include <utility>

#include "../mx/elements.h"

namespace micromix::cuda {

struct Piece {
  int word, reg;  // of a unit
  int turn;       // to the right
  uint32_t mask;  // of the turned word, the same in both halves

  constexpr Piece(int word, int reg, int turn, uint32_t half)
      : word(word), reg(reg), turn((turn + 32) % 32), mask(half | half << 16) {}
};

// Found by search, with the fewest shifts and masks. Turns to the left are negative.
constexpr Piece kPiecesOfE2M1[] = {
    {0, 0, -6, 0x81C0}, {0, 1, -2, 0x81C0}, {0, 2, 4, 0x81C0},  // three registers
    {0, 3, 0, 0x8180},  {0, 3, 8, 0x0040},                      // and what is left
};
constexpr Piece kPiecesOfE2M3[] = {
    {0, 0, 0, 0x81F0},  {0, 1, 6, 0x01F0},  {0, 1, -12, 0x8000},  // two of each word
    {1, 2, 0, 0x81F0},  {1, 3, 5, 0x01F0},  {1, 3, -1, 0x8000},   //
    {2, 4, 0, 0x81F0},  {2, 5, 5, 0x01B0},  {2, 5, -4, 0x8040},   //
    {1, 6, -5, 0x01E0}, {2, 6, -1, 0x8010},                       // and two of what is left
    {0, 7, -6, 0x81C0}, {2, 7, -4, 0x0030},                       //
};
constexpr Piece kPiecesOfE3M2[] = {
    {0, 0, 0, 0x83E0},  {0, 1, 5, 0x83E0},                       // two of each word
    {1, 2, 0, 0x83E0},  {1, 3, 5, 0x83C0},  {1, 3, -5, 0x0020},  //
    {2, 4, 0, 0x83E0},  {2, 5, 5, 0x8320},  {2, 5, -4, 0x00C0},  //
    {0, 6, -6, 0x03C0}, {2, 6, -4, 0x8020},                      // and two of what is left
    {1, 7, -5, 0x81C0}, {2, 7, 7, 0x0220},                       //
};
constexpr Piece kPiecesOfE4M3[] = {
    {0, 0, 0, 0x87F0}, {0, 1, -4, 0x80F0}, {0, 1, 4, 0x0700},  // a register, and what is left
    {1, 2, 0, 0x87F0}, {1, 3, -4, 0x80F0}, {1, 3, 4, 0x0700},  //
};

template <mx::ElementFormat kFormat>
consteval std::span<const Piece> pieces_of() {
  if constexpr (kFormat == mx::E2M1) return kPiecesOfE2M1;
  if constexpr (kFormat == mx::E2M3) return kPiecesOfE2M3;
  if constexpr (kFormat == mx::E3M2) return kPiecesOfE3M2;
  if constexpr (kFormat == mx::E4M3) return kPiecesOfE4M3;
}
template <mx::ElementFormat kFormat>
constexpr int kUnitWords = pieces_of<kFormat>().back().word + 1;
template <mx::ElementFormat kFormat>
constexpr int kUnitRegisters = 32 * kUnitWords<kFormat> / (2 * kFormat.bits);

// Calls visit(i) for each piece, i being a constant.
template <mx::ElementFormat kFormat, typename Visit>
MX_HOST_DEVICE constexpr void for_each_piece(const Visit& visit) {
  [&]<size_t... kIndices>(std::index_sequence<kIndices...>) {
    (visit(std::integral_constant<size_t, kIndices>()), ...);
  }(std::make_index_sequence<pieces_of<kFormat>().size()>());
}

// A word turned to the right, and masked.
template <int kTurn, uint32_t kMask>
MX_HOST_DEVICE constexpr uint32_t turned(uint32_t word) {
  if constexpr (kTurn == 0) {
    return word & kMask;
  } else if constexpr ((kMask << kTurn >> kTurn) == kMask) {
    return word >> kTurn & kMask;
  } else if constexpr ((kMask >> (32 - kTurn) << (32 - kTurn)) == kMask) {
    return word << (32 - kTurn) & kMask;
  } else {
    return (word >> kTurn | word << (32 - kTurn)) & kMask;
  }
}

// Four registers of a unit, from kFirst on, of its words.
template <mx::ElementFormat kFormat, int kFirst>
MX_HOST_DEVICE constexpr void take_registers(const uint32_t* words, uint32_t (&four)[4]) {
  for_each_piece<kFormat>([&](auto i) {
    constexpr Piece p = pieces_of<kFormat>()[i];
    if constexpr (p.reg >= kFirst && p.reg < kFirst + 4)
      four[p.reg - kFirst] |= turned<p.turn, p.mask>(words[p.word]);
  });
}

// A code where a half of a register has it.
template <mx::ElementFormat kFormat>
MX_HOST_DEVICE constexpr uint32_t in_bfloat16(uint32_t code) {
  constexpr int kSign = kFormat.bits - 1;
  return (code & ((1u << kSign) - 1)) << (7 - kFormat.mantissa_bits) | code >> kSign << 15;
}

// The codes of a block, one after another from the lowest bit on, to its words, which are zeros
// before. Register i of eight channels has i and i + 4.
template <mx::ElementFormat kFormat>
MX_HOST_DEVICE constexpr void arrange(const uint32_t* codes, uint32_t* words) {
  const auto in_half = [&](int channel) {
    const int bit = channel * kFormat.bits, in_word = bit % 32;
    const uint32_t beyond = in_word + kFormat.bits > 32 ? codes[bit / 32 + 1] << (32 - in_word) : 0;
    return in_bfloat16<kFormat>((codes[bit / 32] >> in_word | beyond) & ((1u << kFormat.bits) - 1));
  };
  for (int unit = 0; unit < kFormat.bits / kUnitWords<kFormat>; ++unit) {
    for_each_piece<kFormat>([&](auto i) {
      constexpr Piece p = pieces_of<kFormat>()[i];
      const int of_block = unit * kUnitRegisters<kFormat> + p.reg;
      const int channel = of_block / 4 * 8 + of_block % 4;
      const uint32_t both = (in_half(channel) | in_half(channel + 4) << 16) & p.mask;
      words[unit * kUnitWords<kFormat> + p.word] |= std::rotl(both, p.turn);
    });
  }
}

// Every bit of a code has a place, and no place two.
template <mx::ElementFormat kFormat>
consteval bool fills_its_words() {
  uint32_t codes[kFormat.bits], words[kFormat.bits] = {};
  for (uint32_t& word : codes) word = ~0u;
  arrange<kFormat>(codes, words);
  constexpr uint32_t kCode = in_bfloat16<kFormat>((1u << kFormat.bits) - 1);
  uint32_t taken[kUnitRegisters<kFormat>] = {};
  for (const Piece& p : pieces_of<kFormat>()) {
    if (taken[p.reg] & p.mask) return false;
    taken[p.reg] |= p.mask;
  }
  for (const uint32_t reg : taken)
    if (reg != (kCode | kCode << 16)) return false;
  for (const uint32_t word : words)
    if (word != ~0u) return false;
  return true;
}
static_assert(fills_its_words<mx::E2M1>() && fills_its_words<mx::E2M3>() &&
              fills_its_words<mx::E3M2>() && fills_its_words<mx::E4M3>());

}  // namespace micromix::cuda
