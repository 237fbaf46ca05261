// The kernels, compiled once for each instruction set into the namespace FEDOMC_LEVEL.
//
// [Note: vectors] A vector holds as many neighbouring lanes of a row as a register does; all lanes shift alike, so
// nothing is ever moved between lanes. The vector types are those of GCC and Clang: the same source gives SSE2, AVX2,
// AVX-512 and NEON. A block's codes stay in the first-level cache between the steps. Only packing depends on the number
// of bits at compile time.
//
// [Note: no subnormal arithmetic] Scaling by 2**k adds to the exponent field. Values below the format's smallest normal
// value are rounded by adding 2**23 of its smallest step, whose sum has the step as its last bit; anything that is
// subnormal in float32 is far below half a step there (the exponent is bounded, see transform.py) and counts as zero.

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

// Calls sink(i, codes) for each vector of codes of a block, i the index of its first value.
template <unsigned W, class Sink>
inline void for_each_code(const std::uint32_t* words, Sink sink) {
  constexpr std::uint32_t mask = W == 32 ? ~0u : (1u << W) - 1;
  for (std::size_t lane = 0; lane < kLanes; lane += kWidth) {
    [&]<unsigned... Row>(std::integer_sequence<unsigned, Row...>) {
      (
          [&] {
            constexpr unsigned position = Row * W, word = position / 32, begin = position % 32;
            U code = load<U>(words + kLanes * word + lane) >> begin;
            if constexpr (begin + W > 32) code |= load<U>(words + kLanes * (word + 1) + lane) << (32 - begin);
            if constexpr (begin + W != 32) code &= mask;
            sink(kLanes * Row + lane, code);
          }(),
          ...);
    }(std::make_integer_sequence<unsigned, kRows>{});
  }
}

template <unsigned W>
void unpack_block(const std::uint32_t* words, std::uint32_t* codes) {
  for_each_code<W>(words, [&](std::size_t i, U code) { store(codes + i, code); });
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

// Turns codes into scale * value + offset.
struct Represent {
  Count up, sign_bit;
  std::uint32_t mask, first_normal, rebias, limit;
  float step, scale, offset;

  Represent(Format format, float scale_, float offset_)
      : up(count(static_cast<int>(23 - format.mantissa_bits))),
        sign_bit(count(static_cast<int>(format.bits()) - 1)),
        mask((1u << (format.bits() - 1)) - 1),
        first_normal(1u << format.mantissa_bits),
        rebias(static_cast<std::uint32_t>(127 - format.bias()) << 23),
        limit(format.max_code()),
        step(format.exponent_bits == 8 ? 0.0f
                                       : power_of_two(1 - format.bias() - static_cast<int>(format.mantissa_bits))),
        scale(scale_),
        offset(offset_ == 0.0f ? -0.0f : offset_) {}  // adding -0 keeps both zeros

  inline F operator()(U code) const {
    const U magnitude = code & mask;
    const F subnormal = __builtin_convertvector(cast<I>(magnitude), F) * step;
    const U bits = below(magnitude, splat(first_normal)) ? cast<U>(subnormal) : (magnitude << up) + rebias;
    return cast<F>(bits | (code >> sign_bit) << 31) * scale + offset;
  }

  // The same for eight exponent bits: the bits are those of float32, and the top exponent is unused.
  inline F wide(U code) const {
    const U magnitude = min(code & mask, splat(limit));
    return cast<F>(magnitude << up | (code >> sign_bit) << 31) * scale + offset;
  }
};

template <unsigned W>
void decode_whole(const std::uint32_t* words, const Represent& shared, float* out) {
  const Represent represent = shared;  // a copy whose constants the stores below cannot change
  for_each_code<W>(words, [&](std::size_t i, U code) { store(out + i, represent(code)); });
}

using Unpack = void (*)(const std::uint32_t*, std::uint32_t*);
using Pack = void (*)(const std::uint32_t*, std::uint32_t*);
using Decode = void (*)(const std::uint32_t*, const Represent&, float*);

struct Width {
  Unpack unpack;
  Pack pack;
  Decode decode;
};

template <unsigned... Index>
constexpr std::array<Width, 31> widths(std::integer_sequence<unsigned, Index...>) {
  return {Width{&unpack_block<Index + 2>, &pack_block<Index + 2>, &decode_whole<Index + 2>}...};
}

constexpr auto kWidths = widths(std::make_integer_sequence<unsigned, 31>{});

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
    kWidths[bits - 2].pack(codes.data(), words);
    return;
  }
  std::array<std::uint32_t, kBlock> whole;
  kWidths[bits - 2].pack(codes.data(), whole.data());
  std::memcpy(words, whole.data(), words_of(n, bits) * sizeof(std::uint32_t));
}

