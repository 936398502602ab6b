// SPDX-License-Identifier: Apache-2.0
// COCO average precision of one sample: the protocol of fastgrpo/reference/average_precision.py.
#pragma once

#include "box.h"
#if !defined(__CUDACC__)
#include <algorithm>
#endif

namespace fastgrpo {

// One sample, and the settings of the call.
struct ApSample {
  const Box<double>* boxes;
  const int64_t* labels;
  const double* scores;
  const Box<double>* gt_boxes;
  const int64_t* gt_labels;
  int n, m;  // predictions, ground truth
  const double* thresholds;
  int num_thresholds, max_dets;
  bool ranged;  // boxes whose area is outside [low, high] are ignored
  double low, high;

  FG_HD bool ignored(const Box<double>& b) const {
    const double area = (b.x2 - b.x1) * (b.y2 - b.y1);
    return ranged && (area < low || area > high);
  }
  // NaN sorts last, equal scores keep the given order.
  FG_HD bool before(int a, int b) const {
    const double x = scores[a] != scores[a] ? -HUGE_VAL : scores[a];
    const double y = scores[b] != scores[b] ? -HUGE_VAL : scores[b];
    return x > y || (x == y && a < b);
  }
};

struct ApSpace {
  double* iou;       // (min(n, max_dets), m)
  int *pred, *rank;  // (n) predictions of the class, unsorted and by falling score
  int* gt;           // (m) ground truth of the class, ignored ones last
  uint8_t* taken;    // (num_thresholds, m)
  int8_t* outcome;   // (num_thresholds, min(n, max_dets)): 1 hit, 0 miss, -1 does not count

