// A line for each operation, with a digest of everything that it wrote.
#pragma once

#include <cinttypes>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "inputs.hpp"

namespace fedomc {

// FNV-1a over 32-bit words. Machines differ in the sign of a NaN that an operation makes, so all NaNs count as one.
class Digest {
 public:
  void add(std::uint32_t word) { state_ = (state_ ^ word) * 0x100000001B3u; }
  void add(float value) { add(std::isnan(value) ? 0x7FC00000u : bits_of(value)); }
  void add(double value) {
    std::uint64_t bits = 0x7FF8000000000000u;
    if (!std::isnan(value)) std::memcpy(&bits, &value, sizeof bits);
    add(static_cast<std::uint32_t>(bits));
    add(static_cast<std::uint32_t>(bits >> 32));
  }
  void add(std::uint8_t byte) { add(std::uint32_t{byte}); }
  void add(std::uint16_t half) { add(std::uint32_t{half}); }
  template <class T>
  void add(const std::vector<T>& all) {
    for (const T& one : all) add(one);
  }
  std::uint64_t state() const { return state_; }

 private:
  std::uint64_t state_ = 0xCBF29CE484222325u;
};

inline std::size_t lines = 0, values_seen = 0;

// Prints a line for an operation on n values and everything that it wrote.
template <class... Written>
void report(const std::string& operation, std::size_t n, const Written&... written) {
  Digest digest;
  (digest.add(written), ...);
  std::printf("%s n=%zu %016" PRIx64 "\n", operation.c_str(), n, digest.state());
  lines += 1;
  values_seen += n;
}

}  // namespace fedomc
