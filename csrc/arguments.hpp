// The argument types of the Python module's functions, and their validation against each other.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <stdexcept>

#include "layout.hpp"

namespace nb = nanobind;

namespace fedomc {
namespace {

using InWords = nb::ndarray<const std::int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using OutWords = nb::ndarray<std::int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using InValues = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using OutValues = nb::ndarray<float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using InDense = nb::ndarray<nb::ro, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using OutDense = nb::ndarray<nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using OutSums = nb::ndarray<double, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using OutStatus = nb::ndarray<std::int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using InScales = nb::ndarray<nb::ro, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using OutScales = nb::ndarray<nb::ndim<1>, nb::c_contig, nb::device::cpu>;

void require(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}

template <class Values>
Dtype checked_dtype(const Values& values) {
  if (values.dtype() == nb::dtype<float>()) return Dtype::kFloat32;
  if (values.dtype() == nb::dlpack::dtype{static_cast<std::uint8_t>(nb::dlpack::dtype_code::Float), 16, 1})
    return Dtype::kFloat16;
  require(values.dtype() == nb::dlpack::dtype{static_cast<std::uint8_t>(nb::dlpack::dtype_code::Bfloat), 16, 1},
          "values must be float32, bfloat16 or float16");
  return Dtype::kBfloat16;
}

Dense dense(const InDense& values) { return {values.data(), checked_dtype(values)}; }
DenseRoom dense_room(const OutDense& values) { return {values.data(), checked_dtype(values)}; }

Format checked_format(unsigned exponent_bits, unsigned mantissa_bits) {
  require(exponent_bits >= 1 && exponent_bits <= 8 && mantissa_bits <= 23, "format out of range");
  return {exponent_bits, mantissa_bits};
}

void check_words(std::size_t words, std::size_t n, Format format) {
  require(words == words_of(n, format.bits()), "words do not match the number of values and the format");
}

template <class A, class B>
void check_apart(const A& a, const B& b) {
  const auto a0 = reinterpret_cast<std::uintptr_t>(a.data()), a1 = a0 + a.nbytes();
  const auto b0 = reinterpret_cast<std::uintptr_t>(b.data()), b1 = b0 + b.nbytes();
  require(a1 <= b0 || b1 <= a0 || a0 == a1 || b0 == b1, "input and output overlap");
}

const std::uint32_t* unsigned_words(const std::int32_t* words) { return reinterpret_cast<const std::uint32_t*>(words); }
std::uint32_t* unsigned_words(std::int32_t* words) { return reinterpret_cast<std::uint32_t*>(words); }

std::size_t at_word(std::size_t value, Format format) { return words_of(value, format.bits()); }

void check_exponent(int exponent, Format format) {
  require(exponent >= format.least_exponent() && exponent <= format.most_exponent(), "exponent out of range");
  require(format.exponent_bits < 8 || exponent == 0, "eight exponent bits take no scaling");
}

// A part as passed from Python, checked against its number of values.
struct Part {
  const std::uint32_t* words;
  Format format;
  float scale, offset;

  Part(const InWords& words_, const InValues& scale_offset, unsigned e, unsigned m, std::size_t n)
      : words(unsigned_words(words_.data())), format(checked_format(e, m)), scale(0.0f), offset(0.0f) {
    check_words(words_.size(), n, format);
    require(scale_offset.size() == 2, "scale_offset must have two values");
    scale = scale_offset.data()[0];
    offset = scale_offset.data()[1];
  }

  Packed from(std::size_t value) const { return {words + at_word(value, format), format, scale, offset}; }
};

void check_sums(const OutSums& sums, std::size_t n) {
  require(sums.shape(0) == 0 || (sums.shape(0) == (n + kChunk - 1) / kChunk && sums.shape(1) == kSums),
          "sums must have a row of five for each chunk, or none");
}

double* sums_or_null(const OutSums& sums) { return sums.shape(0) ? sums.data() : nullptr; }

Element checked_element(int kind, unsigned e, unsigned m) {
  if (kind == 0) {
    require(e == 4 || e == 8, "integers of 4 or 8 bits alone");
    return {ElementKind::kInteger, e, {}};
  }
  if (kind == 1) return {ElementKind::kNormalFloat, 4, {}};
  if (kind == 3) {
    require(e >= 1 && e <= 5 && m <= 6,
            "an element with a scale by block has 1 to 5 exponent and 0 to 6 mantissa bits");
    return {ElementKind::kFloat, 1 + e + m, {e, m}};
  }
  require(kind == 2, "unknown kind of element");
  require((e == 4 && m == 3) || (e == 5 && m == 2) || (e == 3 && m == 2) || (e == 2 && m == 3) || (e == 2 && m == 1),
          "not an element of the OCP specification");
  return {ElementKind::kOcp, 1 + e + m, {e, m, e == 4 ? 1u : e == 5 ? 4u : 0u}};
}

// Codes and scales as passed from Python, checked against their number of values.
template <class Words, class Scales>
void check_blockwise(const Words& words, const Scales& scales, const Element& element, std::size_t block,
                     std::size_t n) {
  require(block == 32 || block == 64 || block == 128 || block == 256, "blocks of 32, 64, 128 or 256 values alone");
  require(words.size() == words_of(n, element.bits), "words do not match the number of values and the element");
  require(scales.size() == (n + block - 1) / block, "scales do not match the number of values");
  require(scales.dtype() == (element.is_float() ? nb::dtype<std::uint8_t>() : nb::dtype<float>()),
          "scales are float32, and of floats uint8");
}

std::size_t scale_bytes(const Element& element) { return element.is_float() ? 1 : sizeof(float); }

BlockPacked packed_from(const InWords& words, const InScales& scales, const Element& element, std::size_t block,
                        std::size_t at) {
  return {unsigned_words(words.data()) + words_of(at, element.bits),
          static_cast<const char*>(scales.data()) + at / block * scale_bytes(element), block};
}

BlockRoom room_from(const OutWords& words, const OutScales& scales, const Element& element, std::size_t block,
                    std::size_t at) {
  return {unsigned_words(words.data()) + words_of(at, element.bits),
          static_cast<char*>(scales.data()) + at / block * scale_bytes(element), block};
}

template <class Words, class Scales>
void check_rotated(const Words& words, const Scales& scales, unsigned bits, std::uint64_t start, std::size_t n) {
  require(bits == 1 || bits == 2, "codes of one or two bits alone");
  require(start % kBlock == 0, "a rotation begins at a block");
  require(words.size() == words_of(n, bits), "words do not match the number of values and the bits");
  require(scales.size() == (n + kBlock - 1) / kBlock, "scales do not match the number of values");
}

}  // namespace
}  // namespace fedomc
