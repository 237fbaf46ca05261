// Iteration over the blocks of a chunk, and the block operations that the kernels of all methods share.
#pragma once

#include <cmath>
#include <cstring>

#include "layout.hpp"
#include "narrow.hpp"
#include "packing.hpp"
#include "vectors.hpp"

namespace fedomc::FEDOMC_LEVEL {
namespace {

std::uint32_t largest_lane(U v) {
  std::uint32_t largest = 0;
  for (std::size_t lane = 0; lane < kWidth; ++lane) largest = largest > v[lane] ? largest : v[lane];
  return largest;
}

template <class Body>
inline void for_each_block(std::size_t n, Body body) {
  for (std::size_t block = 0, at = 0; at < n; ++block, at += kBlock) body(block, at, n - at < kBlock ? n - at : kBlock);
}

// Copies a block of `size` bytes, a multiple of 64, with non-temporal stores, which do not read the overwritten memory
// into the caches first.
void stream(void* to, const void* from, std::size_t size) {
#if defined(FEDOMC_X86)
  auto* target = static_cast<float*>(to);
  const auto* source = static_cast<const float*>(from);
  for (std::size_t i = 0; i < size / sizeof(float); i += kWidth) {
#if defined(__AVX512F__)
    _mm512_stream_ps(target + i, _mm512_loadu_ps(source + i));
#elif defined(__AVX__)
    _mm256_stream_ps(target + i, _mm256_loadu_ps(source + i));
#else
    _mm_stream_ps(target + i, _mm_loadu_ps(source + i));
#endif
  }
#else
  std::memcpy(to, from, size);
#endif
}

void fence() {
#if defined(FEDOMC_X86)
  _mm_sfence();
#endif
}

// Decodes n values block by block; decode(block, count, to) must write a whole block's float32 values to `to`.
template <class Decode>
void decode_chunk(const DenseRoom& out, std::size_t n, bool streaming, Decode decode) {
  const std::size_t size = size_of(out.dtype);
  streaming = streaming && reinterpret_cast<std::uintptr_t>(out.data) % 64 == 0;
  for_each_block(n, [&](std::size_t block, std::size_t at, std::size_t count) {
    void* to = out.from(at).data;
    const bool direct = count == kBlock && !streaming, wide = out.dtype == Dtype::kFloat32;
    if (wide && direct) return decode(block, count, static_cast<float*>(to));
    alignas(64) Values values;
    alignas(64) Narrow narrowed;
    decode(block, count, values.data());
    if (!wide) narrow(values, count, out.dtype, direct ? static_cast<std::uint16_t*>(to) : narrowed.data());
    if (direct) return;
    const void* from = wide ? static_cast<const void*>(values.data()) : narrowed.data();
    if (count == kBlock) {
      stream(to, from, kBlock * size);
    } else {
      std::memcpy(to, from, count * size);
    }
  });
  if (streaming) fence();
}

// Returns a whole block of values; a partial block is copied to `room` and padded with zeros.
inline const float* padded(const float* values, std::size_t count, Values& room) {
  if (count == kBlock) return values;
  room.fill(0.0f);
  std::memcpy(room.data(), values, count * sizeof(float));
  return room.data();
}

// Adds alpha times the gradient from value `at` on to a block of decoded values, pads it with zeros, and returns
// whether any value changed.
inline bool add_gradient(Values& values, const Dense& gradients, std::size_t at, float alpha, std::size_t count) {
  alignas(64) Values room;
  const float* gradient = widened(gradients, at, count, room);
  I changed{};
  std::size_t i = 0;
  for (; i + kWidth <= count; i += kWidth) {
    const F former = load<F>(values.data() + i);
    const F sum = fused(splat(alpha), load<F>(gradient + i), former);
    changed |= sum != former;
    store(values.data() + i, sum);
  }
  bool result = largest_lane(cast<U>(changed)) != 0;
  for (; i < count; ++i) {
    const float sum = std::fma(alpha, gradient[i], values[i]);
    result |= sum != values[i];
    values[i] = sum;
  }
  for (; i < kBlock; ++i) values[i] = 0.0f;
  return result;
}

}  // namespace
}  // namespace fedomc::FEDOMC_LEVEL
