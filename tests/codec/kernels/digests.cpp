// Runs the kernels of one instruction set without Python, so that machines can be compared bit for bit.
//
//   digests [LEVEL]                       runs every kernel, format and rounding on generated values, and prints
//                                                a digest of everything that each of them writes
//   digests levels                               prints the names of this machine's instruction sets
//   digests decode KIND E M BLOCK N       reads the words and scales of a variable from the standard input, and
//                                                writes its N values to the standard output, as float32
//
// KIND is float, integer, normal, ocp, block or drive, and BLOCK the number of values that share a scale. The inputs
// come from integers alone, so that every machine has the same ones.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <string_view>
#include <vector>

#include "arithmetic.hpp"
#include "inputs.hpp"
#include "kernels.hpp"
#include "levels.hpp"
#include "report.hpp"
#include "threads.hpp"

namespace fedomc {
namespace {

constexpr std::size_t kSizes[] = {1, 31, 33, 1024 * 3 + 77};
constexpr std::size_t kTwoChunks = kChunk + 1025;
constexpr std::uint64_t kSeed = (std::uint64_t{1} << 63) + 12345;
constexpr std::uint64_t kStart = (std::uint64_t{1} << 32) - 2 * kBlock;  // the counter passes 2**32 on the way

const Kernels* kernels;

// ---- runs over the chunks of a variable, as in module.cpp -----------------------------------------------------------

template <class Run>
void in_chunks(std::size_t n, Subnormals subnormals, const Run& run) {
  for_each_chunk(n, 1, [&](std::size_t chunk) {
    const Arithmetic arithmetic(subnormals);
    run(chunk * kChunk, std::min(kChunk, n - chunk * kChunk));
  });
}

// Calls run(at, count, rounding, found) for each chunk, and returns the largest magnitude and whether a value changed.
template <class Run>
Words find_in_chunks(std::size_t n, Subnormals subnormals, const Rounding& rounding, std::vector<double>* sums,
                     const Run& run) {
  Words status{0, 0};
  in_chunks(n, subnormals, [&](std::size_t at, std::size_t count) {
    Rounding here = rounding;
    here.start += at;
    Found found{sums ? sums->data() + at / kChunk * kSums : nullptr, 0, true};
    run(at, count, here, found);
    status[0] = std::max(status[0], found.largest);
    status[1] |= found.changed;
  });
  return status;
}

using Narrow = std::vector<std::uint16_t>;

constexpr Dtype kNarrow[] = {Dtype::kBfloat16, Dtype::kFloat16};

std::string name_of(Dtype dtype) { return dtype == Dtype::kBfloat16 ? "bfloat16" : "float16"; }

DenseRoom room(Values& values) { return {values.data(), Dtype::kFloat32}; }
Dense dense(const Values& values) { return {values.data(), Dtype::kFloat32}; }

std::string name_of(Format format) {
  return "S1E" + std::to_string(format.exponent_bits) + "M" + std::to_string(format.mantissa_bits);
}

std::string name_of(bool stochastic) { return stochastic ? " stochastic" : " nearest"; }

// ---- SxEyMz -------------------------------------------------------------------------------------------------------

Subnormals subnormals_of(Format format) { return format.exponent_bits == 8 ? Subnormals::kKept : Subnormals::kZero; }

Packed packed_at(const Words& words, Format format, std::size_t at, float scale = 1.0f, float offset = 0.0f) {
  return {words.data() + words_of(at, format.bits()), format, scale, offset};
}

void encode(Format format, const std::string& what, const Values& values, int exponent, bool stochastic, bool summing) {
  const std::size_t n = values.size();
  Words words(words_of(n, format.bits()), ~0u);
  std::vector<double> sums(summing ? (n + kChunk - 1) / kChunk * kSums : 0);
  const Rounding rounding{exponent + format.bias() - format.working_bias(), stochastic, kSeed, kStart};
  const Words status = find_in_chunks(n, subnormals_of(format), rounding, summing ? &sums : nullptr,
                                      [&](std::size_t at, std::size_t count, const Rounding& here, Found& found) {
                                        kernels->encode(values.data() + at, count, format, here,
                                                        words.data() + words_of(at, format.bits()), found);
                                      });
  report("encode " + name_of(format) + name_of(stochastic) + " " + what + (summing ? " with sums" : ""), n, words, sums,
         status);
}

void encode(Format format, std::size_t n) {
  const Values values = ordinary(n), any = any_finite(n);
  const std::uint32_t largest = kernels->largest(dense(values), n);
  for (const bool stochastic : {false, true}) {
    const int fitting = std::clamp(format.fitting_exponent(largest, stochastic), format.least_exponent(),
                                   format.exponent_bits == 8 ? 0 : format.most_exponent());
    encode(format, "ordinary", values, fitting, stochastic, false);
    encode(format, "ordinary", values, fitting, stochastic, true);
    encode(format, "any", any, 0, stochastic, true);
    if (format.exponent_bits < 8)
      encode(format, "any, scaled", any, std::max(-7, format.least_exponent()), stochastic, true);
  }
}

void decode(Format format, std::size_t n) {
  const Format other{2, 1};
  const Words words = any_words(n, format.bits()), others = any_words(n, other.bits(), 5);
  for (const auto& [scale, offset] : {std::pair{1.0f, 0.0f}, {0.37f, -0.0f}, {-0.01f, 0.3f}}) {
    Values alone(n, 42.0f), streamed(n, 42.0f), total(n, 42.0f), added = ordinary(n, 6), changed = ordinary(n, 7);
    in_chunks(n, Subnormals::kKept, [&](std::size_t at, std::size_t count) {
      const Packed packed = packed_at(words, format, at, scale, offset);
      const Packed update = packed_at(others, other, at, 0.001f, 0.01f);
      kernels->decode(packed, nullptr, room(alone).from(at), count, false);
      kernels->decode(packed, nullptr, room(streamed).from(at), count, true);
      kernels->decode(packed, &update, room(total).from(at), count, false);
      kernels->decode_add(packed, nullptr, 0.3f, added.data() + at, count);
      kernels->decode_add(packed, &update, 0.3f, changed.data() + at, count);
    });
    const std::string how = " " + name_of(format) + " scale " + std::to_string(scale);
    report("decode" + how, n, alone);
    report("decode past the caches" + how, n, streamed);
    report("decode two parts" + how, n, total);
    report("decode_add" + how, n, added);
    report("decode_add of a difference" + how, n, changed);
    for (const Dtype dtype : kNarrow) {
      Narrow narrow(n, 42);
      const DenseRoom to{narrow.data(), dtype};
      in_chunks(n, Subnormals::kKept, [&](std::size_t at, std::size_t count) {
        kernels->decode(packed_at(words, format, at, scale, offset), nullptr, to.from(at), count, false);
      });
      report("decode to " + name_of(dtype) + how, n, narrow);
    }
  }
}

void update(Format format, std::size_t n) {
  const Words words = any_words(n, format.bits());
  const Values gradient = ordinary(n, 8);
  Narrow narrow(n);  // finite in both dtypes
  for (std::size_t i = 0; i < n; ++i) narrow[i] = static_cast<std::uint16_t>(bits_of(gradient[i]) >> 15 & 0xBBFF);
  const float unit = std::ldexp(1.0f, std::min(format.top_exponent() + format.working_bias() - format.bias(), 100) - 4);
  for (const bool stochastic : {false, true}) {
    for (const int shift : {0, -1, 2}) {
      if (shift && format.exponent_bits == 8) continue;
      Words out(words.size(), ~0u);
      const Words status =
          find_in_chunks(n, subnormals_of(format), {shift, stochastic, kSeed, 0}, nullptr,
                         [&](std::size_t at, std::size_t count, const Rounding& here, Found& found) {
                           kernels->update(packed_at(words, format, at), dense(gradient).from(at), -0.7f * unit, count,
                                           here, out.data() + words_of(at, format.bits()), found);
                         });
      report("update " + name_of(format) + name_of(stochastic) + " shift " + std::to_string(shift), n, out, status);
      for (const Dtype dtype : kNarrow) {
        if (shift) continue;
        const Dense steps{narrow.data(), dtype};
        const Words narrowed =
            find_in_chunks(n, subnormals_of(format), {0, stochastic, kSeed, 0}, nullptr,
                           [&](std::size_t at, std::size_t count, const Rounding& here, Found& found) {
                             kernels->update(packed_at(words, format, at), steps.from(at), -0.7f * unit, count, here,
                                             out.data() + words_of(at, format.bits()), found);
                           });
        report("update by " + name_of(dtype) + " " + name_of(format) + name_of(stochastic), n, out, narrowed);
      }
    }
  }
}

// ---- blockwise methods --------------------------------------------------------------------------------------------

std::string name_of(const Element& element) {
  switch (element.kind) {
    case ElementKind::kInteger:
      return "INT" + std::to_string(element.bits);
    case ElementKind::kNormalFloat:
      return "NF4";
    case ElementKind::kOcp:
      return "MX " + name_of(element.format);
    default:
      return "blocks of " + name_of(element.format);
  }
}

std::vector<Element> elements() {
  std::vector<Element> all{
      {ElementKind::kInteger, 4, {}}, {ElementKind::kInteger, 8, {}}, {ElementKind::kNormalFloat, 4, {}}};
  for (const Format format : {Format{4, 3, 1}, {5, 2, 4}, {3, 2}, {2, 3}, {2, 1}})
    all.push_back({ElementKind::kOcp, format.bits(), format});
  for (unsigned e = 1; e <= 5; ++e)
    for (unsigned m = 0; m <= 6; ++m) all.push_back({ElementKind::kFloat, 1 + e + m, {e, m}});
  return all;
}

// The codes and scales of a variable of n values.
struct Variable {
  Element element;
  std::size_t block;
  Words words;
  Values scales;
  Bytes exponents;

