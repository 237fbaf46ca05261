// The kernels of blockwise methods: integers, NF4 and floats, with one scale for each block.
// See the note on scales in codec/reference_blocks.py.
#pragma once

#include <array>
#include <cstring>

#include "blocks.hpp"
#include "float_rounding.hpp"
#include "float_values.hpp"
#include "packing.hpp"
#include "random.hpp"

namespace fedomc::FEDOMC_LEVEL {
namespace {

constexpr std::uint32_t kLeast = static_cast<std::uint32_t>(127 - 90) << 23;  // 2**-90: blocks below it become zeros

using Table = std::array<float, 16>;

alignas(64) constexpr Table kNormalFloat = {
    -1.0f,
    -0.6961928009986877f,
    -0.5250730514526367f,
    -0.39491748809814453f,
    -0.28444138169288635f,
    -0.18477343022823334f,
    -0.09105003625154495f,
    0.0f,
    0.07958029955625534f,
    0.16093020141124725f,
    0.24611230194568634f,
    0.33791524171829224f,
    0.44070982933044434f,
    0.5626170039176941f,
    0.7229568362236023f,
    1.0f,
};

// Looks up table entries; the index is the four upper bits of each code.
inline F look_up(const Table& table, U code) {
#if defined(__AVX512F__)
  return cast<F>(_mm512_permutexvar_ps(cast<__m512i>(code >> 28), _mm512_load_ps(table.data())));
#elif defined(__AVX2__)
  const __m256i index = cast<__m256i>(code >> 28);
  const __m256 low = _mm256_permutevar8x32_ps(_mm256_load_ps(table.data()), index);
  const __m256 high = _mm256_permutevar8x32_ps(_mm256_load_ps(table.data() + 8), index);
  return cast<F>(_mm256_blendv_ps(low, high, cast<__m256>(code)));  // selects by the sign, the highest bit
#else
  F values{};
  for (std::size_t lane = 0; lane < kWidth; ++lane) values[lane] = table[code[lane] >> 28];
  return values;
#endif
}

// ---- codes to values ----------------------------------------------------------------------------------------------

template <unsigned W>
struct IntegerValues {
  inline F operator()(U code) const { return __builtin_convertvector(cast<I>(code) >> (32 - W), F); }
};

struct NormalFloatValues {
  inline F operator()(U code) const { return look_up(kNormalFloat, code); }
};

struct FloatValues {
  Represent represent;
  inline F operator()(U code) const { return represent.signed_value<false, true>(code); }
};

using RowScales = std::array<float, kRows>;

// Returns the scale of each row of a layout block.
template <class Scale>
RowScales row_scales(const Scale* scales, std::size_t at, std::size_t block, std::size_t count) {
  RowScales rows{};
  for (std::size_t row = 0; row * kLanes < count; ++row) {
    const Scale scale = scales[(at + row * kLanes) / block];
    if constexpr (sizeof scale == 1) {
      rows[row] = cast<float>(scale ? static_cast<std::uint32_t>(scale) << 23 : 1u << 22);
    } else {
      rows[row] = scale;
    }
  }
  return rows;
}

template <unsigned W, class Scale, class ValuesOf>
void decode_rows(const BlockPacked& packed, const ValuesOf& shared, std::size_t block, std::size_t count, float* out) {
  const ValuesOf values_of = shared;  // a copy: the stores below cannot alias its constants
  const WholeBlock whole(packed.words + block * W * kLanes, W, count);
  const RowScales scales = row_scales(static_cast<const Scale*>(packed.scales), block * kBlock, packed.block, count);
  for_each_code<W>(whole.data,
                   [&](std::size_t i, U code) { store(out + i, values_of(code) * splat(scales[i / kLanes])); });
}

using DecodeFloats = void (*)(const BlockPacked&, const FloatValues&, std::size_t, std::size_t, float*);

template <unsigned First, unsigned... Index>
constexpr std::array<DecodeFloats, sizeof...(Index)> float_decoders(std::integer_sequence<unsigned, Index...>) {
  return {&decode_rows<Index + First, std::uint8_t, FloatValues>...};
}

// Indexed by the number of bits, starting at 2.
constexpr auto kDecodeFloats = float_decoders<2>(std::make_integer_sequence<unsigned, 11>{});

// Calls use(decode), where decode(block, count, to) decodes one layout block.
template <class Use>
void with_decoder(const BlockPacked& packed, const Element& element, Use use) {
  const auto run = [&]<unsigned W, class Scale>(const auto& values_of) {
    use([&](std::size_t block, std::size_t count, float* to) {
      decode_rows<W, Scale>(packed, values_of, block, count, to);
    });
  };
  if (element.kind == ElementKind::kInteger) {
    if (element.bits == 8) return run.template operator()<8, float>(IntegerValues<8>{});
    return run.template operator()<4, float>(IntegerValues<4>{});
  }
  if (element.kind == ElementKind::kNormalFloat) return run.template operator()<4, float>(NormalFloatValues{});
  const FloatValues values_of{Represent(element.format, element.format.bias(), 1.0f, 0.0f)};
  const DecodeFloats decode_floats = kDecodeFloats[element.bits - 2];
  use([&](std::size_t block, std::size_t count, float* to) { decode_floats(packed, values_of, block, count, to); });
}

void block_decode(const BlockPacked& packed, const Element& element, const DenseRoom& out, std::size_t n,
                  bool streaming) {
  with_decoder(packed, element, [&](auto decode) { decode_chunk(out, n, streaming, decode); });
}

void block_decode_sum(const BlockPacked& base, const Element& element, const BlockPacked& update,
                      const Element& update_element, const DenseRoom& out, std::size_t n, bool streaming) {
  with_decoder(base, element, [&](auto decode) {
    with_decoder(update, update_element, [&](auto decode_update) {
      decode_chunk(out, n, streaming, [&](std::size_t block, std::size_t count, float* to) {
        alignas(64) Values changes;
        decode(block, count, to);
        decode_update(block, count, changes.data());
        for (std::size_t i = 0; i < kBlock; i += kWidth) store(to + i, load<F>(to + i) + load<F>(changes.data() + i));
      });
    });
  });
}

// ---- values to codes ----------------------------------------------------------------------------------------------

// Uniform random numbers in [0, 1) with 24 bits.
inline F uniform(const RandomBits& random, std::size_t i) {
  return __builtin_convertvector(cast<I>(random(i) >> 8), F) * 0x1p-24f;
}

template <bool Random>
struct RoundInteger {
  float limit;
  std::uint32_t mask;
  RandomBits random;

