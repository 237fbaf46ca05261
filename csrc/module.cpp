// The Python module: validates all arguments, then runs the kernels without holding the GIL.

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <string>
#include <vector>

#include "arguments.hpp"
#include "arithmetic.hpp"
#include "kernels.hpp"
#include "levels.hpp"
#include "threads.hpp"

namespace nb = nanobind;

namespace fedomc {
namespace {

constexpr std::size_t kStreamingBytes = std::size_t{16} << 20;  // more than the caches hold

const Kernels* initial() {
  const char* forced = std::getenv("FEDOMC_LEVEL");
  return forced && *forced ? find(forced) : available().back();
}

const Kernels*& current() {
  static const Kernels* kernels = initial();
  return kernels;
}

// Calls run(at, count) for each chunk of n values, without holding the GIL.
template <class Run>
void in_chunks(std::size_t n, unsigned threads, const Run& run, Subnormals subnormals = Subnormals::kKept) {
  const nb::gil_scoped_release release;
  for_each_chunk(n, threads, [&](std::size_t chunk) {
    const Arithmetic arithmetic(subnormals);
    const std::size_t at = chunk * kChunk;
    run(at, std::min(kChunk, n - at));
  });
}

void decode(const InWords& words, const InValues& scale_offset, unsigned e, unsigned m, const OutDense& out,
            unsigned threads) {
  const Part part(words, scale_offset, e, m, out.size());
  check_apart(words, out);
  const DenseRoom to = dense_room(out);
  in_chunks(out.size(), threads, [&](std::size_t at, std::size_t count) {
    current()->decode(part.from(at), nullptr, to.from(at), count, out.nbytes() >= kStreamingBytes);
  });
}

void decode_sum(const InWords& words, const InValues& scale_offset, unsigned e, unsigned m, const InWords& update_words,
                const InValues& update_scale_offset, unsigned update_e, unsigned update_m, const OutDense& out,
                unsigned threads) {
  const Part base(words, scale_offset, e, m, out.size());
  const Part update(update_words, update_scale_offset, update_e, update_m, out.size());
  check_apart(words, out);
  check_apart(update_words, out);
  const DenseRoom to = dense_room(out);
  in_chunks(out.size(), threads, [&](std::size_t at, std::size_t count) {
    const Packed change = update.from(at);
    current()->decode(base.from(at), &change, to.from(at), count, out.nbytes() >= kStreamingBytes);
  });
}

void decode_add(const InWords& words, const InValues& scale_offset, unsigned e, unsigned m, float weight,
                const OutValues& out, unsigned threads) {
  const Part part(words, scale_offset, e, m, out.size());
  check_apart(words, out);
  in_chunks(out.size(), threads, [&](std::size_t at, std::size_t count) {
    current()->decode_add(part.from(at), nullptr, weight, out.data() + at, count);
  });
}

void decode_add_difference(const InWords& words, const InValues& scale_offset, unsigned e, unsigned m,
                           const InWords& subtrahend_words, const InValues& subtrahend_scale_offset,
                           unsigned subtrahend_e, unsigned subtrahend_m, float weight, const OutValues& out,
                           unsigned threads) {
  const Part part(words, scale_offset, e, m, out.size());
  const Part subtrahend(subtrahend_words, subtrahend_scale_offset, subtrahend_e, subtrahend_m, out.size());
  check_apart(words, out);
  check_apart(subtrahend_words, out);
  in_chunks(out.size(), threads, [&](std::size_t at, std::size_t count) {
    const Packed subtracted = subtrahend.from(at);
    current()->decode_add(part.from(at), &subtracted, weight, out.data() + at, count);
  });
}

void add_difference(const InValues& values, const InValues& subtrahend, float weight, const OutValues& out,
                    unsigned threads) {
  require(values.size() == out.size() && subtrahend.size() == out.size(),
          "values, subtrahend and out must have one size");
  check_apart(values, out);
  check_apart(subtrahend, out);
  in_chunks(out.size(), threads, [&](std::size_t at, std::size_t count) {
    current()->add_difference(values.data() + at, subtrahend.data() + at, weight, out.data() + at, count);
  });
}

// Calls run(at, count, rounding, found) for each chunk of n values, and writes the combined results to the status: the
// float32 bits of the largest magnitude, and whether any value changed.
template <class Run>
void find_in_chunks(std::size_t n, unsigned threads, Subnormals subnormals, double* sums, const Rounding& rounding,
                    const OutStatus& status, const Run& run) {
  require(status.size() == 2, "status must have two values");
  std::vector<Found> founds((n + kChunk - 1) / kChunk);
  const auto over_chunk = [&](std::size_t at, std::size_t count) {
    const std::size_t chunk = at / kChunk;
    Rounding here = rounding;
    here.start += at;
    Found found{sums ? sums + chunk * kSums : nullptr, 0, true};
    run(at, count, here, found);
    founds[chunk] = found;
  };
  in_chunks(n, threads, over_chunk, subnormals);
  std::uint32_t largest = 0;
  bool changed = false;
  for (const Found& found : founds) {
    largest = std::max(largest, found.largest);
    changed |= found.changed;
  }
  status.data()[0] = largest;
  status.data()[1] = changed;
}

Subnormals subnormals_of(Format format) { return format.exponent_bits == 8 ? Subnormals::kKept : Subnormals::kZero; }

void encode(const InValues& values, unsigned e, unsigned m, int exponent, bool stochastic, std::uint64_t seed,
            std::uint64_t start, const OutWords& words, const OutSums& sums, const OutStatus& status,
            unsigned threads) {
  const Format format = checked_format(e, m);
  const std::size_t n = values.size();
  check_words(words.size(), n, format);
  check_exponent(exponent, format);
  check_sums(sums, n);
  check_apart(values, words);
  find_in_chunks(n, threads, subnormals_of(format), sums_or_null(sums),
                 {exponent + format.bias() - format.working_bias(), stochastic, seed, start}, status,
                 [&](std::size_t at, std::size_t count, const Rounding& rounding, Found& found) {
                   current()->encode(values.data() + at, count, format, rounding,
                                     unsigned_words(words.data()) + at_word(at, format), found);
                 });
}

// Reports an infinite result, which cannot be written: the caller falls back to another method or raises.
void report_infinite(const OutStatus& status) {
  status.data()[0] = 0x7F800000;
  status.data()[1] = 1;
}

void update(const InWords& words, const InValues& scale_offset, unsigned e, unsigned m, const InDense& gradient,
            float alpha, bool rescale, bool stochastic, std::uint64_t seed, const OutWords& out,
            const OutValues& out_scale_offset, const OutStatus& status, unsigned threads) {
  const std::size_t n = gradient.size();
  const Part part(words, scale_offset, e, m, n);
  const Format format = part.format;
  check_words(out.size(), n, format);
  require(out_scale_offset.size() == 2 && status.size() == 2, "scale_offset and status must have two values");
  check_apart(words, out);
  check_apart(gradient, out);
  check_apart(scale_offset, out_scale_offset);
  const Dense values = dense(gradient);
  const int working = format.bias() - format.working_bias();
  const float ratio = static_cast<float>(std::ldexp(static_cast<double>(alpha) / part.scale, working));
  if (!std::isnormal(part.scale) || !std::isfinite(ratio)) return report_infinite(status);
  const int present = -std::ilogb(part.scale);
  int shift = 0;
  for (bool again = true; again;) {
    find_in_chunks(n, threads, subnormals_of(format), nullptr, {shift, stochastic, seed, 0}, status,
                   [&](std::size_t at, std::size_t count, const Rounding& rounding, Found& found) {
                     current()->update(part.from(at), values.from(at), ratio, count, rounding,
                                       unsigned_words(out.data()) + at_word(at, format), found);
                   });
    const auto largest = static_cast<std::uint32_t>(status.data()[0]);
    if (largest >= 0x7F800000) return;
    const int wanted = present + format.fitting_exponent(largest, stochastic) + working;
    const int bounded = std::clamp(wanted, format.least_exponent(), format.most_exponent());
    const int fitting = rescale && format.exponent_bits < 8 && largest ? bounded - present : 0;
    again = fitting != shift;
    shift = fitting;
    if (std::abs(shift) > 120) return report_infinite(status);
  }
  const float scale = std::ldexp(part.scale, -shift);
  if (!std::isfinite(std::abs(scale) * format.max_value() + std::abs(part.offset))) return report_infinite(status);
  out_scale_offset.data()[0] = scale;
  out_scale_offset.data()[1] = part.offset;
}

// ---- blockwise methods --------------------------------------------------------------------------------------------

void block_decode(const InWords& words, const InScales& scales, int kind, unsigned e, unsigned m, std::size_t block,
                  const OutDense& out, unsigned threads) {
  const Element element = checked_element(kind, e, m);
  check_blockwise(words, scales, element, block, out.size());
  check_apart(words, out);
  check_apart(scales, out);
  const DenseRoom to = dense_room(out);
  in_chunks(out.size(), threads, [&](std::size_t at, std::size_t count) {
    current()->block_decode(packed_from(words, scales, element, block, at), element, to.from(at), count,
                            out.nbytes() >= kStreamingBytes);
  });
}

void block_decode_sum(const InWords& words, const InScales& scales, int kind, unsigned e, unsigned m, std::size_t block,
                      const InWords& update_words, const InScales& update_scales, int update_kind, unsigned update_e,
                      unsigned update_m, std::size_t update_block, const OutDense& out, unsigned threads) {
  const Element element = checked_element(kind, e, m);
  const Element update_element = checked_element(update_kind, update_e, update_m);
  check_blockwise(words, scales, element, block, out.size());
  check_blockwise(update_words, update_scales, update_element, update_block, out.size());
  check_apart(words, out);
  check_apart(scales, out);
  check_apart(update_words, out);
  check_apart(update_scales, out);
  const DenseRoom to = dense_room(out);
  in_chunks(out.size(), threads, [&](std::size_t at, std::size_t count) {
    current()->block_decode_sum(packed_from(words, scales, element, block, at), element,
                                packed_from(update_words, update_scales, update_element, update_block, at),
                                update_element, to.from(at), count, out.nbytes() >= kStreamingBytes);
  });
}

void block_encode(const InValues& values, int kind, unsigned e, unsigned m, std::size_t block, bool stochastic,
                  std::uint64_t seed, std::uint64_t start, const OutWords& words, const OutScales& scales,
                  const OutStatus& status, unsigned threads) {
  const Element element = checked_element(kind, e, m);
  check_blockwise(words, scales, element, block, values.size());
  check_apart(values, words);
  check_apart(values, scales);
  find_in_chunks(values.size(), threads, Subnormals::kZero, nullptr, {0, stochastic, seed, start}, status,
                 [&](std::size_t at, std::size_t count, const Rounding& rounding, Found& found) {
                   current()->block_encode(values.data() + at, count, element, rounding,
                                           room_from(words, scales, element, block, at), found);
                 });
}

void block_update(const InWords& words, const InScales& scales, int kind, unsigned e, unsigned m, std::size_t block,
                  const InDense& gradient, float alpha, bool stochastic, std::uint64_t seed, const OutWords& out,
                  const OutScales& out_scales, const OutStatus& status, unsigned threads) {
  const Element element = checked_element(kind, e, m);
  check_blockwise(words, scales, element, block, gradient.size());
  check_blockwise(out, out_scales, element, block, gradient.size());
  check_apart(words, out);
  check_apart(scales, out_scales);
  check_apart(gradient, out);
  check_apart(gradient, out_scales);
  const Dense values = dense(gradient);
  find_in_chunks(gradient.size(), threads, Subnormals::kZero, nullptr, {0, stochastic, seed, 0}, status,
                 [&](std::size_t at, std::size_t count, const Rounding& rounding, Found& found) {
                   current()->block_update(packed_from(words, scales, element, block, at), values.from(at), alpha,
                                           count, element, rounding, room_from(out, out_scales, element, block, at),
                                           found);
                 });
}

// ---- random rotations ----------------------------------------------------------------------------------------------

void rotated_decode(const InWords& words, const InValues& scales, unsigned bits, std::uint64_t seed,
                    std::uint64_t start, const OutDense& out, unsigned threads) {
  check_rotated(words, scales, bits, start, out.size());
  check_apart(words, out);
  check_apart(scales, out);
  const DenseRoom to = dense_room(out);
  in_chunks(out.size(), threads, [&](std::size_t at, std::size_t count) {
    current()->rotated_decode(unsigned_words(words.data()) + words_of(at, bits), scales.data() + at / kBlock,
                              {bits, seed, start + at, true}, to.from(at), count, out.nbytes() >= kStreamingBytes);
  });
}

void rotated_encode(const InValues& values, unsigned bits, std::uint64_t seed, std::uint64_t start, bool unbiased,
                    const OutWords& words, const OutValues& scales, unsigned threads) {
  check_rotated(words, scales, bits, start, values.size());
  check_apart(values, words);
  check_apart(values, scales);
  const auto encode_chunk = [&](std::size_t at, std::size_t count) {
    current()->rotated_encode(values.data() + at, count, {bits, seed, start + at, unbiased},
                              unsigned_words(words.data()) + words_of(at, bits), scales.data() + at / kBlock);
  };
  in_chunks(values.size(), threads, encode_chunk, Subnormals::kZero);
}

std::uint32_t absmax(const InDense& values, unsigned threads) {
  const Dense from = dense(values);
  std::vector<std::uint32_t> found((values.size() + kChunk - 1) / kChunk);
  in_chunks(values.size(), threads,
            [&](std::size_t at, std::size_t count) { found[at / kChunk] = current()->largest(from.from(at), count); });
  std::uint32_t result = 0;
  for (const std::uint32_t some : found) result = std::max(result, some);
  return result;
}

std::vector<std::string> levels() {
  std::vector<std::string> names;
  for (const Kernels* kernels : available()) names.emplace_back(kernels->level);
  return names;
}

}  // namespace
}  // namespace fedomc