// Decodes a block of n values into room for a whole one.
void decode_block(const Packed& packed, const Represent& represent, std::size_t block, std::size_t n, float* out) {
  const unsigned bits = packed.format.bits();
  const WholeBlock whole(packed.words + block * bits * kLanes, bits, n);
  if (packed.format.exponent_bits < 8) {
    kWidths[bits - 2].decode(whole.data, represent, out);
    return;
  }
  Codes codes;
  kWidths[bits - 2].unpack(whole.data, codes.data());
  for (std::size_t i = 0; i < kBlock; i += kWidth) store(out + i, represent.wide(load<U>(codes.data() + i)));
}

// ---- values to codes ----------------------------------------------------------------------------------------------

// Rounds to nearest, ties to the even code.
struct Nearest {
  Count drop, sign_bit;
  std::uint32_t half, lsb, limit, rebias, scale, least, most, first_normal;
  float magic;

  Nearest(Format format, const Rounding& rounding, std::uint64_t)
      : drop(count(static_cast<int>(23 - format.mantissa_bits))),
        sign_bit(count(static_cast<int>(format.bits()) - 1)),
        half(format.mantissa_bits < 23 ? (1u << (22 - format.mantissa_bits)) - 1 : 0),
        lsb(format.mantissa_bits < 23 ? 1 : 0),
        limit(format.max_code()),
        rebias(static_cast<std::uint32_t>(127 - format.bias()) << format.mantissa_bits),
        scale(static_cast<std::uint32_t>(rounding.exponent) << 23),
        least(static_cast<std::uint32_t>(rounding.exponent < 0 ? 1 - rounding.exponent : 1) << 23),
        most(rounding.exponent > 0 ? (static_cast<std::uint32_t>(255 - rounding.exponent) << 23) - 1 : 0x7FFFFFFFu),
        first_normal(static_cast<std::uint32_t>(128 - format.bias()) << 23),
        magic(format.exponent_bits == 8 ? 0.0f
                                        : power_of_two(24 - format.bias() - static_cast<int>(format.mantissa_bits))) {}

  inline U operator()(U bits, std::size_t) const {
    U magnitude = bits & 0x7FFFFFFFu;
    magnitude = below(magnitude, splat(least)) ? U{} : min(magnitude, splat(most)) + scale;
    const U normal = ((magnitude + half + ((magnitude >> drop) & lsb)) >> drop) - rebias;
    const U subnormal = cast<U>(cast<F>(magnitude) + magic) - cast<std::uint32_t>(magic);
    return min(below(magnitude, splat(first_normal)) ? subnormal : normal, splat(limit)) | (bits >> 31) << sign_bit;
  }
};

// The same for eight exponent bits, which take no scaling.
struct NearestWide {
  Nearest nearest;

  NearestWide(Format format, const Rounding& rounding, std::uint64_t at) : nearest(format, rounding, at) {}