  RoundInteger(const Element& element, const Rounding& rounding, std::uint64_t at)
      : limit(static_cast<float>((1u << (element.bits - 1)) - 1)),
        mask((1u << element.bits) - 1),
        random(rounding.seed, at) {}

  inline U operator()(F quotient, std::size_t i) const {
    if constexpr (Random) {
      F floor = __builtin_convertvector(__builtin_convertvector(quotient, I), F);
      floor = floor > quotient ? floor - 1.0f : floor;
      const F code = uniform(random, i) < quotient - floor ? floor + 1.0f : floor;
      return cast<U>(__builtin_convertvector(limited(code), I)) & mask;
    }
    // Adding 1.5 * 2**23 rounds to an integer, ties to even, and leaves the integer in the lowest bits.
    return cast<U>(limited(quotient) + 0x1.8p23f) & mask;
  }

 private:
  inline F limited(F value) const { return -min(-min(value, splat(limit)), splat(limit)); }
};

constexpr Table midpoints() {
  Table result{};
  for (std::size_t i = 0; i + 1 < result.size(); ++i) result[i] = (kNormalFloat[i] + kNormalFloat[i + 1]) * 0.5f;
  return result;
}

constexpr Table inverse_gaps() {
  Table result{};
  for (std::size_t i = 0; i + 1 < result.size(); ++i) result[i] = 1.0f / (kNormalFloat[i + 1] - kNormalFloat[i]);
  return result;
}

template <bool Random>
struct RoundNormalFloat {
  alignas(64) static constexpr Table kMidpoints = midpoints();
  alignas(64) static constexpr Table kInverseGaps = inverse_gaps();
  RandomBits random;

  RoundNormalFloat(const Element&, const Rounding& rounding, std::uint64_t at) : random(rounding.seed, at) {}

  inline U operator()(F quotient, std::size_t i) const {
    I count{};
    if constexpr (Random) {
      for (std::size_t entry = 1; entry < 15; ++entry) count -= splat(kNormalFloat[entry]) <= quotient;
      const U code = cast<U>(count) << 28;
      const F share = (quotient - look_up(kNormalFloat, code)) * look_up(kInverseGaps, code);
      return cast<U>(count - (uniform(random, i) < share));
    }
    for (std::size_t entry = 0; entry < 15; ++entry) count -= splat(kMidpoints[entry]) < quotient;
    return cast<U>(count);
  }
};

template <bool Random>
struct RoundFloat {
  std::conditional_t<Random, Stochastic<false>, NearestBySum> round;

  RoundFloat(const Element& element, const Rounding& rounding, std::uint64_t at)
      : round(element.format, rounding, at) {}

