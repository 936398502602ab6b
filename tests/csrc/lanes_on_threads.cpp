// SPDX-License-Identifier: Apache-2.0
// The shared algorithms with one host thread per lane and a barrier where a warp would synchronise,
// compared with the serial ones. Built with ThreadSanitizer it also reports every pair of accesses
// that a GPU could reorder: a missing sync is an error here. Working memory has exactly the size the
// launchers give it, so that AddressSanitizer sees a step outside.
#include <pthread.h>

#include <atomic>
#include <cstdio>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "shared/assignment.h"
#include "shared/average_precision.h"
#include "shared/greedy.h"

using namespace fastgrpo;

constexpr int kLanes = 8;

#if defined(__SANITIZE_THREAD__)
extern "C" void AnnotateIgnoreSyncBegin(const char*, int);
extern "C" void AnnotateIgnoreSyncEnd(const char*, int);
#else
static void AnnotateIgnoreSyncBegin(const char*, int) {}
static void AnnotateIgnoreSyncEnd(const char*, int) {}
#endif

struct Team {
  pthread_barrier_t barrier;
  std::atomic<double> reals[kLanes];
  std::atomic<int> ints[kLanes];
  Team() { pthread_barrier_init(&barrier, nullptr, kLanes); }
  ~Team() { pthread_barrier_destroy(&barrier); }
};

struct Lane {
  int lane;
  Team* team;
  static constexpr int lanes = kLanes;
  void sync() const { pthread_barrier_wait(&team->barrier); }
  // As a shuffle on a GPU, a minimum orders no other memory access: the sanitizer must not take the
  // barriers in here for a sync.
  template <class T>
  T least_of(std::atomic<T>* slots, T x) const {
    AnnotateIgnoreSyncBegin(__FILE__, __LINE__);
    slots[lane].store(x, std::memory_order_relaxed);
    sync();
    T best = slots[0].load(std::memory_order_relaxed);
    for (int i = 1; i < kLanes; ++i) {
      const T other = slots[i].load(std::memory_order_relaxed);
      best = other < best ? other : best;
    }
    sync();
    AnnotateIgnoreSyncEnd(__FILE__, __LINE__);
    return best;
  }
  double min(double x) const { return least_of(team->reals, x); }
  int min(int x) const { return least_of(team->ints, x); }
};

template <class Body>
void on_lanes(const Body& body) {
  Team team;
  std::vector<std::thread> threads;
  for (int i = 0; i < kLanes; ++i) threads.emplace_back([&, i] { body(Lane{i, &team}); });
  for (auto& thread : threads) thread.join();
}

int main() {
  std::mt19937 random(0);
  std::uniform_real_distribution<double> uniform;
  const auto upto = [&](int n) { return int(random() % (n + 1)); };
  int failures = 0;
  for (int trial = 0; trial < 40; ++trial) {
    const int rows = upto(12), cols = upto(12);
    std::vector<double> scores(rows * cols), cost(rows * cols), confidence(rows);
    std::vector<uint8_t> mask(rows * cols);
    for (auto& c : confidence) c = upto(3);
    for (auto& s : scores) s = trial % 2 ? uniform(random) : upto(3);
    for (auto& m : mask) m = upto(3) > 0;
    const Pairs<double> pairs{scores.data(), trial % 3 ? mask.data() : nullptr,
                              trial % 5 ? -HUGE_VAL : 0.5, rows, cols};
    for (int method = 0; method < 3; ++method) {
      const int64_t bytes = method ? GreedySpace::bytes(rows, cols)
                                   : AssignmentSpace::bytes(std::min(rows, cols),
                                                            std::max(rows, cols));
      const auto space = std::make_unique<double[]>((bytes + 7) / 8);
      std::vector<int64_t> serial(rows, -7), lanes(rows, -7);
      const auto match = [&](const auto& g, int64_t* column) {
        if (method == 0) match_optimal(g, pairs, cost.data(), space.get(), column);
        if (method == 1) match_greedy(g, pairs, space.get(), column);
        if (method == 2) match_greedy_rows(g, pairs, space.get(), column);
      };
      match(Serial{}, serial.data());
      on_lanes([&](const Lane& g) { match(g, lanes.data()); });
      failures += serial != lanes;
    }
    std::vector<Box<double>> boxes(rows + cols);
    std::vector<int64_t> labels(rows + cols);
    for (auto& b : boxes) {
      b = {double(upto(9)), double(upto(9)), 0, 0};
      b.x2 = b.x1 + upto(9);
      b.y2 = b.y1 + upto(9);
    }
    for (auto& l : labels) l = upto(2);
    std::vector<double> thresholds{0.1, 0.5, 0.75};
    const ApSample sample{boxes.data(), labels.data(), confidence.data(), boxes.data() + rows,
                          labels.data() + rows, rows, cols, thresholds.data(), 3, 5,
                          trial % 2 == 0, 4.0, 50.0};
    std::vector<double> serial(3), lanes(3);
    const auto space = std::make_unique<double[]>(ApSpace::bytes(rows, cols, 5, 3) / 8);
    average_precision(Serial{}, sample, space.get(), serial.data());
    on_lanes([&](const Lane& g) { average_precision(g, sample, space.get(), lanes.data()); });
    failures += serial != lanes;
  }
  std::printf("%d failures\n", failures);
  return failures != 0;
}
