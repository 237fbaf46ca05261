// The floating-point mode of the kernels: rounding to nearest, with subnormals either kept or treated as zero.
//
// Kernels set the mode themselves, regardless of torch.set_flush_denormal, so that results do not depend on the thread.

#pragma once

#include <cstdint>

#if defined(FEDOMC_X86)
#include <immintrin.h>
#endif

namespace fedomc {

enum class Subnormals { kKept, kZero };

// Sets the thread's rounding mode and treatment of subnormals for the lifetime of the object (RAII).
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

}  // namespace fedomc
