// Iteration over the blocks of a chunk, and the block operations that the kernels of all methods share.
#pragma once

#include <cmath>
#include <cstring>

#include "layout.hpp"
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

// Copies a block with non-temporal stores, which do not read the overwritten memory into the caches first.
void stream(float* to, const Values& values) {
#if defined(__AVX512F__)
  for (std::size_t i = 0; i < kBlock; i += 16) _mm512_stream_ps(to + i, _mm512_loadu_ps(values.data() + i));
#elif defined(__AVX__)
  for (std::size_t i = 0; i < kBlock; i += 8) _mm256_stream_ps(to + i, _mm256_loadu_ps(values.data() + i));
#elif defined(FEDOMC_X86)
  for (std::size_t i = 0; i < kBlock; i += 4) _mm_stream_ps(to + i, _mm_loadu_ps(values.data() + i));
#else
  std::memcpy(to, values.data(), sizeof values);
#endif
}

void fence() {
#if defined(FEDOMC_X86)
  _mm_sfence();
#endif
}

// Decodes n values block by block; decode(block, count, to) must write a whole block's values to `to`.
template <class Decode>
void decode_chunk(float* out, std::size_t n, bool streaming, Decode decode) {
  streaming = streaming && reinterpret_cast<std::uintptr_t>(out) % 64 == 0;
  for_each_block(n, [&](std::size_t block, std::size_t at, std::size_t count) {
    if (count == kBlock && !streaming) {
      decode(block, count, out + at);
      return;
    }
    alignas(64) Values values;
    decode(block, count, values.data());
    if (count == kBlock) {
      stream(out + at, values);
    } else {
      std::memcpy(out + at, values.data(), count * sizeof(float));
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

// Adds alpha * gradient to a block of decoded values, pads it with zeros, and returns whether any value changed.
inline bool add_gradient(Values& values, const float* gradient, float alpha, std::size_t count) {
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
