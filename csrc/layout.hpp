// The bit layout of codec/layout.py: blocks of 32 rows of 32 lanes; each lane packs its codes into 32-bit words.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fedomc {

constexpr std::size_t kLanes = 32;
constexpr std::size_t kRows = 32;
constexpr std::size_t kBlock = kLanes * kRows;
constexpr std::size_t kChunkBlocks = 64;  // blocks that a thread processes at a time
constexpr std::size_t kChunk = kChunkBlocks * kBlock;
constexpr std::size_t kSums = 5;  // D, D*D, D*R, R*R, R

// The number of 32-bit words that hold n codes.
constexpr std::size_t words_of(std::size_t n, unsigned bits) {
  const std::size_t rows = (n % kBlock + kLanes - 1) / kLanes;
  return kLanes * (n / kBlock * bits + (rows * bits + 31) / 32);
}

// The dtypes of dense values. The kernels calculate in float32, round what they decode to nearest, ties to even, and
// take gradients in any of them.
enum class Dtype { kFloat32, kBfloat16, kFloat16 };

constexpr std::size_t size_of(Dtype dtype) { return dtype == Dtype::kFloat32 ? 4 : 2; }

// Dense values to read.
struct Dense {
  const void* data;
  Dtype dtype;

  Dense from(std::size_t value) const { return {static_cast<const char*>(data) + value * size_of(dtype), dtype}; }
};

// Memory for dense values.
struct DenseRoom {
  void* data;
  Dtype dtype;

  DenseRoom from(std::size_t value) const { return {static_cast<char*>(data) + value * size_of(dtype), dtype}; }
};

// A number format SxEyMz, as defined in codec/elements.py.
struct Format {
  unsigned exponent_bits;
  unsigned mantissa_bits;
  unsigned reserved = 0;  // codes above the largest finite one, in OCP formats

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
  // The bias of the units for rounding and summing, chosen so that a block's sum of squares stays finite.
  constexpr int working_bias() const { return exponent_bits == 7 ? bias() + 4 : bias(); }
  // The range of scaling exponents for which every decoded value is zero or a normal float32.
  constexpr int least_exponent() const { return top_exponent() < 127 ? top_exponent() - 127 : 0; }
  constexpr int most_exponent() const {
    const int most = 120 - bias() - static_cast<int>(mantissa_bits);
    return most > 0 ? most : 0;
  }
  // The exponent that scales a magnitude, given as float32 bits, into the top binade, or into the binade below it if it
  // would exceed the largest code; see codec/scaling.py.
  constexpr int fitting_exponent(std::uint32_t magnitude, bool stochastic) const {
    if (exponent_bits == 8 || magnitude == 0) return 0;
    const int field = static_cast<int>(magnitude >> 23);
    const unsigned dropped = 23 - mantissa_bits;
    std::uint32_t limit = max_code() << dropped & 0x7FFFFFu;
    if (!stochastic) limit += dropped ? (1u << (dropped - 1)) - 1 : 0;
    const bool exceeds = field && (magnitude & 0x7FFFFFu) > limit;
    return top_exponent() - (field ? field - 127 : -126) - (exceeds ? 1 : 0);
  }
};

// A range of a variable that starts at a block boundary: codes and the transformation to their values.
struct Packed {
  const std::uint32_t* words;
  Format format;
  float scale;
  float offset;
};

// How values are rounded to codes.
struct Rounding {
  int exponent;         // values are first scaled by 2**exponent to the units of the working bias
  bool stochastic;      // otherwise to nearest, ties to even
  std::uint64_t seed;   // seed of stochastic rounding
  std::uint64_t start;  // index of the first value in the variable, the counter of stochastic rounding
};

// The results of a pass over values.
struct Found {
  double* sums;           // [kSums], written if not null
  std::uint32_t largest;  // float32 bits of the largest magnitude
  bool changed;           // whether a value differs from its decoded value; true if nothing was decoded
};

// The element of a blockwise method, as defined in codec/elements.py.
enum class ElementKind { kInteger, kNormalFloat, kOcp, kFloat };

struct Element {
  ElementKind kind;
  unsigned bits;
  Format format;  // only for kOcp and kFloat

  constexpr bool is_float() const { return kind == ElementKind::kOcp || kind == ElementKind::kFloat; }
};

// A range of a blockwise variable that starts at a layout block: codes, and one scale for each `block` values.
// Scales are float32; for floats they are E8M0 exponents of one byte each.
template <class Word, class Scale>
struct Blockwise {
  Word* words;
  Scale* scales;
  std::size_t block;
};
using BlockPacked = Blockwise<const std::uint32_t, const void>;
using BlockRoom = Blockwise<std::uint32_t, void>;

// The random rotations of DRIVE1 and DRIVE2, as defined in codec/reference_rotation.py.
struct Rotation {
  unsigned bits;        // of a code, 1 or 2
  std::uint64_t seed;   // seed of the signs
  std::uint64_t start;  // index of the first value in the variable
  bool unbiased;        // the scale when encoding; otherwise the one of the least squared error
};

}  // namespace fedomc
