// Vectors of FEDOMC_VECTOR_BYTES bytes, by the types of GCC and Clang; see the note in kernels.cpp.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(FEDOMC_X86)
#include <immintrin.h>
#endif

// Internal to each instruction set: the same names mean other instructions there.
namespace fedomc::FEDOMC_LEVEL {
namespace {

constexpr std::size_t kBytes = FEDOMC_VECTOR_BYTES;
constexpr std::size_t kWidth = kBytes / 4;  // lanes of a vector

using U = std::uint32_t __attribute__((vector_size(kBytes)));
using I = std::int32_t __attribute__((vector_size(kBytes)));
using F = float __attribute__((vector_size(kBytes)));
using H = float __attribute__((vector_size(kBytes / 2)));
using D = double __attribute__((vector_size(kBytes)));

template <class To, class From>
inline To cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

template <class V>
inline V load(const void* from) {
  V v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

template <class V>
inline void store(void* to, const V& v) {
  std::memcpy(to, &v, sizeof v);
}

inline U splat(std::uint32_t x) { return U{} + x; }
inline F splat(float x) { return F{} + x; }
// All that is compared is below 2**31, and there are instructions for signed comparison everywhere.
inline I below(U a, U b) { return cast<I>(a) < cast<I>(b); }
inline U min(U a, U b) { return below(a, b) ? a : b; }
inline U max(U a, U b) { return below(a, b) ? b : a; }

// A shift that is the same for all lanes: a vector of counts where there is an instruction for that, which is faster.
#if defined(__AVX2__)
using Count = U;
inline Count count(int shift) { return splat(static_cast<std::uint32_t>(shift)); }
#else
using Count = int;
inline Count count(int shift) { return shift; }
#endif

inline D widen(H v) {
#if defined(__AVX512F__)
  return cast<D>(_mm512_maskz_cvtps_pd(0xFF, cast<__m256>(v)));
#elif defined(__AVX__)
  return cast<D>(_mm256_cvtps_pd(cast<__m128>(v)));
#else
  return __builtin_convertvector(v, D);
#endif
}

// sum + a * b. The product of two widened floats is exact, so that fusing it changes nothing.
inline D add_product(D sum, D a, D b) {
#if defined(__AVX512F__)
  return cast<D>(_mm512_fmadd_pd(cast<__m512d>(a), cast<__m512d>(b), cast<__m512d>(sum)));
#elif defined(__FMA__)
  return cast<D>(_mm256_fmadd_pd(cast<__m256d>(a), cast<__m256d>(b), cast<__m256d>(sum)));
#else
  return sum + a * b;
#endif
}

// a * b + c, rounded once, as the in-place addition of torch does it.
inline F fused(F a, F b, F c) {
#if defined(__AVX512F__)
  return cast<F>(_mm512_fmadd_ps(cast<__m512>(a), cast<__m512>(b), cast<__m512>(c)));
#elif defined(__FMA__)
  return cast<F>(_mm256_fmadd_ps(cast<__m256>(a), cast<__m256>(b), cast<__m256>(c)));
#else
  for (std::size_t lane = 0; lane < kWidth; ++lane) c[lane] = std::fma(a[lane], b[lane], c[lane]);
  return c;
#endif
}

// 2**exponent, for exponents of normal floats.
inline float power_of_two(int exponent) { return cast<float>(static_cast<std::uint32_t>(exponent + 127) << 23); }

}  // namespace
}  // namespace fedomc::FEDOMC_LEVEL
