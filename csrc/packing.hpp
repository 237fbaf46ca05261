// Packs the codes of a block into words and unpacks them, in the bit layout of layout.hpp.
#pragma once

#include <array>
#include <cstring>
#include <utility>

#include "layout.hpp"
#include "vectors.hpp"

namespace fedomc::FEDOMC_LEVEL {
namespace {

using Codes = std::array<std::uint32_t, kBlock>;
using Values = std::array<float, kBlock>;

// Calls sink(i, codes) for each vector of codes in a block, where i is the index of its first value. The codes are in
// the upper bits; the lower bits are unspecified.
template <unsigned W, class Sink>
inline void for_each_code(const std::uint32_t* words, Sink sink) {
  for (std::size_t lane = 0; lane < kLanes; lane += kWidth) {
    [&]<unsigned... Row>(std::integer_sequence<unsigned, Row...>) {
      (
          [&] {
            constexpr unsigned position = Row * W, word = position / 32, end = position % 32 + W;
            U code = load<U>(words + kLanes * word + lane);
            if constexpr (end < 32) code <<= 32 - end;
            if constexpr (end > 32)
              code = code >> (end - 32) | load<U>(words + kLanes * (word + 1) + lane) << (64 - end);
            sink(kLanes * Row + lane, code);
          }(),
          ...);
    }(std::make_integer_sequence<unsigned, kRows>{});
  }
}

template <unsigned W>
void pack_block(const std::uint32_t* codes, std::uint32_t* words) {
  for (std::size_t lane = 0; lane < kLanes; lane += kWidth) {
    U word{};
    [&]<unsigned... Row>(std::integer_sequence<unsigned, Row...>) {
      (
          [&] {
            constexpr unsigned position = Row * W, index = position / 32, begin = position % 32;
            const U code = load<U>(codes + kLanes * Row + lane);
            word = begin == 0 ? code : word | code << begin;
            if constexpr (begin + W >= 32) {
              store(words + kLanes * index + lane, word);
              if constexpr (begin + W > 32) word = code >> (32 - begin);
            }
          }(),
          ...);
    }(std::make_integer_sequence<unsigned, kRows>{});
  }
}

using Pack = void (*)(const std::uint32_t*, std::uint32_t*);

template <unsigned... Index>
constexpr std::array<Pack, 32> packers(std::integer_sequence<unsigned, Index...>) {
  return {&pack_block<Index + 1>...};
}

// Indexed by the number of bits, starting at 1.
constexpr auto kPack = packers(std::make_integer_sequence<unsigned, 32>{});

// A whole block of words; the last block of a variable, which stores only the words of its rows, is padded with zeros.
struct WholeBlock {
  std::array<std::uint32_t, kBlock> words;
  const std::uint32_t* data;

  WholeBlock(const std::uint32_t* from, unsigned bits, std::size_t n) : data(from) {
    if (n == kBlock) return;
    words.fill(0);
    std::memcpy(words.data(), from, words_of(n, bits) * sizeof(std::uint32_t));
    data = words.data();
  }
};

void pack(const Codes& codes, unsigned bits, std::size_t n, std::uint32_t* words) {
  if (n == kBlock) {
    kPack[bits - 1](codes.data(), words);
    return;
  }
  std::array<std::uint32_t, kBlock> whole;
  kPack[bits - 1](codes.data(), whole.data());
  std::memcpy(words, whole.data(), words_of(n, bits) * sizeof(std::uint32_t));
}

}  // namespace
}  // namespace fedomc::FEDOMC_LEVEL
