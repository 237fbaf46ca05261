// The kernels of one instruction set. Each processes one chunk: at most kChunk values, starting at a block boundary.
#pragma once

#include "layout.hpp"

namespace fedomc {

struct Kernels {
  const char* level;
  // Decodes base, plus update if it is not null; streaming uses non-temporal stores.
  void (*decode)(const Packed& base, const Packed* update, const DenseRoom& out, std::size_t n, bool streaming);
  // Adds weight * (decoded - subtrahend) to out, or weight * decoded if subtrahend is null.
  void (*decode_add)(const Packed& packed, const Packed* subtrahend, float weight, float* out, std::size_t n);
  // Adds weight * (values - subtrahend) to out.
  void (*add_difference)(const float* values, const float* subtrahend, float weight, float* out, std::size_t n);
  void (*encode)(const float* values, std::size_t n, Format format, const Rounding& rounding, std::uint32_t* words,
                 Found& found);
  // Encodes codes + ratio * gradient, in the units of the working bias.
  void (*update)(const Packed& packed, const Dense& gradient, float ratio, std::size_t n, const Rounding& rounding,
                 std::uint32_t* words, Found& found);
  std::uint32_t (*largest)(const Dense& values, std::size_t n);
  void (*block_decode)(const BlockPacked& packed, const Element& element, const DenseRoom& out, std::size_t n,
                       bool streaming);
  void (*block_decode_sum)(const BlockPacked& base, const Element& element, const BlockPacked& update,
                           const Element& update_element, const DenseRoom& out, std::size_t n, bool streaming);
  void (*block_encode)(const float* values, std::size_t n, const Element& element, const Rounding& rounding,
                       const BlockRoom& room, Found& found);
  void (*block_update)(const BlockPacked& packed, const Dense& gradient, float alpha, std::size_t n,
                       const Element& element, const Rounding& rounding, const BlockRoom& room, Found& found);
  void (*rotated_decode)(const std::uint32_t* words, const float* scales, const Rotation& rotation,
                         const DenseRoom& out, std::size_t n, bool streaming);
  void (*rotated_encode)(const float* values, std::size_t n, const Rotation& rotation, std::uint32_t* words,
                         float* scales);
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