NB_MODULE(_native, module) {
  using namespace nb::literals;
  module.doc() = "The codec's kernels for the CPU; fedomc.codec.native is what calls them.";
  // No implicit conversion: an output written to a converted copy would be lost.
  const auto words = "words"_a.noconvert();
  const auto scale_offset = "scale_offset"_a.noconvert();
  const auto scales = "scales"_a.noconvert();
  const auto values = "values"_a.noconvert();
  const auto out = "out"_a.noconvert();
  const auto status = "status"_a.noconvert();
  module.def("decode", &fedomc::decode, words, scale_offset, "e"_a, "m"_a, out, "threads"_a);
  module.def("decode_sum", &fedomc::decode_sum, words, scale_offset, "e"_a, "m"_a, "update_words"_a.noconvert(),
             "update_scale_offset"_a.noconvert(), "update_e"_a, "update_m"_a, out, "threads"_a);
  module.def("decode_add", &fedomc::decode_add, words, scale_offset, "e"_a, "m"_a, "weight"_a, out, "threads"_a);
  module.def("decode_add_difference", &fedomc::decode_add_difference, words, scale_offset, "e"_a, "m"_a,
             "subtrahend_words"_a.noconvert(), "subtrahend_scale_offset"_a.noconvert(), "subtrahend_e"_a,
             "subtrahend_m"_a, "weight"_a, out, "threads"_a);
  module.def("add_difference", &fedomc::add_difference, values, "subtrahend"_a.noconvert(), "weight"_a, out,
             "threads"_a);
  module.def("encode", &fedomc::encode, values, "e"_a, "m"_a, "exponent"_a, "stochastic"_a, "seed"_a, "start"_a, words,
             "sums"_a.noconvert(), status, "threads"_a);
  module.def("update", &fedomc::update, words, scale_offset, "e"_a, "m"_a, "gradient"_a.noconvert(), "alpha"_a,
             "rescale"_a, "stochastic"_a, "seed"_a, out, "out_scale_offset"_a.noconvert(), status, "threads"_a);
  module.def("block_decode", &fedomc::block_decode, words, scales, "kind"_a, "e"_a, "m"_a, "block"_a, out, "threads"_a);
  module.def("block_decode_sum", &fedomc::block_decode_sum, words, scales, "kind"_a, "e"_a, "m"_a, "block"_a,
             "update_words"_a.noconvert(), "update_scales"_a.noconvert(), "update_kind"_a, "update_e"_a, "update_m"_a,
             "update_block"_a, out, "threads"_a);
  module.def("block_encode", &fedomc::block_encode, values, "kind"_a, "e"_a, "m"_a, "block"_a, "stochastic"_a, "seed"_a,
             "start"_a, words, scales, status, "threads"_a);
  module.def("block_update", &fedomc::block_update, words, scales, "kind"_a, "e"_a, "m"_a, "block"_a,
             "gradient"_a.noconvert(), "alpha"_a, "stochastic"_a, "seed"_a, out, "out_scales"_a.noconvert(), status,
             "threads"_a);
  module.def("rotated_decode", &fedomc::rotated_decode, words, scales, "bits"_a, "seed"_a, "start"_a, out, "threads"_a);
  module.def("rotated_encode", &fedomc::rotated_encode, values, "bits"_a, "seed"_a, "start"_a, "unbiased"_a, words,
             scales, "threads"_a);
  module.def("absmax", &fedomc::absmax, values, "threads"_a);
  module.def("levels", &fedomc::levels, "Names of the instruction sets of this machine, the fastest last.");
  module.def("level", [] { return std::string(fedomc::current()->level); });
  module.def(
      "set_level", [](const std::string& name) { fedomc::current() = fedomc::find(name); }, "name"_a,
      "Use an instruction set; not while kernels run.");
  fedomc::current();  // fails on an unsupported FEDOMC_LEVEL
}
