// The counter-based generator of codec/random.py: the bits of a value depend only on the seed and its index.
#pragma once

#include <array>

#include "layout.hpp"
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

// Generates 32 random bits for each value of a block; the upper bits are of the best quality. Lanes and rows are fully
// hashed once, after which a value costs two multiplications.
struct RandomBits {
  alignas(64) std::array<std::uint32_t, kLanes> lanes, rows;

  // `at` is the counter of the block's first value.
  RandomBits(std::uint64_t seed, std::uint64_t at) {
    const std::uint32_t low = mix(static_cast<std::uint32_t>(seed));
    const std::uint32_t high = mix(static_cast<std::uint32_t>(seed >> 32) ^ 0x9E3779B9u);
    const std::uint32_t first = static_cast<std::uint32_t>(at);
    const std::uint32_t period = mix(static_cast<std::uint32_t>(at >> 32) + high);
    U index;
    for (std::size_t lane = 0; lane < kWidth; ++lane) index[lane] = static_cast<std::uint32_t>(lane);
    for (std::size_t i = 0; i < kLanes; i += kWidth, index += static_cast<std::uint32_t>(kWidth)) {
      store(lanes.data() + i, mix(mix((index + first) ^ low) + period));
      store(rows.data() + i, mix(mix((index + static_cast<std::uint32_t>(kLanes)) ^ high) + low));
    }
  }

  // Returns the bits of the vector of values that starts at i.
  inline U operator()(std::size_t i) const {
    U x = load<U>(lanes.data() + i % kLanes) ^ splat(rows[i / kLanes]);
    x *= 0x9E3779B1u;
    x ^= x >> 15;
    return x * 0x85EBCA77u;
  }
};

}  // namespace
}  // namespace fedomc::FEDOMC_LEVEL
