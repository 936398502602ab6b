// SPDX-License-Identifier: Apache-2.0
// Greedy matchings: repeatedly the best remaining pair, or row after row its best remaining column.
#pragma once

#include "pairs.h"

namespace fastgrpo {

struct GreedySpace {
  double* best;    // (rows) best remaining score of the row
  int* best_col;   // (rows) its column, -1 when the row is matched or has none
  uint8_t* taken;  // (cols)

  static constexpr int64_t bytes(int64_t rows, int64_t cols) { return 12 * rows + cols; }
  FG_HD GreedySpace(void* memory, int rows) {
    best = static_cast<double*>(memory);
    best_col = reinterpret_cast<int*>(best + rows);
    taken = reinterpret_cast<uint8_t*>(best_col + rows);
  }
};

// The best free allowed column of a row among those of one lane: the lowest of equal ones.
template <class Score>
FG_HD int best_free(const Pairs<Score>& pairs, const uint8_t* taken, int row, int first, int step,
                    double& best) {
  int col = -1;
  best = -HUGE_VAL;
  for (int j = first; j < pairs.cols; j += step) {
    const int64_t k = int64_t(row) * pairs.cols + j;
    if (!taken[j] && pairs.allowed(k) && pairs.score(k) > best) {
      best = pairs.score(k);
      col = j;
    }
  }
  return col;
}

template <class Lanes, class Score>
FG_HD void match_greedy(const Lanes& g, const Pairs<Score>& pairs, void* memory, int64_t* column) {
  const GreedySpace s(memory, pairs.rows);
  for (int j = g.lane; j < pairs.cols; j += g.lanes) s.taken[j] = 0;
  g.sync();
  for (int i = g.lane; i < pairs.rows; i += g.lanes) {
    column[i] = -1;
    s.best_col[i] = best_free(pairs, s.taken, i, 0, 1, s.best[i]);
  }
  g.sync();
  while (true) {
    double minus_best = HUGE_VAL;
    int row = pairs.rows;
    for (int i = g.lane; i < pairs.rows; i += g.lanes) {
      if (s.best_col[i] >= 0 && -s.best[i] < minus_best) {
        minus_best = -s.best[i];
        row = i;
      }
    }
    const double of_all = g.min(minus_best);
    row = g.min(minus_best == of_all ? row : pairs.rows);
    if (row == pairs.rows) return;
    const int col = s.best_col[row];
    g.sync();
    if (g.lane == 0) {
      column[row] = col;
      s.best_col[row] = -1;
      s.taken[col] = 1;
    }
    g.sync();
    for (int i = g.lane; i < pairs.rows; i += g.lanes) {
      if (s.best_col[i] == col) s.best_col[i] = best_free(pairs, s.taken, i, 0, 1, s.best[i]);
    }
    g.sync();
  }
}

template <class Lanes, class Score>
FG_HD void match_greedy_rows(const Lanes& g, const Pairs<Score>& pairs, void* memory,
                             int64_t* column) {
  uint8_t* taken = static_cast<uint8_t*>(memory);
  for (int j = g.lane; j < pairs.cols; j += g.lanes) taken[j] = 0;
  g.sync();
  for (int i = 0; i < pairs.rows; ++i) {
    double best;
    int col = best_free(pairs, taken, i, g.lane, g.lanes, best);
    const double minus_best = g.min(col < 0 ? HUGE_VAL : -best);
    col = g.min(col >= 0 && -best == minus_best ? col : pairs.cols);
    g.sync();
    if (g.lane == 0) {
      column[i] = col < pairs.cols ? col : -1;
      if (col < pairs.cols) taken[col] = 1;
    }
    g.sync();
  }
}

}  // namespace fastgrpo
