// The Python module: checks every argument, then runs the kernels without the GIL.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "kernels.hpp"
#include "threads.hpp"

#if defined(FEDOMC_X86)
#include <immintrin.h>
#endif

namespace nb = nanobind;

namespace fedomc {
namespace {

using InWords = nb::ndarray<const std::int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using OutWords = nb::ndarray<std::int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using InValues = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using OutValues = nb::ndarray<float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using OutSums = nb::ndarray<double, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

constexpr std::size_t kStreamingValues = std::size_t{1} << 22;  // 16 MB: more than the caches keep

std::vector<const Kernels*> available() {
  std::vector<const Kernels*> found{&baseline::kernels};
#if defined(FEDOMC_X86)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.push_back(&avx2::kernels);
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    found.push_back(&avx512::kernels);
#endif
  return found;
}

const Kernels* find(std::string_view level) {
  for (const Kernels* kernels : available())
    if (level == kernels->level) return kernels;
  std::string message = "instruction set '" + std::string(level) + "' is not available here: use";
  for (const Kernels* kernels : available()) message += std::string(" ") + kernels->level;
  throw std::invalid_argument(message);
}

const Kernels* initial() {
  const char* forced = std::getenv("FEDOMC_LEVEL");
  return forced && *forced ? find(forced) : available().back();
}

const Kernels*& current() {
  static const Kernels* kernels = initial();
  return kernels;
}

// How subnormal numbers are treated, whatever torch.set_flush_denormal says: a result does not depend on the thread.
enum class Subnormals { kKept, kZero };

class Arithmetic {
 public:
#if defined(FEDOMC_X86)
  explicit Arithmetic(Subnormals subnormals) : before_(_mm_getcsr()) {
    const unsigned to_nearest = before_ & ~(kZero | 0x6000u);
    _mm_setcsr(subnormals == Subnormals::kZero ? to_nearest | kZero : to_nearest);
  }
  ~Arithmetic() { _mm_setcsr(before_); }

 private:
  static constexpr unsigned kZero = 0x8040u;
  unsigned before_;
#elif defined(__aarch64__)
  explicit Arithmetic(Subnormals subnormals) {
    asm volatile("mrs %0, fpcr" : "=r"(before_));
    const std::uint64_t to_nearest = before_ & ~(kZero | std::uint64_t{3} << 22);
    set(subnormals == Subnormals::kZero ? to_nearest | kZero : to_nearest);
  }
  ~Arithmetic() { set(before_); }

 private:
  static constexpr std::uint64_t kZero = std::uint64_t{1} << 24;
  static void set(std::uint64_t fpcr) { asm volatile("msr fpcr, %0" : : "r"(fpcr)); }
  std::uint64_t before_;
#else
#error "set how subnormal numbers are treated on this processor"
#endif
};

void require(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}

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
  const int most = 120 - format.bias() - static_cast<int>(format.mantissa_bits);
  require(exponent >= std::min(format.top_exponent() - 127, 0) && exponent <= std::max(most, 0),
          "exponent out of range");
  require(format.exponent_bits < 8 || exponent == 0, "eight exponent bits take no scaling");
}

// One part as Python gives it, checked against the values that it stands for.
struct Part {
  const std::uint32_t* words;
  Format format;
  float scale, offset;

  Part(const InWords& words_, unsigned e, unsigned m, float scale_, float offset_, const OutValues& out)
      : words(unsigned_words(words_.data())), format(checked_format(e, m)), scale(scale_), offset(offset_) {
    check_words(words_.size(), out.size(), format);
    check_apart(words_, out);
  }

