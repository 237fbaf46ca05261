// Decoding of float codes to values.
#pragma once

#include <array>

#include "packing.hpp"

namespace fedomc::FEDOMC_LEVEL {
namespace {

// Converts codes, held in the upper bits, to scale * value + offset.
struct Represent {
  Count down, align;
  std::uint32_t mask, rebias, limit;
  float least, scale, offset;

  Represent(Format format, int bias, float scale_, float offset_)
      : down(count(static_cast<int>(8 - format.exponent_bits))),
        align(count(static_cast<int>(32 - format.bits()))),
        mask(((1u << (format.bits() - 1)) - 1) << (23 - format.mantissa_bits)),
        rebias(static_cast<std::uint32_t>(127 - bias) << 23),
        limit(format.max_code() << (23 - format.mantissa_bits)),
        least(format.exponent_bits == 8 ? 0.0f : power_of_two(1 - bias)),
        scale(scale_),
        offset(offset_ == 0.0f ? -0.0f : offset_) {}  // adding -0 preserves the sign of zeros

  explicit Represent(const Packed& packed)
      : Represent(packed.format, packed.format.bias(), packed.scale, packed.offset) {}

  // Limited: clamps codes above the largest one, which occur only in foreign data.
  template <bool Wide, bool Limited = Wide>
  inline F magnitude(U code) const {
    // With eight exponent bits the exponent is that of float32; its top value is unused.
    if constexpr (Wide) return cast<F>(min(code & mask, splat(limit)));
    // A subnormal has no leading one: decode it as if in the lowest binade, then subtract the implied one.
    U field = (code >> down) & mask;
    if constexpr (Limited) field = min(field, splat(limit));
    const I subnormal = below(field, splat(kOneExponent));
    const U bits = field + rebias;
    const F value = cast<F>(subnormal ? bits + kOneExponent : bits);
    return subnormal ? value - least : value;
  }

  template <bool Wide, bool Limited = Wide>
  inline F signed_value(U code) const {
    return cast<F>(cast<U>(magnitude<Wide, Limited>(code)) | (code & kSign));
  }

  template <bool Wide>
  inline F operator()(U code) const {
    return signed_value<Wide>(code) * scale + offset;
  }
};

template <unsigned W, bool Wide>
void decode_whole(const std::uint32_t* words, const Represent& shared, float* out) {
  const Represent represent = shared;  // a copy: the stores below cannot alias its constants
  for_each_code<W>(words, [&](std::size_t i, U code) { store(out + i, represent.operator()<Wide>(code)); });
}

using Decode = void (*)(const std::uint32_t*, const Represent&, float*);

template <unsigned First, bool Wide, unsigned... Index>
constexpr std::array<Decode, sizeof...(Index)> decoders(std::integer_sequence<unsigned, Index...>) {
  return {&decode_whole<Index + First, Wide>...};
}

// Indexed by the number of bits, starting at 2, or at 9 for formats with eight exponent bits.
constexpr auto kDecode = decoders<2, false>(std::make_integer_sequence<unsigned, 30>{});
constexpr auto kDecodeWide = decoders<9, true>(std::make_integer_sequence<unsigned, 24>{});

// Decodes a block of n values; `out` must have room for a whole block.
void decode_block(const Packed& packed, const Represent& represent, std::size_t block, std::size_t n, float* out) {
  const unsigned bits = packed.format.bits();
  const WholeBlock whole(packed.words + block * bits * kLanes, bits, n);
  (packed.format.exponent_bits == 8 ? kDecodeWide[bits - 9] : kDecode[bits - 2])(whole.data, represent, out);
}

}  // namespace
}  // namespace fedomc::FEDOMC_LEVEL
