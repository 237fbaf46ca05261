// Inputs that are made of integers alone, so that every machine has the same ones.
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

#include "layout.hpp"

namespace fedomc {

using Words = std::vector<std::uint32_t>;
using Bytes = std::vector<std::uint8_t>;
using Values = std::vector<float>;

// SplitMix64 (Steele, Lea and Flood, 2014).
class Generator {
 public:
  explicit Generator(std::uint64_t seed) : state_(seed) {}
  std::uint64_t operator()() {
    std::uint64_t x = state_ += 0x9E3779B97F4A7C15u;
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9u;
    x = (x ^ x >> 27) * 0x94D049BB133111EBu;
    return x ^ x >> 31;
  }

 private:
  std::uint64_t state_;
};

inline float of_bits(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline std::uint32_t bits_of(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

// The sum of four uniform numbers: what weights look like. Some are ties of narrow formats, and some are zero.
inline Values ordinary(std::size_t n, std::uint64_t seed = 1) {
  Generator next(seed);
  Values values(n);
  for (std::size_t i = 0; i < n; ++i) {
    const std::uint64_t x = next();
    int sum = -2 * 65535;
    for (int part = 0; part < 4; ++part) sum += static_cast<int>(x >> 16 * part & 65535);
    values[i] = static_cast<float>(sum) * 0x1p-16f;
    if (i % 7 == 1) values[i] = static_cast<float>(sum / 4096) * 0x1p-4f;
    if (i % 13 == 5) values[i] = i % 2 ? -0.0f : 0.0f;
  }
  return values;
}

// Any finite float32, among them subnormals, and values at the ends of the range of normal numbers.
inline Values any_finite(std::size_t n) {
  Generator next(2);
  Values values = ordinary(n, 3);
  for (std::size_t i = 0; i < n; i += 3) {
    const auto bits = static_cast<std::uint32_t>(next());
    values[i] = of_bits((bits & 0x7F800000u) == 0x7F800000u ? bits & ~0x40000000u : bits);
  }
  for (std::size_t i = 2; i < n; i += 11) values[i] = of_bits(static_cast<std::uint32_t>(next()) & 0x807FFFFFu);
  for (std::size_t i = 6; i < n; i += 29) values[i] = of_bits(0x007FFFF0u + static_cast<std::uint32_t>(next() % 32));
  return values;
}

inline Words any_words(std::size_t n, unsigned bits, std::uint64_t seed = 4) {
  Generator next(seed);
  Words words(words_of(n, bits));
  for (std::uint32_t& word : words) word = static_cast<std::uint32_t>(next());
  return words;
}

}  // namespace fedomc
