// The counter-based generator of codec/random.py: bit i depends on the seed and i alone.
#pragma once

#include "vectors.hpp"

namespace fedomc::FEDOMC_LEVEL {
namespace {

// MurmurHash3's finaliser (Appleby, public domain).
template <class V>
inline V mix(V x) {
  x ^= x >> 16;
  x *= 0x85EBCA6Bu;
  x ^= x >> 13;
  x *= 0xC2B2AE35u;
  return x ^ (x >> 16);
}

// 32 random bits for each value of a stretch that begins at a counter.
struct RandomBits {
  std::uint32_t low, high, counter;
  U lanes;

  RandomBits(std::uint64_t seed, std::uint64_t at)
      : low(mix(static_cast<std::uint32_t>(seed))),
        high(mix(static_cast<std::uint32_t>(seed >> 32) ^ 0x9E3779B9u ^ static_cast<std::uint32_t>(at >> 32))),
        counter(static_cast<std::uint32_t>(at)) {
    for (std::size_t lane = 0; lane < kWidth; ++lane) lanes[lane] = static_cast<std::uint32_t>(lane);
  }

  // For the vector of values from i on.
  inline U operator()(std::size_t i) const {
    return mix(mix((lanes + (counter + static_cast<std::uint32_t>(i))) ^ low) + high);
  }
};

}  // namespace
}  // namespace fedomc::FEDOMC_LEVEL