  inline U operator()(F quotient, std::size_t i) const { return round(quotient, i).code; }
};

// Chooses and stores the scale for a block's largest magnitude, and returns the divisor for its values.
float choose_scale(std::uint32_t largest, const Element& element, bool, float* scale) {
  const bool nothing = largest < kLeast || largest > kExponent;
  float quotient = cast<float>(largest);
  if (element.kind == ElementKind::kInteger) {
    quotient /= static_cast<float>((1u << (element.bits - 1)) - 1);
    quotient = cast<float>(cast<std::uint32_t>(quotient) & ~0xFFu);
  }
  *scale = nothing ? 0.0f : quotient;
  return nothing ? INFINITY : quotient;
}

float choose_scale(std::uint32_t largest, const Element& element, bool stochastic, std::uint8_t* scale) {
  const bool nothing = largest < kLeast || largest > kExponent;
  int exponent = 127 - element.format.fitting_exponent(largest, stochastic);
  // The specification lets the largest value saturate if it is rounded to nearest.
  if (element.kind == ElementKind::kOcp && !stochastic)
    exponent = static_cast<int>(largest >> 23) - element.format.top_exponent();
  const int most = 254 - element.format.top_exponent();  // above it the largest code would overflow float32
  exponent = nothing ? 127 : exponent < 1 ? 1 : exponent > most ? most : exponent;
  *scale = static_cast<std::uint8_t>(exponent);
  return nothing ? INFINITY : cast<float>(static_cast<std::uint32_t>(exponent) << 23);
}

template <class Round, class Scale, class Fill>
void encode_rows(std::size_t n, const Element& element, const Rounding& rounding, const BlockRoom& room, Found& found,
                 Fill fill) {
  U all{};
  Scale* scales = static_cast<Scale*>(room.scales);
  for_each_block(n, [&](std::size_t block, std::size_t at, std::size_t count) {
    alignas(64) Values padding;
    alignas(64) Codes codes;
    const float* values = fill(block, at, count, padding);
    const Round round(element, rounding, rounding.start + at);
    for (std::size_t begin = 0; begin < count; begin += room.block) {
      U largest{};
      for (std::size_t i = begin; i < begin + room.block; i += kWidth)
        largest = max(largest, load<U>(values + i) & ~kSign);
      all = max(all, largest);
      const float divisor =
          choose_scale(largest_lane(largest), element, rounding.stochastic, scales + (at + begin) / room.block);
      const float inverse = 1.0f / divisor;
      for (std::size_t i = begin; i < begin + room.block; i += kWidth) {
        const F value = load<F>(values + i);
        if constexpr (sizeof(Scale) == 1) {  // a power of two, whose inverse is exact
          store(codes.data() + i, round(value * inverse, i));
        } else {
          store(codes.data() + i, round(value / splat(divisor), i));
        }
      }
    }
    for (std::size_t i = count; i < kBlock; ++i) codes[i] = 0;
    pack(codes, element.bits, count, room.words + block * element.bits * kLanes);
  });
  const std::uint32_t largest = largest_lane(all);
  found.largest = largest < kOneExponent ? 0 : largest;
}

template <class Fill>
void block_encode_with(std::size_t n, const Element& element, const Rounding& rounding, const BlockRoom& room,
                       Found& found, Fill fill) {
  const auto run = [&]<template <bool> class Round, class Scale>() {
    if (rounding.stochastic) {
      encode_rows<Round<true>, Scale>(n, element, rounding, room, found, fill);
    } else {
      encode_rows<Round<false>, Scale>(n, element, rounding, room, found, fill);
    }
  };
  if (element.kind == ElementKind::kInteger) return run.template operator()<RoundInteger, float>();
  if (element.kind == ElementKind::kNormalFloat) return run.template operator()<RoundNormalFloat, float>();
  return run.template operator()<RoundFloat, std::uint8_t>();
}

void block_encode(const float* values, std::size_t n, const Element& element, const Rounding& rounding,
                  const BlockRoom& room, Found& found) {
  block_encode_with(n, element, rounding, room, found,
                    [&](std::size_t, std::size_t at, std::size_t count, Values& padding) -> const float* {
                      return padded(values + at, count, padding);
                    });
}

void block_update(const BlockPacked& packed, const Dense& gradient, float alpha, std::size_t n, const Element& element,
                  const Rounding& rounding, const BlockRoom& room, Found& found) {
  found.changed = false;
  with_decoder(packed, element, [&](auto decode) {
    block_encode_with(n, element, rounding, room, found,
                      [&](std::size_t block, std::size_t at, std::size_t count, Values& values) -> const float* {
                        decode(block, count, values.data());
                        found.changed |= add_gradient(values, gradient, at, alpha, count);
                        return values.data();
                      });
  });
}

}  // namespace
}  // namespace fedomc::FEDOMC_LEVEL
