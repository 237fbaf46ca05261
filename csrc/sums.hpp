// Sums for the least-squares fit.
#pragma once

#include <array>

#include "layout.hpp"
#include "vectors.hpp"

namespace fedomc::FEDOMC_LEVEL {
namespace {

struct Halves {
  H low, high;
};

inline D widened(const D& v, std::size_t) { return v; }
inline D widened(const F& v, std::size_t half) {
  const Halves halves = cast<Halves>(v);
  return widen(half == 0 ? halves.low : halves.high);
}

using Lanes = std::array<std::array<double, kLanes>, kSums>;

// Sums of D = V - R and R, both in the format's units. Every instruction set sums in the order of codec/reference.py:
// the rows of a block in each lane in float32, then the blocks of a chunk and finally the lanes, by halves, in float64.
template <class V>
struct SumsIn {
  V d{}, dd{}, dr{}, rr{}, r{};

  inline void add(V difference, V represented) {
    d += difference;
    dd += difference * difference;
    dr += difference * represented;
    rr += represented * represented;
    r += represented;
  }

  // Adds as many lanes as a D holds; for float32 sums, that is one half of the vector.
  inline void add_to(Lanes& lanes, std::size_t lane, std::size_t half) const {
    const V sums[] = {d, dd, dr, rr, r};
    for (std::size_t term = 0; term < kSums; ++term) {
      double* to = &lanes[term][lane + half * kWidth / 2];
      store(to, load<D>(to) + widened(sums[term], half));
    }
  }
};

// The sums in each lane of a vector.
template <bool Wide>
struct Sums {
  SumsIn<F> sums;

  inline void add(F difference, F represented) { sums.add(difference, represented); }
  inline void add_to(Lanes& lanes, std::size_t lane) const {
    sums.add_to(lanes, lane, 0);
    sums.add_to(lanes, lane, 1);
  }
};

// With eight exponent bits, squares may overflow float32, so all sums are in float64.
template <>
struct Sums<true> {
  SumsIn<D> low, high;

  inline void add(F difference, F represented) {
    const Halves x = cast<Halves>(difference), y = cast<Halves>(represented);
    low.add(widen(x.low), widen(y.low));
    high.add(widen(x.high), widen(y.high));
  }
  inline void add_to(Lanes& lanes, std::size_t lane) const {
    low.add_to(lanes, lane, 0);
    high.add_to(lanes, lane, 1);
  }
};

// Adds lanes by halves. Values are in units of 1 / scale, and products in units of its square.
void add_lanes(Lanes& lanes, double scale, double* sums) {
  for (std::size_t term = 0; term < kSums; ++term) {
    for (std::size_t width = kLanes / 2; width; width /= 2)
      for (std::size_t lane = 0; lane < width; ++lane) lanes[term][lane] += lanes[term][lane + width];
    sums[term] = lanes[term][0] / (term == 0 || term == kSums - 1 ? scale : scale * scale);
  }
}

}  // namespace
}  // namespace fedomc::FEDOMC_LEVEL
