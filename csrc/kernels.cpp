// The kernels, compiled once for each instruction set into the namespace FEDOMC_LEVEL.
//
// [Note: vectors] A vector holds as many neighbouring lanes of a row as a register does; all lanes shift alike, so
// nothing is ever moved between lanes. The vector types are those of GCC and Clang: the same source gives SSE2, AVX2,
// AVX-512 and NEON. A block's codes stay in the first-level cache between the steps. Only packing depends on the number
// of bits at compile time.
//
// [Note: no subnormal arithmetic] It traps to microcode on some processors and depends on the thread's mode on others.
// Formats of up to seven exponent bits are encoded under flush-to-zero (module.cpp sets it): values are scaled to the
// format first, by a power of two that is bounded so that whatever is subnormal in float32 is far below half a step of
// the format (see methods/packed.py), and counts as zero. Decoding gives normal values or zero. Eight exponent bits are
// those of float32, need no scaling, and run in IEEE mode, where integers do all of the rounding.

#include "kernels.hpp"

#include <array>
#include <cmath>
#include <cstring>
#include <utility>

#include "vectors.hpp"

namespace fedomc::FEDOMC_LEVEL {
namespace {

using Codes = std::array<std::uint32_t, kBlock>;
using Values = std::array<float, kBlock>;

// ---- packing ------------------------------------------------------------------------------------------------------

// Calls sink(i, codes) for each vector of codes of a block, i the index of its first value. The codes lie in the upper
// bits; the lower ones hold what happens to be there.
template <unsigned W, class Sink>
inline void for_each_code(const std::uint32_t* words, Sink sink) {
  for (std::size_t lane = 0; lane < kLanes; lane += kWidth) {
    [&]<unsigned... Row>(std::integer_sequence<unsigned, Row...>) {
      (
          [&] {
            constexpr unsigned position = Row * W, word = position / 32, end = position % 32 + W;
            U code = load<U>(words + kLanes * word + lane);
            if constexpr (end < 32) code <<= 32 - end;
            if constexpr (end > 32)
              code = code >> (end - 32) | load<U>(words + kLanes * (word + 1) + lane) << (64 - end);
            sink(kLanes * Row + lane, code);
          }(),
          ...);
    }(std::make_integer_sequence<unsigned, kRows>{});
  }
}

template <unsigned W>
void pack_block(const std::uint32_t* codes, std::uint32_t* words) {
  for (std::size_t lane = 0; lane < kLanes; lane += kWidth) {
    U word{};
    [&]<unsigned... Row>(std::integer_sequence<unsigned, Row...>) {
      (
          [&] {
            constexpr unsigned position = Row * W, index = position / 32, begin = position % 32;
            const U code = load<U>(codes + kLanes * Row + lane);
            word = begin == 0 ? code : word | code << begin;
            if constexpr (begin + W >= 32) {
              store(words + kLanes * index + lane, word);
              if constexpr (begin + W > 32) word = code >> (32 - begin);
            }
          }(),
          ...);
    }(std::make_integer_sequence<unsigned, kRows>{});
  }
}

// ---- codes to values ----------------------------------------------------------------------------------------------

// Turns codes, in the upper bits, into scale * value + offset.
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
        offset(offset_ == 0.0f ? -0.0f : offset_) {}  // adding -0 keeps both zeros

  explicit Represent(const Packed& packed)
      : Represent(packed.format, packed.format.bias(), packed.scale, packed.offset) {}

  template <bool Wide>
  inline F magnitude(U code) const {
    // Eight exponent bits are those of float32; the top exponent is unused.
    if constexpr (Wide) return cast<F>(min(code & mask, splat(limit)));
    // Without an exponent the significand has no leading one: take it as in the lowest binade, and the one away.
    const U field = (code >> down) & mask;
    const I subnormal = below(field, splat(kOneExponent));
    const U bits = field + rebias;
    const F value = cast<F>(subnormal ? bits + kOneExponent : bits);
    return subnormal ? value - least : value;
  }

  template <bool Wide>
  inline F signed_value(U code) const {
    return cast<F>(cast<U>(magnitude<Wide>(code)) | (code & kSign));
  }