  static constexpr int64_t bytes(int64_t n, int64_t m, int64_t max_dets, int64_t num_thresholds) {
    const int64_t dets = n < max_dets ? n : max_dets;
    return (8 * dets * m + 8 * n + 4 * m + num_thresholds * (m + dets) + 7) / 8 * 8;
  }
  FG_HD ApSpace(void* memory, const ApSample& p) {
    const int64_t dets = p.n < p.max_dets ? p.n : p.max_dets;
    iou = static_cast<double*>(memory);
    pred = reinterpret_cast<int*>(iou + dets * p.m);
    rank = pred + p.n;
    gt = rank + p.n;
    taken = reinterpret_cast<uint8_t*>(gt + p.m);
    outcome = reinterpret_cast<int8_t*>(taken + int64_t(p.num_thresholds) * p.m);
  }
};

FG_HD double recall_at(int i) { return i == 100 ? 1.0 : 0.01 * i; }

// Indices of one label among `count`, in order, into `found`; every lane sees them after the sync.
template <class Lanes>
FG_HD int collect(const Lanes& g, const int64_t* labels, int count, int64_t label, int* found) {
  int size = 0;
  for (int i = 0; i < count; ++i) {
    if (labels[i] != label) continue;
    if (g.lane == 0) found[size] = i;
    ++size;
  }
  g.sync();
  return size;
}

// The found predictions by falling score: every lane counts the places of its own.
template <class Lanes>
FG_HD void sort_by_score(const Lanes& g, const ApSample& p, const int* found, int size, int* rank) {
  for (int i = g.lane; i < size; i += g.lanes) {
    int place = 0;
    for (int j = 0; j < size; ++j) place += p.before(found[j], found[i]);
    rank[place] = found[i];
  }
  g.sync();
}
#if !defined(__CUDACC__)
inline void sort_by_score(const Serial&, const ApSample& p, const int* found, int size, int* rank) {
  std::copy(found, found + size, rank);
  std::sort(rank, rank + size, [&p](int a, int b) { return p.before(a, b); });
}
#endif

// Each prediction takes the best free ground truth, one threshold; of equal ones the last.
FG_HD void take(const ApSample& p, const ApSpace& s, int dets, int gts, int counted, int t) {
  uint8_t* taken = s.taken + int64_t(t) * p.m;
  int8_t* outcome = s.outcome + int64_t(t) * dets;
  const double threshold = least(p.thresholds[t], 1 - 1e-10);
  for (int j = 0; j < gts; ++j) taken[j] = 0;
  for (int d = 0; d < dets; ++d) {
    double best = threshold;
    int match = -1;
    for (int j = 0; j < gts; ++j) {
      if (match >= 0 && match < counted && j >= counted) break;
      const double iou = s.iou[int64_t(d) * gts + j];
      if (!taken[j] && iou >= best) {
        best = iou;
        match = j;
      }
    }
    if (match >= 0) taken[match] = 1;
    if (match >= counted || (match < 0 && p.ignored(p.boxes[s.rank[d]]))) {
      outcome[d] = -1;
    } else {
      outcome[d] = match >= 0;
    }
  }
}

// Mean over 101 recalls of the best precision at that recall or more: from the last prediction
// back, so that the best precision so far is a running maximum.
FG_HD double interpolate(const int8_t* outcome, int dets, int counted) {
  int hits = 0, seen = 0, r = 100;
  for (int d = 0; d < dets; ++d) {
    hits += outcome[d] == 1;
    seen += outcome[d] >= 0;
  }
  while (r >= 0 && recall_at(r) > double(hits) / counted) --r;
  double best = 0.0, sum = 0.0;
  for (int d = dets - 1; d >= 0 && r >= 0; --d) {
    if (outcome[d] < 0) continue;
    best = most(best, hits / (seen + DBL_EPSILON));
    hits -= outcome[d];
    --seen;
    const double before = seen ? double(hits) / counted : -1.0;
    for (; r >= 0 && recall_at(r) > before; --r) sum += best;
  }
  return sum / 101;
}

// AP per threshold of one sample into ap (num_thresholds).
template <class Lanes>
FG_HD void average_precision(const Lanes& g, const ApSample& p, void* memory, double* ap) {
  const double nothing = p.ranged ? -1.0 : p.n == 0 ? 1.0 : 0.0;
  const ApSpace s(memory, p);
  int classes = 0;
  for (int t = g.lane; t < p.num_thresholds; t += g.lanes) ap[t] = 0.0;
  for (int first = 0; first < p.m; ++first) {
    const int64_t label = p.gt_labels[first];
    bool seen = false;
    for (int i = 0; i < first && !seen; ++i) seen = p.gt_labels[i] == label;
    if (seen) continue;
    // Ignored ground truth goes last; without an area range there is none.
    const int gts = collect(g, p.gt_labels, p.m, label, s.gt);
    int counted = gts;
    if (p.ranged) {
      counted = 0;
      for (int pass = 0, to = 0; pass < 2; ++pass) {
        for (int i = first; i < p.m; ++i) {
          if (p.gt_labels[i] != label || p.ignored(p.gt_boxes[i]) != (pass == 1)) continue;
          if (g.lane == 0) s.gt[to] = i;
          ++to;
          counted += pass == 0;
        }
      }
      g.sync();
    }
    if (counted == 0) continue;
    ++classes;
    const int found = collect(g, p.labels, p.n, label, s.pred);
    sort_by_score(g, p, s.pred, found, s.rank);
    const int dets = found < p.max_dets ? found : p.max_dets;
    for (int k = g.lane; k < dets * gts; k += g.lanes) {
      const Box<double> a = p.boxes[s.rank[k / gts]], b = p.gt_boxes[s.gt[k % gts]];
      s.iou[k] = overlap<kIou, kContinuous>(a, b);
    }
    g.sync();
    for (int t = g.lane; t < p.num_thresholds; t += g.lanes) {
      take(p, s, dets, gts, counted, t);
      ap[t] += interpolate(s.outcome + int64_t(t) * dets, dets, counted);
    }
    g.sync();
  }
  for (int t = g.lane; t < p.num_thresholds; t += g.lanes) {
    ap[t] = classes ? ap[t] / classes : nothing;
  }
}

}  // namespace fastgrpo
