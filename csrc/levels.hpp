// The instruction sets of this machine, and the choice among them.
#pragma once

#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "kernels.hpp"

namespace fedomc {

// Returns the kernels that this processor runs, the fastest last.
inline std::vector<const Kernels*> available() {
  std::vector<const Kernels*> found{&baseline::kernels};
#if defined(FEDOMC_X86)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.push_back(&avx2::kernels);
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    found.push_back(&avx512::kernels);
#endif
  return found;
}

inline const Kernels* find(std::string_view level) {
  for (const Kernels* kernels : available())
    if (level == kernels->level) return kernels;
  std::string message = "instruction set '" + std::string(level) + "' is not available here: use";
  for (const Kernels* kernels : available()) message += std::string(" ") + kernels->level;
  throw std::invalid_argument(message);
}

}  // namespace fedomc