  template <bool Wide>
  inline F operator()(U code) const {
    return signed_value<Wide>(code) * scale + offset;
  }
};

template <unsigned W, bool Wide>
void decode_whole(const std::uint32_t* words, const Represent& shared, float* out) {
  const Represent represent = shared;  // a copy whose constants the stores below cannot change
  for_each_code<W>(words, [&](std::size_t i, U code) { store(out + i, represent.operator()<Wide>(code)); });
}

using Pack = void (*)(const std::uint32_t*, std::uint32_t*);
using Decode = void (*)(const std::uint32_t*, const Represent&, float*);

template <unsigned... Index>
constexpr std::array<Pack, 31> packers(std::integer_sequence<unsigned, Index...>) {
  return {&pack_block<Index + 2>...};
}

template <unsigned First, bool Wide, unsigned... Index>
constexpr std::array<Decode, sizeof...(Index)> decoders(std::integer_sequence<unsigned, Index...>) {
  return {&decode_whole<Index + First, Wide>...};
}

// By the number of bits: from 2 on, with eight exponent bits from 9 on.
constexpr auto kPack = packers(std::make_integer_sequence<unsigned, 31>{});
constexpr auto kDecode = decoders<2, false>(std::make_integer_sequence<unsigned, 30>{});
constexpr auto kDecodeWide = decoders<9, true>(std::make_integer_sequence<unsigned, 24>{});

// The last block holds only the words that its rows need: go over a whole one.
struct WholeBlock {
  std::array<std::uint32_t, kBlock> words;
  const std::uint32_t* data;

  WholeBlock(const std::uint32_t* from, unsigned bits, std::size_t n) : data(from) {
    if (n == kBlock) return;
    words.fill(0);
    std::memcpy(words.data(), from, words_of(n, bits) * sizeof(std::uint32_t));
    data = words.data();
  }
};

void pack(const Codes& codes, unsigned bits, std::size_t n, std::uint32_t* words) {
  if (n == kBlock) {
    kPack[bits - 2](codes.data(), words);
    return;
  }
  std::array<std::uint32_t, kBlock> whole;
  kPack[bits - 2](codes.data(), whole.data());
  std::memcpy(words, whole.data(), words_of(n, bits) * sizeof(std::uint32_t));
}

// Decodes a block of n values into room for a whole one.
void decode_block(const Packed& packed, const Represent& represent, std::size_t block, std::size_t n, float* out) {
  const unsigned bits = packed.format.bits();
  const WholeBlock whole(packed.words + block * bits * kLanes, bits, n);
  (packed.format.exponent_bits == 8 ? kDecodeWide[bits - 9] : kDecode[bits - 2])(whole.data, represent, out);
}

// ---- values to codes ----------------------------------------------------------------------------------------------

// A code, and its value.
struct Rounded {
  U code;
  F value;
};

// Rounds to nearest, ties to the even code, where the code fits into a significand: adding 2**23 steps of a value's
// binade, and the code of the binade's beginning on top, leaves the code itself in the lowest bits of the sum.
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

// The same for all formats.
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

// MurmurHash3's finaliser (Appleby, public domain).
template <class V>
inline V mix(V x) {
  x ^= x >> 16;
  x *= 0x85EBCA6Bu;
  x ^= x >> 13;
  x *= 0xC2B2AE35u;
  return x ^ (x >> 16);
}

// Rounds up with the probability of the part that is dropped, by 30 random bits.
template <bool Wide>
struct Stochastic {
  static constexpr bool kWide = Wide;
  Count sign_bit;
  int drop, move;
  std::uint32_t limit, low, high, counter;
  U lanes;
  Represent represent;

