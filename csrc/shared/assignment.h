// SPDX-License-Identifier: Apache-2.0
// Optimal assignment by shortest augmenting paths with column potentials (Jonker and Volgenant,
// 1987), for n rows <= m columns; every row ends up assigned.
//
// Invariant: cost(i, j) - v[j] is smallest, over j, at the column that row i holds, and v[j] = 0 for
// a column nobody holds. Row potentials follow from these two and are not stored.
#pragma once

#include "pairs.h"

namespace fastgrpo {

constexpr double kInfinity = HUGE_VAL;

struct AssignmentSpace {
  double* v;     // (m) column potentials
  double* w;     // (m) v where the column is open in the current search, -inf where it is closed
  double* key;   // (m) tentative distance of open columns, inf for closed ones
  double* dist;  // (m) final distance of closed columns
  int* from;     // (m) row from which the tentative distance came
  int* row_of;   // (m) row that holds the column, or -1
  int* col_of;   // (n) column that the row holds, or -1
  int* queue;    // (n) rows still to assign

  static constexpr int64_t bytes(int64_t n, int64_t m) { return 40 * m + 8 * n; }
  FG_HD AssignmentSpace(void* memory, int n, int m) {
    v = static_cast<double*>(memory);
    w = v + m;
    key = w + m;
    dist = key + m;
    from = reinterpret_cast<int*>(dist + m);
    row_of = from + m;
    col_of = row_of + m;
    queue = col_of + n;
  }
};

// cost (n, m), n <= m: minus the score, transposed when there are more rows than columns. A pair that
// may not be matched costs more than any choice among the others can save, so the cheapest
// assignment uses as few of them as possible. Returns whether any pair may be matched.
template <class Lanes, class Score>
FG_HD bool fill_cost(const Lanes& g, const Pairs<Score>& pairs, double* cost) {
  const bool flip = pairs.rows > pairs.cols;
  const int64_t total = int64_t(pairs.rows) * pairs.cols;
  double low = kInfinity, minus_high = kInfinity;
  for (int64_t k = g.lane; k < total; k += g.lanes) {
    const bool allowed = pairs.allowed(k);
    const double c = -pairs.score(k);
    low = allowed && c < low ? c : low;
    minus_high = allowed && -c < minus_high ? -c : minus_high;
  }
  low = g.min(low);
  const double high = -g.min(minus_high);
  const int n = flip ? pairs.cols : pairs.rows;
  const double forbidden = high + (n + 1) * (high - low) + 1;
  for (int i = 0; i < pairs.rows; ++i) {
    for (int j = g.lane; j < pairs.cols; j += g.lanes) {
      const int64_t k = int64_t(i) * pairs.cols + j;
      const int64_t to = flip ? int64_t(j) * pairs.rows + i : k;
      cost[to] = pairs.allowed(k) ? -pairs.score(k) : forbidden;
    }
  }
  g.sync();
  return low < kInfinity;
}

// The smallest cost - v of a row, its column, and the smallest of the other columns.
struct TwoBest {
  double first, second;
  int col;
};

template <class Lanes>
FG_HD TwoBest two_best(const Lanes& g, const double* cost, const double* v, int m) {
  double first = kInfinity, second = kInfinity;
  FG_SIMD_MIN(first)
  for (int j = g.lane; j < m; j += g.lanes) {
    const double d = cost[j] - v[j];
    first = d < first ? d : first;
  }
  first = g.min(first);
  int col = m;
  FG_SIMD_MIN(col)
  for (int j = g.lane; j < m; j += g.lanes) {
    const int mine = cost[j] - v[j] == first ? j : m;
    col = mine < col ? mine : col;
  }
  col = g.min(col);
  FG_SIMD_MIN(second)
  for (int j = g.lane; j < m; j += g.lanes) {
    const double d = cost[j] - v[j];
    const double other = j == col ? kInfinity : d;
    second = other < second ? other : second;
  }
  return {first, g.min(second), col};
}

// Rows bid for their best column and lower its potential by their advantage; whoever held it goes
// back to the queue. Cheap, and it leaves few rows to the searches. Returns how many, in the queue.
template <class Lanes>
FG_HD int bid(const Lanes& g, const double* cost, int n, int m, const AssignmentSpace& s) {
  int waiting = 0, next = 0, budget = 3 * n;  // ties can bounce a column between two rows for long
  int row = 0;
  while (true) {
    const TwoBest best = two_best(g, cost + int64_t(row) * m, s.v, m);
    const int loser = s.row_of[best.col];
    const double gain = m > 1 ? best.second - best.first : 0.0;
    const bool keep = loser >= 0 && (gain == 0.0 || budget == 0);
    g.sync();  // every lane has read v and row_of
    if (g.lane == 0 && !keep) {
      s.v[best.col] -= gain;
      s.row_of[best.col] = row;
      s.col_of[row] = best.col;
      if (loser >= 0) s.col_of[loser] = -1;
    }
    if (g.lane == 0 && keep) s.queue[waiting] = row;
    g.sync();
    waiting += keep;
    row = keep || loser < 0 ? ++next : loser;
    budget -= budget > 0;
    if (row >= n) return waiting;
  }
}

// Dijkstra over columns from an unassigned row to a column nobody holds; then the rows on the path
// move over by one column.
template <class Lanes>
FG_HD void augment(const Lanes& g, const double* cost, int m, int start, const AssignmentSpace& s) {
  for (int j = g.lane; j < m; j += g.lanes) {
    s.w[j] = s.v[j];
    s.key[j] = kInfinity;
    s.dist[j] = kInfinity;
  }
  g.sync();
  int row = start, col;
  double base = 0.0, reached;
  while (true) {
    const double* row_cost = cost + int64_t(row) * m;
    reached = kInfinity;
    FG_SIMD_MIN(reached)
    for (int j = g.lane; j < m; j += g.lanes) {
      const double d = row_cost[j] - s.w[j] + base;
      const bool shorter = d < s.key[j];
      const double key = shorter ? d : s.key[j];
      s.key[j] = key;
      s.from[j] = shorter ? row : s.from[j];
      reached = key < reached ? key : reached;
    }
    reached = g.min(reached);
    col = 2 * m;  // of the nearest columns one that nobody holds, if there is one
    FG_SIMD_MIN(col)
    for (int j = g.lane; j < m; j += g.lanes) {
      const int order = s.row_of[j] < 0 ? j : j + m;
      const int mine = s.key[j] == reached ? order : 2 * m;
      col = mine < col ? mine : col;
    }
    col = g.min(col);
    if (col < m) break;
    col -= m;
    row = s.row_of[col];
    base = reached - (cost[int64_t(row) * m + col] - s.v[col]);
    g.sync();
    if (g.lane == 0) {
      s.dist[col] = reached;
      s.key[col] = kInfinity;
      s.w[col] = -kInfinity;
    }
    g.sync();
  }
  g.sync();
  for (int j = g.lane; j < m; j += g.lanes) s.v[j] += fmin(s.dist[j] - reached, 0.0);
  if (g.lane == 0) {
    for (int held = col; held >= 0;) {
      const int mover = s.from[held];
      const int left = s.col_of[mover];
      s.row_of[held] = mover;
      s.col_of[mover] = held;
      held = mover == start ? -1 : left;
    }
  }
  g.sync();
}

// Columns of all rows into s.col_of.
template <class Lanes>
FG_HD void assign(const Lanes& g, const double* cost, int n, int m, const AssignmentSpace& s) {
  for (int j = g.lane; j < m; j += g.lanes) {
    s.v[j] = 0.0;
    s.row_of[j] = -1;
  }
  for (int i = g.lane; i < n; i += g.lanes) s.col_of[i] = -1;
  g.sync();
  const int waiting = bid(g, cost, n, m, s);
  for (int k = 0; k < waiting; ++k) augment(g, cost, m, s.queue[k], s);
}

// One problem from scores to the column of every row, -1 for none. cost: rows * cols doubles.
template <class Lanes, class Score>
FG_HD void match_optimal(const Lanes& g, const Pairs<Score>& pairs, double* cost, void* memory,
                         int64_t* column) {
  const int rows = pairs.rows, cols = pairs.cols;
  for (int i = g.lane; i < rows; i += g.lanes) column[i] = -1;
  if (rows == 0 || cols == 0 || !fill_cost(g, pairs, cost)) return;
  const bool flip = rows > cols;
  const int n = flip ? cols : rows, m = flip ? rows : cols;
  const AssignmentSpace s(memory, n, m);
  assign(g, cost, n, m, s);
  for (int k = g.lane; k < n; k += g.lanes) {
    const int i = flip ? s.col_of[k] : k, j = flip ? k : s.col_of[k];
    if (pairs.allowed(int64_t(i) * cols + j)) column[i] = j;
  }
}

}  // namespace fastgrpo
