// The kernels of SxEyMz formats, compiled once for each instruction set into the namespace FEDOMC_LEVEL.
//
// [Note: vectors] A vector holds as many neighbouring lanes of a row as fit into a register. All lanes shift by the
// same amount, so data never moves between lanes. With the vector types of GCC and Clang, the same source compiles to
// SSE2, AVX2, AVX-512 and NEON. A block's codes stay in the first-level cache between the steps. Only packing is
// specialized for the number of bits at compile time.
//
// [Note: no subnormal arithmetic] Arithmetic on subnormals traps to microcode on some processors and depends on the
// thread's mode on others. Formats with up to seven exponent bits are encoded under flush-to-zero (set in module.cpp):
// values are first scaled to the format by a power of two, which is bounded so that anything subnormal in float32 is
// far below half a step of the format (see codec/scaling.py) and counts as zero. Decoding produces normal values or
// zero. Formats with eight exponent bits have the range of float32, need no scaling, and run in IEEE mode, with all
// rounding in integer arithmetic.

#include "kernels.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>

#include "block_kernels.hpp"
#include "blocks.hpp"
#include "float_rounding.hpp"
#include "float_values.hpp"
#include "rotation.hpp"
#include "sums.hpp"
#include "vectors.hpp"

namespace fedomc::FEDOMC_LEVEL {
namespace {

// Rounds a block of values in units of 1 / scale, and computes the sums if requested. Columns of lanes are processed
// together as long as their sums stay in registers.
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

std::uint32_t largest_of(const Dense& dense, std::size_t n) {
  U largest{};
  std::uint32_t result = 0;
  for_each_block(n, [&](std::size_t, std::size_t at, std::size_t count) {
    alignas(64) Values room;
    const float* values = widened(dense, at, count, room);
    std::size_t i = 0;
    for (; i + kWidth <= count; i += kWidth) largest = max(largest, load<U>(values + i) & ~kSign);
    for (; i < count; ++i) result = std::max(result, cast<std::uint32_t>(values[i]) & ~kSign);
  });
  return std::max(result, largest_lane(largest));
}

void decode(const Packed& base, const Packed* update, const DenseRoom& out, std::size_t n, bool streaming) {
  const Represent represent(base);
  if (!update) {
    decode_chunk(out, n, streaming, [&](std::size_t block, std::size_t count, float* to) {
      decode_block(base, represent, block, count, to);
    });
    return;
  }
  const Represent change(*update);
  decode_chunk(out, n, streaming, [&](std::size_t block, std::size_t count, float* to) {
    alignas(64) Values values, changes;
    decode_block(base, represent, block, count, values.data());
    decode_block(*update, change, block, count, changes.data());
    for (std::size_t i = 0; i < kBlock; i += kWidth)
      store(to + i, load<F>(values.data() + i) + load<F>(changes.data() + i));
  });
}

// Adds weight * (values - subtrahend) to out; no pointer is null.
void add_difference(const float* values, const float* subtrahend, float weight, float* out, std::size_t n) {
  std::size_t i = 0;
  for (; i + kWidth <= n; i += kWidth)
    store(out + i, load<F>(out + i) + (load<F>(values + i) - load<F>(subtrahend + i)) * weight);
  for (; i < n; ++i) out[i] += (values[i] - subtrahend[i]) * weight;
}

void decode_add(const Packed& packed, const Packed* subtrahend, float weight, float* out, std::size_t n) {
  const Represent represent(packed);
  const Represent subtracted(subtrahend ? *subtrahend : packed);
  for_each_block(n, [&](std::size_t block, std::size_t at, std::size_t count) {
    alignas(64) Values values;
    decode_block(packed, represent, block, count, values.data());
    if (subtrahend) {
      alignas(64) Values others;
      decode_block(*subtrahend, subtracted, block, count, others.data());
      add_difference(values.data(), others.data(), weight, out + at, count);
      return;
    }
    std::size_t i = 0;
    for (; i + kWidth <= count; i += kWidth)
      store(out + at + i, load<F>(out + at + i) + load<F>(values.data() + i) * weight);
    for (; i < count; ++i) out[at + i] += values[i] * weight;
  });
}

// Rounds and packs the blocks that fill(block, at, count, whole) returns as pointers to their values, padded with
// zeros; `whole` is a buffer of one block that fill may use.
template <class Round, class Fill>
void encode_blocks(std::size_t n, Format format, const Rounding& rounding, std::uint32_t* words, Found& found,
                   Fill fill) {
  Lanes lanes{};
  const float scale = power_of_two(rounding.exponent);
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
                return padded(values + at, count, room);
              });
}

// In units of the current scale, so that values with a zero gradient are preserved exactly.
void update(const Packed& packed, const Dense& gradient, float ratio, std::size_t n, const Rounding& rounding,
            std::uint32_t* words, Found& found) {
  const Represent represent(packed.format, packed.format.working_bias(), 1.0f, 0.0f);
  found.changed = false;
  encode_with(n, packed.format, rounding, words, found,
              [&](std::size_t block, std::size_t at, std::size_t count, Values& room) -> const float* {
                decode_block(packed, represent, block, count, room.data());
                found.changed |= add_gradient(room, gradient, at, ratio, count);
                return room.data();
              });
}

#define FEDOMC_TEXT(x) #x
#define FEDOMC_NAME(x) FEDOMC_TEXT(x)

}  // namespace

const Kernels kernels = {FEDOMC_NAME(FEDOMC_LEVEL),
                         decode,
                         decode_add,
                         add_difference,
                         encode,
                         update,
                         largest_of,
                         block_decode,
                         block_decode_sum,
                         block_encode,
                         block_update,
                         rotated_decode,
                         rotated_encode};

}  // namespace fedomc::FEDOMC_LEVEL