  Stochastic(Format format, const Rounding& rounding, std::uint64_t at)
      : sign_bit(count(static_cast<int>(format.bits()) - 1)),
        drop(static_cast<int>(23 - format.mantissa_bits)),
        move(format.working_bias() - 127),
        limit(format.max_code()),
        low(mix(static_cast<std::uint32_t>(rounding.seed))),
        high(mix(static_cast<std::uint32_t>(rounding.seed >> 32) ^ 0x9E3779B9u ^ static_cast<std::uint32_t>(at >> 32))),
        counter(static_cast<std::uint32_t>(at)),
        represent(format, format.working_bias(), 1.0f, 0.0f) {
    for (std::size_t lane = 0; lane < kWidth; ++lane) lanes[lane] = static_cast<std::uint32_t>(lane);
  }

  inline Rounded operator()(F value, std::size_t i) const {
    const U bits = cast<U>(value), magnitude = bits & ~kSign;
    const U field = max(magnitude >> 23, splat(1u));
    const U significand = magnitude - ((field - 1) << 23);
    const I target = cast<I>(field) + move;
    const I normal = target > 1 ? target : I{} + 1;
    const U shift = cast<U>(normal - target) + static_cast<std::uint32_t>(drop);
    U integer = significand + (cast<U>(normal - 1) << 23);
    integer >>= min(max(shift, splat(30u)) - 30u, splat(31u));
    const U dropped = min(shift, splat(30u));
    const U noise = mix(mix((lanes + (counter + static_cast<std::uint32_t>(i))) ^ low) + high) & 0x3FFFFFFFu;
    U code = (integer + (noise >> (30u - dropped))) >> dropped;
    code = min(code, splat(limit)) | (bits >> 31) << sign_bit;
    return {code, represent.signed_value<Wide>(code << represent.align)};
  }
};

struct Halves {
  H low, high;
};

inline D widened(const D& v, std::size_t) { return v; }
inline D widened(const F& v, std::size_t half) {
  const Halves halves = cast<Halves>(v);
  return widen(half == 0 ? halves.low : halves.high);
}

using Lanes = std::array<std::array<double, kLanes>, kSums>;

// Sums of D = V - R and R, both in the format's units. The order is that of codec/reference.py for every instruction
// set: in each lane the rows of a block, in float32, then, in float64, the blocks of a chunk, then the lanes by halves.
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

  // Adds the lanes that a D holds: those of a half, if these are sums in float32.
  inline void add_to(Lanes& lanes, std::size_t lane, std::size_t half) const {
    const V sums[] = {d, dd, dr, rr, r};
    for (std::size_t term = 0; term < kSums; ++term) {
      double* to = &lanes[term][lane + half * kWidth / 2];
      store(to, load<D>(to) + widened(sums[term], half));
    }
  }
};

// The sums of a vector's lanes.
template <bool Wide>
struct Sums {
  SumsIn<F> sums;

  inline void add(F difference, F represented) { sums.add(difference, represented); }
  inline void add_to(Lanes& lanes, std::size_t lane) const {
    sums.add_to(lanes, lane, 0);
    sums.add_to(lanes, lane, 1);
  }
};

// With eight exponent bits squares may leave the range of float32: all in float64.
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

// Adds lanes by halves; scale is that of the values, and of the products its square.
void add_lanes(Lanes& lanes, double scale, double* sums) {
  for (std::size_t term = 0; term < kSums; ++term) {
    for (std::size_t width = kLanes / 2; width; width /= 2)
      for (std::size_t lane = 0; lane < width; ++lane) lanes[term][lane] += lanes[term][lane + width];
    sums[term] = lanes[term][0] / (term == 0 || term == kSums - 1 ? scale : scale * scale);
  }
}

// Rounds a block of values in units of 1 / scale, and sums if wanted. Columns of lanes are taken together as far as
// their sums stay in registers.
template <class Round, bool Summing>
U round_block(const float* values, float scale, const Round round, Codes& codes, Lanes& lanes) {
  constexpr std::size_t columns = Summing ? kColumns : 1, stride = Summing ? kLanes : kWidth;
  U largest{};
  for (std::size_t lane = 0; lane < stride; lane += columns * kWidth) {
    Sums<Round::kWide> sums[columns];
    for (std::size_t row = lane; row < kBlock; row += stride) {
      for (std::size_t column = 0; column < columns; ++column) {
        const std::size_t i = row + column * kWidth;
        F value = load<F>(values + i);
        largest = max(largest, cast<U>(value) & ~kSign);
        if constexpr (!Round::kWide) value *= scale;
        const Rounded rounded = round(value, i);
        store(codes.data() + i, rounded.code);
        if constexpr (Summing) sums[column].add(value - rounded.value, rounded.value);
      }
    }
    if constexpr (Summing)
      for (std::size_t column = 0; column < columns; ++column) sums[column].add_to(lanes, lane + column * kWidth);
  }
  return largest;
}

