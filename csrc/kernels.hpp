// The kernels of one instruction set, each over one chunk: at most kChunk values that begin at a block.
#pragma once

#include "layout.hpp"

namespace fedomc {

struct Kernels {
  const char* level;
  // Decodes base, and update on top of it if not null; streaming writes past the caches.
  void (*decode)(const Packed& base, const Packed* update, float* out, std::size_t n, bool streaming);
  // Adds weight * (decoded - subtrahend), and weight * decoded if subtrahend is null.
  void (*decode_add)(const Packed& packed, const Packed* subtrahend, float weight, float* out, std::size_t n);
  // Adds weight * (values - subtrahend).
  void (*add_difference)(const float* values, const float* subtrahend, float weight, float* out, std::size_t n);
  void (*encode)(const float* values, std::size_t n, Format format, const Rounding& rounding, std::uint32_t* words,
                 Found& found);
  // Encodes codes + ratio * gradient, all in the units in which values are rounded.
  void (*update)(const Packed& packed, const float* gradient, float ratio, std::size_t n, const Rounding& rounding,
                 std::uint32_t* words, Found& found);
  std::uint32_t (*largest)(const float* values, std::size_t n);
  void (*block_decode)(const BlockPacked& packed, const Element& element, float* out, std::size_t n, bool streaming);
  void (*block_encode)(const float* values, std::size_t n, const Element& element, const Rounding& rounding,
                       const BlockRoom& room, Found& found);
  void (*block_update)(const BlockPacked& packed, const float* gradient, float alpha, std::size_t n,
                       const Element& element, const Rounding& rounding, const BlockRoom& room, Found& found);
};

namespace baseline {
extern const Kernels kernels;
}
#if defined(FEDOMC_X86)
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
#endif

}  // namespace fedomc
