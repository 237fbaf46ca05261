// The bit layout of codec/layout.py: blocks of 32 rows of 32 lanes; each lane packs its codes into 32-bit words.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fedomc {

constexpr std::size_t kLanes = 32;
constexpr std::size_t kRows = 32;
constexpr std::size_t kBlock = kLanes * kRows;
constexpr std::size_t kChunkBlocks = 64;  // blocks that one thread takes at a time
constexpr std::size_t kChunk = kChunkBlocks * kBlock;
constexpr std::size_t kSums = 5;  // D, D*D, D*R, R*R, R

// How many 32-bit words hold n codes.
constexpr std::size_t words_of(std::size_t n, unsigned bits) {
  const std::size_t rows = (n % kBlock + kLanes - 1) / kLanes;
  return kLanes * (n / kBlock * bits + (rows * bits + 31) / 32);
}

// A number format SxEyMz, as codec/elements.py has it.
struct Format {
  unsigned exponent_bits;
  unsigned mantissa_bits;
  unsigned reserved = 0;  // codes above the largest finite one, in formats of the OCP specification

  constexpr unsigned bits() const { return 1 + exponent_bits + mantissa_bits; }
  constexpr int bias() const { return (1 << (exponent_bits - 1)) - 1; }
  constexpr std::uint32_t max_code() const { return ((top_field() + 1) << mantissa_bits) - 1 - reserved; }
  constexpr std::uint32_t top_field() const { return exponent_bits == 8 ? 254u : (1u << exponent_bits) - 1; }
  constexpr int top_exponent() const { return static_cast<int>(max_code() >> mantissa_bits) - bias(); }
  constexpr float max_value() const {
    float value = static_cast<float>((2u << mantissa_bits) - 1);
    const int steps = static_cast<int>(max_code() >> mantissa_bits) - bias() - static_cast<int>(mantissa_bits);
    for (int i = 0; i < steps; ++i) value *= 2.0f;
    for (int i = 0; i > steps; --i) value *= 0.5f;
    return value;
  }
  // The bias of the units in which values are rounded and summed: a block's sum of squares must stay finite.
  constexpr int working_bias() const { return exponent_bits == 7 ? bias() + 4 : bias(); }
  // The powers of two by which values may be scaled: every decoded value is zero or a normal float32.
  constexpr int least_exponent() const { return top_exponent() < 127 ? top_exponent() - 127 : 0; }
  constexpr int most_exponent() const {
    const int most = 120 - bias() - static_cast<int>(mantissa_bits);
    return most > 0 ? most : 0;
  }
  // The power of two that moves a magnitude, given as float32 bits, into the top binade, or into the one below it if it
  // would lie above the largest code there; see codec/scaling.py.
  constexpr int fitting_exponent(std::uint32_t magnitude, bool stochastic) const {
    if (exponent_bits == 8 || magnitude == 0) return 0;
    const int field = static_cast<int>(magnitude >> 23);
    const unsigned dropped = 23 - mantissa_bits;
    std::uint32_t limit = 0x7FFFFFu >> dropped << dropped;
    if (!stochastic) limit += dropped ? (1u << (dropped - 1)) - 1 : 0;
    const bool exceeds = field && (magnitude & 0x7FFFFFu) > limit;
    return top_exponent() - (field ? field - 127 : -126) - (exceeds ? 1 : 0);
  }
};

// A stretch of a variable that begins at a block: codes and the transformation that gives their values.
struct Packed {
  const std::uint32_t* words;
  Format format;
  float scale;
  float offset;
};

// How values are rounded to codes.
struct Rounding {
  int exponent;         // values are scaled by 2**exponent first, to the units of the working bias
  bool stochastic;      // otherwise to nearest, ties to the even code
  std::uint64_t seed;   // of stochastic rounding
  std::uint64_t start;  // index of the first value in its variable: the counter of stochastic rounding
};

// What a pass over values found.
struct Found {
  double* sums;           // [kSums], written if not null
  std::uint32_t largest;  // float32 bits of the largest magnitude
  bool changed;           // whether a value differs from what was decoded; true where nothing was
};

// What a code of a blockwise method is, as codec/elements.py has it.
enum class ElementKind { kInteger, kNormalFloat, kOcp };

struct Element {
  ElementKind kind;
  unsigned bits;
  Format format;  // of kOcp
};

// A stretch of a blockwise variable that begins at a block of the layout: codes, and a scale for each `block` values.
// Scales are float32, and with kOcp the exponents of E8M0, one byte each.
template <class Word, class Scale>
struct Blockwise {
  Word* words;
  Scale* scales;
  std::size_t block;
};
using BlockPacked = Blockwise<const std::uint32_t, const void>;
using BlockRoom = Blockwise<std::uint32_t, void>;

}  // namespace fedomc
