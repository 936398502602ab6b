// SPDX-License-Identifier: Apache-2.0
// Work shared out to threads that live for one call.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace fastgrpo {

// body(begin, end) over [0, count) in pieces of `grain`, by at most `threads` threads; the first
// exception is thrown again here. What a piece computes must not depend on who runs it.
template <class Body>
void parallel_for(int64_t count, int64_t grain, int threads, const Body& body) {
  const int64_t pieces = (count + grain - 1) / grain;
  std::atomic<int64_t> next{0};
  std::exception_ptr failure;
  std::once_flag failed;
  const auto work = [&] {
    try {
      for (int64_t i; (i = next.fetch_add(1)) < pieces;) {
        body(i * grain, std::min(count, (i + 1) * grain));
      }
    } catch (...) {
      next = pieces;
      std::call_once(failed, [&] { failure = std::current_exception(); });
    }
  };
  std::vector<std::thread> helpers;
  const int64_t wanted = std::min<int64_t>(threads, pieces) - 1;
  try {
    for (int64_t i = 0; i < wanted; ++i) helpers.emplace_back(work);
  } catch (const std::system_error&) {
    // No more threads to be had: those there are do the work.
  }
  work();
  for (auto& helper : helpers) helper.join();
  if (failure) std::rethrow_exception(failure);
}

}  // namespace fastgrpo
