// Conversion of a block between float32, in which the kernels calculate, and the narrower dtypes of dense tensors.
#pragma once

#include <array>
#include <cstring>

#include "layout.hpp"
#include "packing.hpp"
#include "vectors.hpp"

namespace fedomc::FEDOMC_LEVEL {
namespace {

using S = std::uint16_t __attribute__((vector_size(kBytes / 2)));
using Narrow = std::array<std::uint16_t, kBlock>;

constexpr std::uint32_t kRebias = 112u << 23;                 // between the exponents of float16 and float32
constexpr std::uint32_t kFirstNormal = kRebias + (1u << 23);  // the float32 bits of float16's smallest normal value
constexpr std::uint32_t kInfinity16 = 0x7C00u;

// Rounds to nearest, ties to even. No value is NaN.
inline S bfloat16_of(F value) {
  const U bits = cast<U>(value);
  return __builtin_convertvector((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16, S);
}

// The same; what is too large for float16 becomes infinite.
inline S float16_of(F value) {
  const U bits = cast<U>(value), magnitude = bits & ~kSign;
  const U normal = (magnitude - kRebias + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13;
  // The last place of 1/2 is the step of float16's subnormals, so that the sum rounds to it.
  const U subnormal = cast<U>(cast<F>(magnitude) + 0.5f) - cast<std::uint32_t>(0.5f);
  const U code = min(below(magnitude, splat(kFirstNormal)) ? subnormal : normal, splat(kInfinity16));
  return __builtin_convertvector(code | ((bits & kSign) >> 16), S);
}

inline F of_bfloat16(S value) { return cast<F>(__builtin_convertvector(value, U) << 16); }

// Infinity and NaN remain what they are.
inline F of_float16(S value) {
  const U bits = __builtin_convertvector(value, U), magnitude = (bits & 0x7FFFu) << 13;
  const U normal = magnitude + (below(magnitude, splat(kInfinity16 << 13)) ? splat(kRebias) : splat(2 * kRebias));
  const U subnormal = cast<U>(cast<F>(magnitude + kFirstNormal) - cast<float>(kFirstNormal));
  return cast<F>((below(magnitude, splat(kOneExponent)) ? subnormal : normal) | ((bits & 0x8000u) << 16));
}

// Rounds the first `count` values of a block, up to a whole vector.
void narrow(const Values& values, std::size_t count, Dtype dtype, std::uint16_t* to) {
  if (dtype == Dtype::kBfloat16) {
    for (std::size_t i = 0; i < count; i += kWidth) store(to + i, bfloat16_of(load<F>(values.data() + i)));
  } else {
    for (std::size_t i = 0; i < count; i += kWidth) store(to + i, float16_of(load<F>(values.data() + i)));
  }
}

// Returns the `count` values of a block as float32, which may be in `room`.
inline const float* widened(const Dense& values, std::size_t at, std::size_t count, Values& room) {
  if (values.dtype == Dtype::kFloat32) return static_cast<const float*>(values.data) + at;
  Narrow padding;
  const std::uint16_t* from = static_cast<const std::uint16_t*>(values.data) + at;
  if (count % kWidth) {
    std::memcpy(padding.data(), from, count * sizeof *from);
    std::memset(padding.data() + count, 0, (kBlock - count) * sizeof *from);
    from = padding.data();
  }
  if (values.dtype == Dtype::kBfloat16) {
    for (std::size_t i = 0; i < count; i += kWidth) store(room.data() + i, of_bfloat16(load<S>(from + i)));
  } else {
    for (std::size_t i = 0; i < count; i += kWidth) store(room.data() + i, of_float16(load<S>(from + i)));
  }
  return room.data();
}

}  // namespace
}  // namespace fedomc::FEDOMC_LEVEL