  Variable(const Element& element_, std::size_t block_, std::size_t n)
      : element(element_),
        block(block_),
        words(words_of(n, element_.bits), ~0u),
        scales((n + block_ - 1) / block_),
        exponents(scales.size()) {}

  BlockPacked from(std::size_t at) const {
    const BlockRoom room = const_cast<Variable*>(this)->room(at);
    return {room.words, room.scales, room.block};
  }
  BlockRoom room(std::size_t at) {
    std::uint32_t* const codes = words.data() + words_of(at, element.bits);
    if (element.is_float()) return {codes, exponents.data() + at / block, block};
    return {codes, scales.data() + at / block, block};
  }
};

void blockwise(const Element& element, std::size_t block, std::size_t n) {
  const Values values = ordinary(n), any = any_finite(n), gradient = ordinary(n, 9);
  const std::string name = " " + name_of(element) + "/" + std::to_string(block);
  const Variable other = [&] {
    Variable made({ElementKind::kInteger, 4, {}}, 64, n);
    made.words = any_words(n, 4);
    std::fill(made.scales.begin(), made.scales.end(), 0.013f);
    return made;
  }();
  for (const bool stochastic : {false, true}) {
    for (const bool ordinary_values : {true, false}) {
      const Values& from = ordinary_values ? values : any;
      Variable variable(element, block, n), stepped(element, block, n);
      const Rounding rounding{0, stochastic, kSeed, kStart};
      const Words status =
          find_in_chunks(n, Subnormals::kZero, rounding, nullptr,
                         [&](std::size_t at, std::size_t count, const Rounding& here, Found& found) {
                           kernels->block_encode(from.data() + at, count, element, here, variable.room(at), found);
                         });
      const std::string how = name + name_of(stochastic) + (ordinary_values ? " ordinary" : " any");
      report("block_encode" + how, n, variable.words, variable.scales, variable.exponents, status);
      Values alone(n, 42.0f), total(n, 42.0f);
      in_chunks(n, Subnormals::kKept, [&](std::size_t at, std::size_t count) {
        kernels->block_decode(variable.from(at), element, room(alone).from(at), count, at % 2 == 0);
        kernels->block_decode_sum(variable.from(at), element, other.from(at), other.element, room(total).from(at),
                                  count, false);
      });
      report("block_decode" + how, n, alone);
      report("block_decode_sum" + how, n, total);
      const Words changed = find_in_chunks(n, Subnormals::kZero, rounding, nullptr,
                                           [&](std::size_t at, std::size_t count, const Rounding& here, Found& found) {
                                             kernels->block_update(variable.from(at), dense(gradient).from(at), -0.03f,
                                                                   count, element, here, stepped.room(at), found);
                                           });
      report("block_update" + how, n, stepped.words, stepped.scales, stepped.exponents, changed);
    }
  }
}

// ---- random rotations ----------------------------------------------------------------------------------------------

void rotated(unsigned bits, std::size_t n) {
  for (const bool unbiased : {false, true}) {
    for (const bool ordinary_values : {true, false}) {
      const Values values = ordinary_values ? ordinary(n) : any_finite(n);
      Words words(words_of(n, bits), ~0u);
      Values scales((n + kBlock - 1) / kBlock), out(n, 42.0f);
      const auto chunk = [&](std::size_t at) { return Rotation{bits, kSeed, kStart + at, unbiased}; };
      in_chunks(n, Subnormals::kZero, [&](std::size_t at, std::size_t count) {
        kernels->rotated_encode(values.data() + at, count, chunk(at), words.data() + words_of(at, bits),
                                scales.data() + at / kBlock);
      });
      in_chunks(n, Subnormals::kKept, [&](std::size_t at, std::size_t count) {
        kernels->rotated_decode(words.data() + words_of(at, bits), scales.data() + at / kBlock, chunk(at),
                                room(out).from(at), count, false);
      });
      report("rotated DRIVE" + std::to_string(bits) + (unbiased ? " unbiased" : " of least error") +
                 (ordinary_values ? " ordinary" : " any"),
             n, words, scales, out);
    }
  }
}

// ---- the program --------------------------------------------------------------------------------------------------

void run_all() {
  std::size_t formats = 0;
  const auto elements_of_blocks = elements();
  for (const std::size_t n : {kSizes[0], kSizes[1], kSizes[2], kSizes[3], kTwoChunks}) {
    const Values values = any_finite(n);
    Values sum = ordinary(n, 10);
    kernels->add_difference(values.data(), ordinary(n).data(), -0.3f, sum.data(), n);
    report("add_difference", n, sum);
    report("largest", n, Words{kernels->largest(dense(values), n)});
    for (const unsigned bits : {1u, 2u}) rotated(bits, n);
  }
  for (unsigned e = 1; e <= 8; ++e) {
    for (unsigned m = 0; m <= 23; ++m, ++formats) {
      const Format format{e, m};
      for (const std::size_t n : kSizes) {
        encode(format, n);
        decode(format, n);
        update(format, n);
      }
    }
  }
  for (const Format format : {Format{2, 3}, {3, 7}, {8, 7}}) {
    encode(format, kTwoChunks);
    decode(format, kTwoChunks);
    update(format, kTwoChunks);
  }
  for (const Element& element : elements_of_blocks) {
    for (const std::size_t block : {32, 64, 128, 256}) {
      if (element.kind == ElementKind::kOcp && block != 32) continue;
      for (const std::size_t n : kSizes) blockwise(element, block, n);
      if (block == 64 && !element.is_float()) blockwise(element, block, kTwoChunks);
    }
  }
  std::printf(
      "total: %zu formats SxEyMz, %zu elements with scales by block, 2 rotations; %zu operations on %zu values\n",
      formats, elements_of_blocks.size(), lines, values_seen);
}

template <class T>
std::vector<T> read(std::size_t n) {
  std::vector<T> all(n);
  if (std::fread(all.data(), sizeof(T), n, stdin) != n) throw std::invalid_argument("the standard input is too short");
  return all;
}

void decode_input(std::string_view kind, unsigned e, unsigned m, std::size_t block, std::size_t n) {
  const unsigned bits = kind == "integer" || kind == "drive" ? e : kind == "normal" ? 4 : 1 + e + m;
  const Words words = read<std::uint32_t>(words_of(n, bits));
  const std::size_t scales = kind == "float" ? 2 : (n + block - 1) / block;
  Values out(n);
  if (kind == "float") {
    const Values scale_offset = read<float>(2);
    kernels->decode({words.data(), {e, m}, scale_offset[0], scale_offset[1]}, nullptr, room(out), n, false);
  } else if (kind == "drive") {
    const Values factors = read<float>(scales);
    const std::uint64_t seed = read<std::uint64_t>(1)[0];
    kernels->rotated_decode(words.data(), factors.data(), {bits, seed, 0, true}, room(out), n, false);
  } else if (kind == "integer" || kind == "normal") {
    const Values factors = read<float>(scales);
    const Element element{kind == "integer" ? ElementKind::kInteger : ElementKind::kNormalFloat, bits, {}};
    kernels->block_decode({words.data(), factors.data(), block}, element, room(out), n, false);
  } else {
    const Bytes exponents = read<std::uint8_t>(scales);
    const bool ocp = kind == "ocp";
    const Element element{ocp ? ElementKind::kOcp : ElementKind::kFloat,
                          bits,
                          {e, m,
                           ocp && e == 4   ? 1u
                           : ocp && e == 5 ? 4u
                                           : 0u}};
    kernels->block_decode({words.data(), exponents.data(), block}, element, room(out), n, false);
  }
  std::fwrite(out.data(), sizeof(float), n, stdout);
}

int run(int count, char** arguments) {
  const std::string_view what = count > 1 ? arguments[1] : "";
  kernels = available().back();
  if (what == "levels") {
    for (const Kernels* level : available()) std::printf("%s\n", level->level);
  } else if (what == "decode" && count == 7) {
    const Arithmetic arithmetic(Subnormals::kKept);
    decode_input(arguments[2], static_cast<unsigned>(std::atoi(arguments[3])),
                 static_cast<unsigned>(std::atoi(arguments[4])), static_cast<std::size_t>(std::atoll(arguments[5])),
                 static_cast<std::size_t>(std::atoll(arguments[6])));
  } else {
    if (!what.empty()) kernels = find(what);
    run_all();
  }
  return 0;
}

}  // namespace
}  // namespace fedomc

int main(int count, char** arguments) {
  try {
    return fedomc::run(count, arguments);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 2;
  }
}
