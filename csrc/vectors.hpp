// Vectors of FEDOMC_VECTOR_BYTES bytes, using the vector types of GCC and Clang; see the note in kernels.cpp.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(FEDOMC_X86)
#include <immintrin.h>
#endif

// Internal linkage: the same names stand for different instructions in each instruction set.
namespace fedomc::FEDOMC_LEVEL {
namespace {

constexpr std::size_t kBytes = FEDOMC_VECTOR_BYTES;
constexpr std::size_t kWidth = kBytes / 4;              // lanes of a vector
constexpr std::size_t kColumns = kBytes == 64 ? 2 : 1;  // number of vectors whose sums fit into registers

constexpr std::uint32_t kSign = 1u << 31, kExponent = 0x7F800000u, kOneExponent = 1u << 23;  // float32 bits

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
inline F splat(float x) { return x - F{}; }  // a sum would turn -0 into 0
// All compared values are below 2**31, and every instruction set has signed comparisons.
inline I below(U a, U b) { return cast<I>(a) < cast<I>(b); }

// Minimum and maximum, of integers below 2**31. The compiler does not find the dedicated instructions by itself.
#if defined(__AVX512F__)
inline U min(U a, U b) { return cast<U>(_mm512_min_epu32(cast<__m512i>(a), cast<__m512i>(b))); }
inline U max(U a, U b) { return cast<U>(_mm512_max_epu32(cast<__m512i>(a), cast<__m512i>(b))); }
inline F min(F a, F b) { return cast<F>(_mm512_min_ps(cast<__m512>(a), cast<__m512>(b))); }
#elif defined(__AVX2__)
inline U min(U a, U b) { return cast<U>(_mm256_min_epu32(cast<__m256i>(a), cast<__m256i>(b))); }
inline U max(U a, U b) { return cast<U>(_mm256_max_epu32(cast<__m256i>(a), cast<__m256i>(b))); }
inline F min(F a, F b) { return cast<F>(_mm256_min_ps(cast<__m256>(a), cast<__m256>(b))); }
#else
inline U min(U a, U b) { return below(a, b) ? a : b; }
inline U max(U a, U b) { return below(a, b) ? b : a; }
inline F min(F a, F b) { return a < b ? a : b; }
#endif

// A shift count for all lanes: a vector where the instruction set has per-lane shifts, which are faster.
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

// a * b + c with a single rounding, like torch's in-place addition.
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

// 2**exponent, for the exponents of normal floats.
inline float power_of_two(int exponent) { return cast<float>(static_cast<std::uint32_t>(exponent + 127) << 23); }

}  // namespace
}  // namespace fedomc::FEDOMC_LEVEL