  Packed from(std::size_t value) const { return {words + at_word(value, format), format, scale, offset}; }
};

// Calls run(at, count) for each chunk of n values, without the GIL.
template <class Run>
void in_chunks(std::size_t n, unsigned threads, const Run& run, Subnormals subnormals = Subnormals::kKept) {
  const nb::gil_scoped_release release;
  for_each_chunk(n, threads, [&](std::size_t chunk) {
    const Arithmetic arithmetic(subnormals);
    const std::size_t at = chunk * kChunk;
    run(at, std::min(kChunk, n - at));
  });
}

void decode(const InWords& words, unsigned e, unsigned m, float scale, float offset, const OutValues& out,
            unsigned threads) {
  const Part part(words, e, m, scale, offset, out);
  in_chunks(out.size(), threads, [&](std::size_t at, std::size_t count) {
    current()->decode(part.from(at), nullptr, out.data() + at, count, out.size() >= kStreamingValues);
  });
}

void decode_sum(const InWords& words, unsigned e, unsigned m, float scale, float offset, const InWords& update_words,
                unsigned update_e, unsigned update_m, float update_scale, float update_offset, const OutValues& out,
                unsigned threads) {
  const Part base(words, e, m, scale, offset, out);
  const Part update(update_words, update_e, update_m, update_scale, update_offset, out);
  in_chunks(out.size(), threads, [&](std::size_t at, std::size_t count) {
    const Packed change = update.from(at);
    current()->decode(base.from(at), &change, out.data() + at, count, out.size() >= kStreamingValues);
  });
}

void decode_add(const InWords& words, unsigned e, unsigned m, float scale, float offset, float weight,
                const OutValues& out, unsigned threads) {
  const Part part(words, e, m, scale, offset, out);
  in_chunks(out.size(), threads, [&](std::size_t at, std::size_t count) {
    current()->decode_add(part.from(at), nullptr, weight, out.data() + at, count);
  });
}

void decode_add_difference(const InWords& words, unsigned e, unsigned m, float scale, float offset,
                           const InWords& less_words, unsigned less_e, unsigned less_m, float less_scale,
                           float less_offset, float weight, const OutValues& out, unsigned threads) {
  const Part part(words, e, m, scale, offset, out);
  const Part less(less_words, less_e, less_m, less_scale, less_offset, out);
  in_chunks(out.size(), threads, [&](std::size_t at, std::size_t count) {
    const Packed subtracted = less.from(at);
    current()->decode_add(part.from(at), &subtracted, weight, out.data() + at, count);
  });
}

void add_difference(const InValues& values, const InValues& less, float weight, const OutValues& out,
                    unsigned threads) {
  require(values.size() == out.size() && less.size() == out.size(), "values, less and out must have one size");
  check_apart(values, out);
  check_apart(less, out);
  in_chunks(out.size(), threads, [&](std::size_t at, std::size_t count) {
    current()->add_difference(values.data() + at, less.data() + at, weight, out.data() + at, count);
  });
}

void check_sums(const OutSums& sums, std::size_t n) {
  require(sums.shape(0) == 0 || (sums.shape(0) == (n + kChunk - 1) / kChunk && sums.shape(1) == kSums),
          "sums must have a row of five for each chunk, or none");
}

template <class Run>
std::uint32_t over_chunks(std::size_t n, unsigned threads, Format format, const OutSums& sums, const Rounding& rounding,
                          const Run& run) {
  std::vector<std::uint32_t> largest((n + kChunk - 1) / kChunk);
  const auto over_chunk = [&](std::size_t at, std::size_t count) {
    const std::size_t chunk = at / kChunk;
    Rounding here = rounding;
    here.start += at;
    Found found{sums.shape(0) ? sums.data() + chunk * kSums : nullptr, 0};
    run(at, count, here, found);
    largest[chunk] = found.largest;
  };
  in_chunks(n, threads, over_chunk, format.exponent_bits == 8 ? Subnormals::kKept : Subnormals::kZero);
  std::uint32_t result = 0;
  for (const std::uint32_t some : largest) result = std::max(result, some);
  return result;
}

std::uint32_t encode(const InValues& values, unsigned e, unsigned m, int exponent, bool stochastic, std::uint64_t seed,
                     std::uint64_t start, const OutWords& words, const OutSums& sums, unsigned threads) {
  const Format format = checked_format(e, m);
  const std::size_t n = values.size();
  check_words(words.size(), n, format);
  check_exponent(exponent, format);
  check_sums(sums, n);
  check_apart(values, words);
  return over_chunks(n, threads, format, sums, {exponent, stochastic, seed, start},
                     [&](std::size_t at, std::size_t count, const Rounding& rounding, Found& found) {
                       current()->encode(values.data() + at, count, format, rounding,
                                         unsigned_words(words.data()) + at_word(at, format), found);
                     });
}

std::uint32_t update(const InWords& words, unsigned e, unsigned m, float scale, float offset, const InValues& gradient,
                     float alpha, int exponent, bool stochastic, std::uint64_t seed, const OutWords& out,
                     const OutSums& sums, unsigned threads) {
  const Format format = checked_format(e, m);
  const std::size_t n = gradient.size();
  check_words(words.size(), n, format);
  check_words(out.size(), n, format);
  check_exponent(exponent, format);
  check_sums(sums, n);
  check_apart(words, out);
  check_apart(gradient, out);
  return over_chunks(n, threads, format, sums, {exponent, stochastic, seed, 0},
                     [&](std::size_t at, std::size_t count, const Rounding& rounding, Found& found) {
                       const Packed packed{unsigned_words(words.data()) + at_word(at, format), format, scale, offset};
                       current()->update(packed, gradient.data() + at, alpha, count, rounding,
                                         unsigned_words(out.data()) + at_word(at, format), found);
                     });
}

std::uint32_t largest(const InValues& values, unsigned threads) {
  std::vector<std::uint32_t> found((values.size() + kChunk - 1) / kChunk);
  in_chunks(values.size(), threads, [&](std::size_t at, std::size_t count) {
    found[at / kChunk] = current()->largest(values.data() + at, count);
  });
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
  // Nothing is converted: an output that was copied first would be lost.
  module.def("decode", &fedomc::decode, "words"_a.noconvert(), "e"_a, "m"_a, "scale"_a, "offset"_a, "out"_a.noconvert(),
             "threads"_a);
  module.def("decode_sum", &fedomc::decode_sum, "words"_a.noconvert(), "e"_a, "m"_a, "scale"_a, "offset"_a,
             "update_words"_a.noconvert(), "update_e"_a, "update_m"_a, "update_scale"_a, "update_offset"_a,
             "out"_a.noconvert(), "threads"_a);
  module.def("decode_add", &fedomc::decode_add, "words"_a.noconvert(), "e"_a, "m"_a, "scale"_a, "offset"_a, "weight"_a,
             "out"_a.noconvert(), "threads"_a);
  module.def("decode_add_difference", &fedomc::decode_add_difference, "words"_a.noconvert(), "e"_a, "m"_a, "scale"_a,
             "offset"_a, "less_words"_a.noconvert(), "less_e"_a, "less_m"_a, "less_scale"_a, "less_offset"_a,
             "weight"_a, "out"_a.noconvert(), "threads"_a);
  module.def("add_difference", &fedomc::add_difference, "values"_a.noconvert(), "less"_a.noconvert(), "weight"_a,
             "out"_a.noconvert(), "threads"_a);
  module.def("encode", &fedomc::encode, "values"_a.noconvert(), "e"_a, "m"_a, "exponent"_a, "stochastic"_a, "seed"_a,
             "start"_a, "words"_a.noconvert(), "sums"_a.noconvert(), "threads"_a);
  module.def("update", &fedomc::update, "words"_a.noconvert(), "e"_a, "m"_a, "scale"_a, "offset"_a,
             "gradient"_a.noconvert(), "alpha"_a, "exponent"_a, "stochastic"_a, "seed"_a, "out"_a.noconvert(),
             "sums"_a.noconvert(), "threads"_a);
  module.def("largest", &fedomc::largest, "values"_a.noconvert(), "threads"_a);
  module.def("levels", &fedomc::levels, "Names of the instruction sets of this machine, the fastest last.");
  module.def("level", [] { return std::string(fedomc::current()->level); });
  module.def(
      "set_level", [](const std::string& name) { fedomc::current() = fedomc::find(name); }, "name"_a,
      "Use an instruction set; not while kernels run.");
  fedomc::current();  // an impossible FEDOMC_LEVEL fails here
}