std::uint32_t largest_lane(U v) {
  std::uint32_t largest = 0;
  for (std::size_t lane = 0; lane < kWidth; ++lane) largest = largest > v[lane] ? largest : v[lane];
  return largest;
}

std::uint32_t largest_of(const float* values, std::size_t n) {
  U largest{};
  std::size_t i = 0;
  for (; i + kWidth <= n; i += kWidth) largest = max(largest, load<U>(values + i) & ~kSign);
  std::uint32_t result = largest_lane(largest);
  for (; i < n; ++i) {
    const std::uint32_t magnitude = cast<std::uint32_t>(values[i]) & ~kSign;
    result = result > magnitude ? result : magnitude;
  }
  return result;
}

// ---- chunks -------------------------------------------------------------------------------------------------------

template <class Body>
inline void for_each_block(std::size_t n, Body body) {
  for (std::size_t block = 0, at = 0; at < n; ++block, at += kBlock) body(block, at, n - at < kBlock ? n - at : kBlock);
}

// Copies a block past the caches: memory that is written whole need not be read first.
void stream(float* to, const Values& values) {
#if defined(__AVX512F__)
  for (std::size_t i = 0; i < kBlock; i += 16) _mm512_stream_ps(to + i, _mm512_loadu_ps(values.data() + i));
#elif defined(__AVX__)
  for (std::size_t i = 0; i < kBlock; i += 8) _mm256_stream_ps(to + i, _mm256_loadu_ps(values.data() + i));
#elif defined(FEDOMC_X86)
  for (std::size_t i = 0; i < kBlock; i += 4) _mm_stream_ps(to + i, _mm_loadu_ps(values.data() + i));
#else
  std::memcpy(to, values.data(), sizeof values);
#endif
}

void fence() {
#if defined(FEDOMC_X86)
  _mm_sfence();
#endif
}

void decode(const Packed& base, const Packed* update, float* out, std::size_t n, bool streaming) {
  const Represent represent(base);
  const Represent change(update ? *update : base);
  streaming = streaming && reinterpret_cast<std::uintptr_t>(out) % 64 == 0;
  for_each_block(n, [&](std::size_t block, std::size_t at, std::size_t count) {
    if (count == kBlock && !streaming && !update) {
      decode_block(base, represent, block, count, out + at);
      return;
    }
    alignas(64) Values values;
    decode_block(base, represent, block, count, values.data());
    if (update) {
      alignas(64) Values changes;
      decode_block(*update, change, block, count, changes.data());
      for (std::size_t i = 0; i < kBlock; i += kWidth)
        store(values.data() + i, load<F>(values.data() + i) + load<F>(changes.data() + i));
    }
    if (count == kBlock && streaming) {
      stream(out + at, values);
    } else {
      std::memcpy(out + at, values.data(), count * sizeof(float));
    }
  });
  if (streaming) fence();
}

// Adds weight * (values - less) to out; no pointer is null.
void add_difference(const float* values, const float* less, float weight, float* out, std::size_t n) {
  std::size_t i = 0;
  for (; i + kWidth <= n; i += kWidth)
    store(out + i, load<F>(out + i) + (load<F>(values + i) - load<F>(less + i)) * weight);
  for (; i < n; ++i) out[i] += (values[i] - less[i]) * weight;
}