  inline U operator()(U bits, std::size_t) const {
    const U magnitude = bits & 0x7FFFFFFFu;
    const U code = (magnitude + nearest.half + ((magnitude >> nearest.drop) & nearest.lsb)) >> nearest.drop;
    return min(code, splat(nearest.limit)) | (bits >> 31) << nearest.sign_bit;
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
struct Stochastic {
  Count sign_bit;
  int drop, move;
  std::uint32_t limit, low, high, counter;
  U lanes;

  Stochastic(Format format, const Rounding& rounding, std::uint64_t at)
      : sign_bit(count(static_cast<int>(format.bits()) - 1)),
        drop(static_cast<int>(23 - format.mantissa_bits)),
        move(rounding.exponent + format.bias() - 127),
        limit(format.max_code()),
        low(mix(static_cast<std::uint32_t>(rounding.seed))),
        high(mix(static_cast<std::uint32_t>(rounding.seed >> 32) ^ 0x9E3779B9u ^ static_cast<std::uint32_t>(at >> 32))),
        counter(static_cast<std::uint32_t>(at)) {
    for (std::size_t lane = 0; lane < kWidth; ++lane) lanes[lane] = static_cast<std::uint32_t>(lane);
  }

  inline U operator()(U bits, std::size_t i) const {
    const U magnitude = bits & 0x7FFFFFFFu;
    const U field = max(magnitude >> 23, splat(1u));
    const U significand = magnitude - ((field - 1) << 23);
    const I target = cast<I>(field) + move;
    const I normal = target > 1 ? target : I{} + 1;
    const U shift = cast<U>(normal - target) + static_cast<std::uint32_t>(drop);
    U integer = significand + (cast<U>(normal - 1) << 23);
    integer >>= min(max(shift, splat(30u)) - 30u, splat(31u));
    const U dropped = min(shift, splat(30u));
    const U noise = mix(mix((lanes + (counter + static_cast<std::uint32_t>(i))) ^ low) + high) & 0x3FFFFFFFu;
    const U code = (integer + (noise >> (30u - dropped))) >> dropped;
    return min(code, splat(limit)) | (bits >> 31) << sign_bit;
  }
};

// Sums of D = V - R and R in half the lanes of a vector. The order is that of codec/reference.py for every instruction
// set: in each lane the rows of a block, then the blocks of a chunk, then the lanes by halves.
struct HalfSums {
  D d{}, dd{}, dr{}, rr{}, r{};

  inline void add(H difference, H represented) {
    const D x = widen(difference), y = widen(represented);
    d += x;
    dd = add_product(dd, x, x);
    dr = add_product(dr, x, y);
    rr = add_product(rr, y, y);
    r += y;
  }

  template <class LanesOf>
  inline void add_to(LanesOf& lanes, std::size_t lane) const {
    const D sums[] = {d, dd, dr, rr, r};
    for (std::size_t term = 0; term < kSums; ++term)
      store(&lanes[term][lane], load<D>(&lanes[term][lane]) + sums[term]);
  }
};

struct Halves {
  H low, high;
};

using Lanes = std::array<std::array<double, kLanes>, kSums>;

// Adds lanes by halves.
void add_lanes(Lanes& lanes, double* sums) {
  for (std::size_t term = 0; term < kSums; ++term) {
    for (std::size_t width = kLanes / 2; width; width /= 2)
      for (std::size_t lane = 0; lane < width; ++lane) lanes[term][lane] += lanes[term][lane + width];
    sums[term] = lanes[term][0];
  }
}

template <class Round, bool Wide>
U round_block(const float* values, Round round, Codes& codes) {
  U largest{};
  for (std::size_t i = 0; i < kBlock; i += kWidth) {
    const U bits = load<U>(values + i);
    largest = max(largest, bits & 0x7FFFFFFFu);
    store(codes.data() + i, round(bits, i));
  }
  return largest;
}

// The same with the sums, a column of lanes at a time so that they stay in registers.
template <class Round, bool Wide>
U round_block(const float* values, Round round, Codes& codes, Represent represent, Lanes& lanes) {
  U largest{};
  for (std::size_t lane = 0; lane < kLanes; lane += kWidth) {
    HalfSums low, high;
    for (std::size_t i = lane; i < kBlock; i += kLanes) {
      const U bits = load<U>(values + i), code = round(bits, i);
      largest = max(largest, bits & 0x7FFFFFFFu);
      store(codes.data() + i, code);
      const F value = cast<F>(bits), shown = Wide ? represent.wide(code) : represent(code);
      const Halves difference = cast<Halves>(value - shown), halves = cast<Halves>(shown);
      low.add(difference.low, halves.low);
      high.add(difference.high, halves.high);
    }
    low.add_to(lanes, lane);
    high.add_to(lanes, lane + kWidth / 2);
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
  for (; i + kWidth <= n; i += kWidth) largest = max(largest, load<U>(values + i) & 0x7FFFFFFFu);
  std::uint32_t result = largest_lane(largest);
  for (; i < n; ++i) {
    const std::uint32_t magnitude = cast<std::uint32_t>(values[i]) & 0x7FFFFFFFu;
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
  const Represent represent(base.format, base.scale, base.offset);
  const Represent change = update ? Represent(update->format, update->scale, update->offset) : represent;
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

void decode_add(const Packed& packed, float weight, float* out, std::size_t n) {
  const Represent represent(packed.format, packed.scale, packed.offset);
  for_each_block(n, [&](std::size_t block, std::size_t at, std::size_t count) {
    alignas(64) Values values;
    decode_block(packed, represent, block, count, values.data());
    std::size_t i = 0;
    for (; i + kWidth <= count; i += kWidth)
      store(out + at + i, load<F>(out + at + i) + load<F>(values.data() + i) * weight);
    for (; i < count; ++i) out[at + i] += values[i] * weight;
  });
}

// Rounds and packs the blocks that fill(block, at, count, whole) gives; whole is room for a block, and what fill
// returns points to the block's values, zeros behind the last.
template <class Round, bool Wide, class Fill>
void encode_blocks(std::size_t n, Format format, const Rounding& rounding, std::uint32_t* words, Found& found,
                   Fill fill) {
  Lanes lanes{};
  const Represent represent(format, power_of_two(-rounding.exponent), 0.0f);
  U largest{};
  for_each_block(n, [&](std::size_t block, std::size_t at, std::size_t count) {
    alignas(64) Values room;
    alignas(64) Codes codes;
    const float* values = fill(block, at, count, room);
    const Round round(format, rounding, rounding.start + at);
    const U some = found.sums ? round_block<Round, Wide>(values, round, codes, represent, lanes)
                              : round_block<Round, Wide>(values, round, codes);
    largest = max(largest, some);
    for (std::size_t i = count; i < kBlock; ++i) codes[i] = 0;
    pack(codes, format.bits(), count, words + block * format.bits() * kLanes);
  });
  found.largest = largest_lane(largest);
  if (found.sums) add_lanes(lanes, found.sums);
}

template <class Fill>
void encode_with(std::size_t n, Format format, const Rounding& rounding, std::uint32_t* words, Found& found,
                 Fill fill) {
  const bool wide = format.exponent_bits == 8;
  if (rounding.stochastic) {
    if (wide) {
      encode_blocks<Stochastic, true>(n, format, rounding, words, found, fill);
    } else {
      encode_blocks<Stochastic, false>(n, format, rounding, words, found, fill);
    }
  } else if (wide) {
    encode_blocks<NearestWide, true>(n, format, rounding, words, found, fill);
  } else {
    encode_blocks<Nearest, false>(n, format, rounding, words, found, fill);
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
  const Represent represent(packed.format, packed.scale, packed.offset);
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

const Kernels kernels = {FEDOMC_NAME(FEDOMC_LEVEL), decode, decode_add, encode, update, largest_of};

}  // namespace fedomc::FEDOMC_LEVEL
