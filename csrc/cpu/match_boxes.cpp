// SPDX-License-Identifier: Apache-2.0
#include <vector>

#include "../params.h"
#include "../shared/assignment.h"
#include "../shared/greedy.h"
#include "parallel.h"
#include "simd.h"

namespace fastgrpo {

template <class Score>
static void match_samples(const MatchParams<Score>& p, int64_t begin, int64_t end) {
  run_best([&](auto) __attribute__((always_inline)) {
    std::vector<double> cost, space;
    for (int64_t k = begin; k < end; ++k) {
      const int64_t rows = p.a_start[k + 1] - p.a_start[k], cols = p.b_start[k + 1] - p.b_start[k];
      const int64_t at = p.offsets[k];
      const Pairs<Score> pairs{p.scores + at, p.mask ? p.mask + at : nullptr, p.threshold,
                               int(rows), int(cols)};
      int64_t* column = p.column + p.a_start[k];
      const int64_t n = std::min(rows, cols), m = std::max(rows, cols);
      const int64_t bytes = p.method == kOptimal ? AssignmentSpace::bytes(n, m)
                                                 : GreedySpace::bytes(rows, cols);
      if (int64_t(space.size()) * 8 < bytes) space.resize(bytes / 8 + 1);
      if (p.method == kOptimal) {
        if (int64_t(cost.size()) < rows * cols) cost.resize(rows * cols);
        match_optimal(Serial{}, pairs, cost.data(), space.data(), column);
      } else if (p.method == kGreedy) {
        match_greedy(Serial{}, pairs, space.data(), column);
      } else {
        match_greedy_rows(Serial{}, pairs, space.data(), column);
      }
    }
  });
}

template <class Score>
void match_boxes(const MatchParams<Score>& p, int threads) {
  // A thread costs about 20 us to start: worth it from some ten thousand pairs on.
  const int64_t pairs = p.samples ? p.offsets[p.samples] : 0;
  parallel_for(p.samples, 8, pairs < 16384 ? 1 : threads,
               [&](int64_t begin, int64_t end) { match_samples(p, begin, end); });
}

template void match_boxes(const MatchParams<float>&, int);
template void match_boxes(const MatchParams<double>&, int);

}  // namespace fastgrpo
