// Rounding of values to float codes, to nearest or stochastically.
#pragma once

#include "float_values.hpp"
#include "random.hpp"

namespace fedomc::FEDOMC_LEVEL {
namespace {

// A code and its value.
struct Rounded {
  U code;
  F value;
};

// Rounds to nearest, ties to the even code, for codes that fit into a float32 significand. Adding 2**23 steps of the
// value's binade, plus the code of the binade's lower end, leaves the code itself in the lowest bits of the sum.
struct NearestBySum {
  static constexpr bool kWide = false;
  Count drop, sign;
  std::uint32_t first_binade, begin, mask;
  float most;

  NearestBySum(Format format, const Rounding&, std::uint64_t)
      : drop(count(static_cast<int>(23 - format.mantissa_bits))),
        sign(count(static_cast<int>(32 - format.bits()))),
        first_binade(static_cast<std::uint32_t>(128 - format.working_bias()) << 23),
        begin(((23 - format.mantissa_bits) << 23) - (first_binade >> (23 - format.mantissa_bits))),
        mask((1u << (format.bits() - 1)) - 1),
        most(cast<float>((format.max_code() << (23 - format.mantissa_bits)) + first_binade - kOneExponent)) {}

  inline Rounded operator()(F value, std::size_t) const {
    const U bits = cast<U>(value);
    const U magnitude = cast<U>(min(cast<F>(bits & ~kSign), splat(most)));
    const U binade = max(magnitude & kExponent, splat(first_binade));
    const F steps = cast<F>(binade + (binade >> drop) + begin);
    const F sum = cast<F>(magnitude) + steps;
    return {(cast<U>(sum) & mask) | ((bits >> sign) & ~mask), cast<F>(cast<U>(sum - steps) | (bits & kSign))};
  }
};

// Rounds to nearest, ties to the even code, for all formats.
template <bool Wide>
struct Nearest {
  static constexpr bool kWide = Wide;
  Count drop, sign_bit;
  std::uint32_t half, lsb, limit, rebias, first_normal;
  float magic;
  Represent represent;

  Nearest(Format format, const Rounding&, std::uint64_t)
      : drop(count(static_cast<int>(23 - format.mantissa_bits))),
        sign_bit(count(static_cast<int>(format.bits()) - 1)),
        half(format.mantissa_bits < 23 ? (1u << (22 - format.mantissa_bits)) - 1 : 0),
        lsb(format.mantissa_bits < 23 ? 1 : 0),
        limit(format.max_code()),
        rebias(static_cast<std::uint32_t>(127 - format.working_bias()) << format.mantissa_bits),
        first_normal(static_cast<std::uint32_t>(128 - format.working_bias()) << 23),
        magic(Wide ? 0.0f : power_of_two(24 - format.working_bias() - static_cast<int>(format.mantissa_bits))),
        represent(format, format.working_bias(), 1.0f, 0.0f) {}

  inline Rounded operator()(F value, std::size_t) const {
    const U bits = cast<U>(value), magnitude = bits & ~kSign;
    U code = ((magnitude + half + ((magnitude >> drop) & lsb)) >> drop) - rebias;
    if constexpr (!Wide) {
      const U subnormal = cast<U>(cast<F>(magnitude) + magic) - cast<std::uint32_t>(magic);
      code = below(magnitude, splat(first_normal)) ? subnormal : code;
    }
    code = min(code, splat(limit)) | (bits >> 31) << sign_bit;
    return {code, represent.signed_value<Wide>(code << represent.align)};
  }
};

// Rounds up with a probability equal to the dropped fraction, using 30 random bits.
//
// A value at or above the lowest binade drops the same number of bits in every binade. A value below it is a subnormal
// of the format: its leading one becomes explicit, and each binade below the lowest drops one bit more. Values that
// drop 54 bits or more are zero; with up to seven exponent bits, zero itself is among them.
template <bool Wide>
struct Stochastic {
  static constexpr bool kWide = Wide;
  Count sign;
  int drop;
  std::uint32_t first_binade, begin, limit, mask;
  RandomBits random;
  Represent represent;

  Stochastic(Format format, const Rounding& rounding, std::uint64_t at)
      : sign(count(static_cast<int>(32 - format.bits()))),
        drop(static_cast<int>(23 - format.mantissa_bits)),
        first_binade(static_cast<std::uint32_t>(128 - format.working_bias()) << 23),
        begin(first_binade + ((23 - format.mantissa_bits) << 23)),
        limit(format.max_code()),
        mask((1u << (format.bits() - 1)) - 1),
        random(rounding.seed, at),
        represent(format, format.working_bias(), 1.0f, 0.0f) {}

  inline Rounded operator()(F value, std::size_t i) const {
    const U bits = cast<U>(value), magnitude = bits & ~kSign;
    const U noise = random(i) >> 2;
    U code;
    if constexpr (Wide) {  // a binade's lower end is a multiple of 2**23 in the code, too
      code = (magnitude + (noise >> (30 - drop))) >> drop;
    } else {
      const U binade = min(magnitude & kExponent, splat(first_binade));
      const U shift = min((begin - binade) >> 23, splat(61u)), dropped = min(shift, splat(30u));
      const U integer = (magnitude - binade + kOneExponent) >> (shift - dropped);
      code = (integer + (noise >> (30u - dropped))) >> dropped;
    }
    code = min(code, splat(limit)) | ((bits >> sign) & ~mask);
    return {code, represent.signed_value<Wide>(code << represent.align)};
  }
};

}  // namespace
}  // namespace fedomc::FEDOMC_LEVEL
