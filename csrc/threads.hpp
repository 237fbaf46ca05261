// Parallel loops over chunks. [Note: no pool] Threads are started for each call and then joined. Work that is worth
// several threads takes far longer than starting them, and without a pool no idle threads compete with torch's own
// threads or are lost in a fork.
#pragma once

#include <atomic>
#include <cstddef>
#include <thread>
#include <vector>

#include "layout.hpp"

namespace fedomc {

constexpr std::size_t kChunksPerThread = 8;  // fewer do not justify another thread

// Calls body(chunk) for each chunk of n values.
template <class Body>
void for_each_chunk(std::size_t n, unsigned threads, const Body& body) {
  const std::size_t chunks = (n + kChunk - 1) / kChunk;
  const std::size_t useful = (chunks + kChunksPerThread - 1) / kChunksPerThread;
  const std::size_t workers = threads < useful ? threads : useful;
  std::atomic<std::size_t> next{0};
  const auto work = [&] {
    for (std::size_t chunk; (chunk = next.fetch_add(1, std::memory_order_relaxed)) < chunks;) body(chunk);
  };
  std::vector<std::thread> others;
  for (std::size_t i = 1; i < workers; ++i) {
    try {
      others.emplace_back(work);
    } catch (const std::exception&) {
      break;  // no more threads available: the others do the work
    }
  }
  work();
  for (std::thread& other : others) other.join();
}

}  // namespace fedomc
