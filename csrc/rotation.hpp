// The kernels of DRIVE1 and DRIVE2: a random rotation of each block, and codes of one or two bits.
// codec/reference_rotation.py defines every operation and the order of the additions, which is the same here.
#pragma once

#include <cmath>
#include <utility>

#include "blocks.hpp"
#include "packing.hpp"
#include "random.hpp"
#include "vectors.hpp"

namespace fedomc::FEDOMC_LEVEL {
namespace {

constexpr float kNothing = 0x1p-90f;     // blocks below it become zeros
constexpr float kNegligible = 0x1p-40f;  // values below it, in units of the block's binade, count as zero
constexpr float kFar = 2010.0f / 2048;   // between the magnitudes of the levels, in standard deviations
constexpr float kNearLevel = 3.0f, kFarLevel = 10.0f;

// ---- the Hadamard transform ---------------------------------------------------------------------------------------

// Butterflies between the lanes of a vector at a distance of Half: sums in the lower lanes, differences in the upper.
template <std::size_t Half>
inline F butterflies_of_lanes(F v) {
  return [&]<int... Lane>(std::integer_sequence<int, Lane...>) {
    const U upper = {(Lane & Half ? kSign : 0u)...};
#if defined(__clang__)
    const F other = __builtin_shufflevector(v, v, (Lane ^ static_cast<int>(Half))...);
#else
    const F other = __builtin_shuffle(v, I{(Lane ^ static_cast<int>(Half))...});
#endif
    return other + cast<F>(cast<U>(v) ^ upper);
  }(std::make_integer_sequence<int, kWidth>{});
}

template <std::size_t Half = kWidth / 2>
inline F transform_of_lanes(F v) {
  v = butterflies_of_lanes<Half>(v);
  if constexpr (Half > 1) v = transform_of_lanes<Half / 2>(v);
  return v;
}

// Butterflies between Radix vectors that are `stride` values apart, the farthest first.
template <std::size_t Radix>
inline void butterflies(float* x, std::size_t d, std::size_t stride) {
  for (std::size_t group = 0; group < d; group += Radix * stride)
    for (std::size_t i = group; i < group + stride; i += kWidth) {
      F v[Radix];
#pragma GCC unroll 8
      for (std::size_t k = 0; k < Radix; ++k) v[k] = load<F>(x + i + k * stride);
#pragma GCC unroll 3
      for (std::size_t half = Radix / 2; half; half /= 2) {
#pragma GCC unroll 8
        for (std::size_t k = 0; k < Radix; ++k) {
          if (k & half) continue;
          const F sum = v[k] + v[k + half], difference = v[k] - v[k + half];
          v[k] = sum;
          v[k + half] = difference;
        }
      }
#pragma GCC unroll 8
      for (std::size_t k = 0; k < Radix; ++k) store(x + i + k * stride, v[k]);
    }
}

// Multiplies d values by Sylvester's Hadamard matrix, and then each vector of the product by the signs that sign(i)
// returns in its highest bits.
template <class Sign>
inline void hadamard(float* x, std::size_t d, Sign sign) {
  std::size_t span = d;
  for (; span >= 8 * kWidth; span /= 8) butterflies<8>(x, d, span / 8);
  if (span == 4 * kWidth) butterflies<4>(x, d, kWidth);
  if (span == 2 * kWidth) butterflies<2>(x, d, kWidth);
  for (std::size_t i = 0; i < d; i += kWidth) {
    const F v = transform_of_lanes(load<F>(x + i));
    store(x + i, cast<U>(v) ^ (sign(i) & kSign));
  }
}

// The number of values that are rotated together: the capacity of the words of a block that holds `count` values.
inline std::size_t rotated_together(std::size_t count, unsigned bits) { return words_of(count, bits) * 32 / bits; }

// ---- codes to values ----------------------------------------------------------------------------------------------

// Returns the integer levels of codes, which are in the upper bits.
template <unsigned W>
inline F levels_of(U code) {
  const U sign = ~code & kSign;
  if constexpr (W == 1) return cast<F>(cast<U>(splat(1.0f)) | sign);
  const I near = cast<I>(code ^ code << 1) < 0;
  return cast<F>(cast<U>(near ? splat(kNearLevel) : splat(kFarLevel)) | sign);
}

template <unsigned W>
void rotated_decode(const std::uint32_t* words, const float* scales, const Rotation& rotation, const DenseRoom& out,
                    std::size_t n, bool streaming) {
  decode_chunk(out, n, streaming, [&](std::size_t block, std::size_t count, float* to) {
    const std::size_t d = rotated_together(count, W);
    const RandomBits random(rotation.seed, rotation.start + block * kBlock);
    const WholeBlock whole(words + block * W * kLanes, W, count);
    for_each_code<W>(whole.data, [&](std::size_t i, U code) {
      if (i < d) store(to + i, levels_of<W>(code));
    });
    hadamard(to, d, [&](std::size_t i) { return random(i) << 1; });
    hadamard(to, d, [&](std::size_t i) { return random(i); });
    const F scale = splat(scales[block]);
    for (std::size_t i = 0; i < d; i += kWidth)
      store(to + i, load<F>(to + i) * scale + splat(0.0f));  // the sum turns -0 into 0, as where the scale is zero
  });
}

void rotated_decode(const std::uint32_t* words, const float* scales, const Rotation& rotation, const DenseRoom& out,
                    std::size_t n, bool streaming) {
  return rotation.bits == 1 ? rotated_decode<1>(words, scales, rotation, out, n, streaming)
                            : rotated_decode<2>(words, scales, rotation, out, n, streaming);
}

// ---- values to codes ----------------------------------------------------------------------------------------------

// Sums the values by repeated halving.
inline float sum_by_halves(float* x, std::size_t d) {
  std::size_t half = d / 2;
  for (; half >= kWidth; half /= 2)
    for (std::size_t i = 0; i < half; i += kWidth) store(x + i, load<F>(x + i) + load<F>(x + i + half));
  for (; half; half /= 2)
    for (std::size_t i = 0; i < half; ++i) x[i] += x[i + half];
  return x[0];
}

// Encodes a block of values, padded with zeros, and returns its scale.
template <unsigned W>
float rotate_block(const float* values, std::size_t d, const RandomBits& random, bool unbiased, Codes& codes) {
  U magnitudes{};
  for (std::size_t i = 0; i < d; i += kWidth) magnitudes = max(magnitudes, load<U>(values + i) & ~kSign);
  const std::uint32_t largest = largest_lane(magnitudes);
  if (largest < cast<std::uint32_t>(kNothing) || largest > kExponent) {
    codes.fill(W == 1 ? 1 : 2);
    return 0.0f;
  }
  const float unit = cast<float>(largest & kExponent);
  alignas(64) Values x, terms;
  for (std::size_t i = 0; i < d; i += kWidth) {
    const F value = load<F>(values + i) * splat(2.0f / unit);
    const I kept = cast<F>(cast<U>(value) & ~kSign) >= splat(kNegligible);
    const F used = cast<F>(cast<U>(value) & cast<U>(kept));
    store(terms.data() + i, used * used);
    store(x.data() + i, cast<U>(used) ^ (random(i) & kSign));
  }
  const float power = sum_by_halves(terms.data(), d);
  hadamard(x.data(), d, [&](std::size_t i) { return random(i) << 1; });
  hadamard(x.data(), d, [](std::size_t) { return U{}; });
  const F threshold = splat(kFar * std::sqrt(power * static_cast<float>(d)));
  I negated_count{};  // of the codes that are far from zero
  for (std::size_t i = 0; i < d; i += kWidth) {
    const F y = load<F>(x.data() + i), magnitude = cast<F>(cast<U>(y) & ~kSign);
    const U positive = cast<U>(y >= F{});
    if constexpr (W == 1) {
      store(codes.data() + i, positive & 1u);
      store(terms.data() + i, magnitude);
    } else {
      const I far = magnitude > threshold;
      negated_count += far;
      // 0 to 3: far below, below, above, far above zero.
      store(codes.data() + i, (positive & 2u) | ((positive ^ ~cast<U>(far)) & 1u));
      store(terms.data() + i, magnitude * (far ? splat(kFarLevel) : splat(kNearLevel)));
    }
  }
  const float product = sum_by_halves(terms.data(), d), size = static_cast<float>(d);
  float quotient = power / product;
  if (!unbiased) {
    int count = 0;
    for (std::size_t lane = 0; lane < kWidth; ++lane) count -= negated_count[lane];
    const float squares = W == 1 ? size
                                 : kNearLevel * kNearLevel * (size - static_cast<float>(count)) +
                                       kFarLevel * kFarLevel * static_cast<float>(count);
    quotient = product / (squares * (size * size));
  }
  const float most = 0x1.fffffep+127f * (W == 1 ? 0x1p-15f : 0x1p-19f);
  const float scale = quotient * (unit * 0.5f);
  return scale < most ? scale : most;
}

template <unsigned W>
void rotated_encode(const float* values, std::size_t n, const Rotation& rotation, std::uint32_t* words, float* scales) {
  for_each_block(n, [&](std::size_t block, std::size_t at, std::size_t count) {
    alignas(64) Values room;
    alignas(64) Codes codes;
    const RandomBits random(rotation.seed, rotation.start + at);
    const std::size_t d = rotated_together(count, W);
    if (d < kBlock) codes.fill(0);
    scales[block] = rotate_block<W>(padded(values + at, count, room), d, random, rotation.unbiased, codes);
    pack(codes, W, count, words + block * W * kLanes);
  });
}

void rotated_encode(const float* values, std::size_t n, const Rotation& rotation, std::uint32_t* words, float* scales) {
  return rotation.bits == 1 ? rotated_encode<1>(values, n, rotation, words, scales)
                            : rotated_encode<2>(values, n, rotation, words, scales);
}

}  // namespace
}  // namespace fedomc::FEDOMC_LEVEL