void decode_add(const Packed& packed, const Packed* less, float weight, float* out, std::size_t n) {
  const Represent represent(packed);
  const Represent subtracted(less ? *less : packed);
  for_each_block(n, [&](std::size_t block, std::size_t at, std::size_t count) {
    alignas(64) Values values;
    decode_block(packed, represent, block, count, values.data());
    if (less) {
      alignas(64) Values others;
      decode_block(*less, subtracted, block, count, others.data());
      add_difference(values.data(), others.data(), weight, out + at, count);
      return;
    }
    std::size_t i = 0;
    for (; i + kWidth <= count; i += kWidth)
      store(out + at + i, load<F>(out + at + i) + load<F>(values.data() + i) * weight);
    for (; i < count; ++i) out[at + i] += values[i] * weight;
  });
}

// Rounds and packs the blocks that fill(block, at, count, whole) gives; whole is room for a block, and what fill
// returns points to the block's values, zeros behind the last.
template <class Round, class Fill>
void encode_blocks(std::size_t n, Format format, const Rounding& rounding, std::uint32_t* words, Found& found,
                   Fill fill) {
  Lanes lanes{};
  const float scale = power_of_two(rounding.exponent + format.bias() - format.working_bias());
  U largest{};
  for_each_block(n, [&](std::size_t block, std::size_t at, std::size_t count) {
    alignas(64) Values room;
    alignas(64) Codes codes;
    const float* values = fill(block, at, count, room);
    const Round round(format, rounding, rounding.start + at);
    const U some = found.sums ? round_block<Round, true>(values, scale, round, codes, lanes)
                              : round_block<Round, false>(values, scale, round, codes, lanes);
    largest = max(largest, some);
    for (std::size_t i = count; i < kBlock; ++i) codes[i] = 0;
    pack(codes, format.bits(), count, words + block * format.bits() * kLanes);
  });
  found.largest = largest_lane(largest);
  if (found.sums) add_lanes(lanes, scale, found.sums);
}

template <class Fill>
void encode_with(std::size_t n, Format format, const Rounding& rounding, std::uint32_t* words, Found& found,
                 Fill fill) {
  const bool wide = format.exponent_bits == 8;
  if (rounding.stochastic) {
    if (wide) {
      encode_blocks<Stochastic<true>>(n, format, rounding, words, found, fill);
    } else {
      encode_blocks<Stochastic<false>>(n, format, rounding, words, found, fill);
    }
  } else if (wide) {
    encode_blocks<Nearest<true>>(n, format, rounding, words, found, fill);
  } else if (format.bits() <= 23) {
    encode_blocks<NearestBySum>(n, format, rounding, words, found, fill);
  } else {
    encode_blocks<Nearest<false>>(n, format, rounding, words, found, fill);
  }
}

void encode(const float* values, std::size_t n, Format format, const Rounding& rounding, std::uint32_t* words,
            Found& found) {
  encode_with(n, format, rounding, words, found,
              [&](std::size_t, std::size_t at, std::size_t count, Values& room) -> const float* {
                if (count == kBlock) return values + at;
                room.fill(0.0f);
                std::memcpy(room.data(), values + at, count * sizeof(float));
                return room.data();
              });
}

void update(const Packed& packed, const float* gradient, float alpha, std::size_t n, const Rounding& rounding,
            std::uint32_t* words, Found& found) {
  const Represent represent(packed);
  encode_with(n, packed.format, rounding, words, found,
              [&](std::size_t block, std::size_t at, std::size_t count, Values& room) -> const float* {
                decode_block(packed, represent, block, count, room.data());
                std::size_t i = 0;
                for (; i + kWidth <= count; i += kWidth)
                  store(room.data() + i, fused(splat(alpha), load<F>(gradient + at + i), load<F>(room.data() + i)));
                for (; i < count; ++i) room[i] = std::fma(alpha, gradient[at + i], room[i]);
                for (; i < kBlock; ++i) room[i] = 0.0f;
                return room.data();
              });
}

#define FEDOMC_TEXT(x) #x
#define FEDOMC_NAME(x) FEDOMC_TEXT(x)

}  // namespace

const Kernels kernels = {FEDOMC_NAME(FEDOMC_LEVEL), decode, decode_add, add_difference, encode, update, largest_of};

}  // namespace fedomc::FEDOMC_LEVEL
