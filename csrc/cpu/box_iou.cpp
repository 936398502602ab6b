// SPDX-License-Identifier: Apache-2.0
#include "../shared/box.h"

#include <vector>

#include "../params.h"
#include "parallel.h"
#include "simd.h"

namespace fastgrpo {

// One sample. The columns' coordinates are laid out one after another, so that the inner loop
// loads and stores whole vectors.
template <int kind, int convention, class T>
FG_INLINE void sample_pairs(const PairwiseParams<T>& p, int64_t k, std::vector<T>& columns) {
  const int64_t n = p.a_start[k + 1] - p.a_start[k], m = p.b_start[k + 1] - p.b_start[k];
  const Box<T>* a = reinterpret_cast<const Box<T>*>(p.a) + p.a_start[k];
  const Box<T>* b = reinterpret_cast<const Box<T>*>(p.b) + p.b_start[k];
  if (int64_t(columns.size()) < 5 * m) columns.resize(5 * m);
  T* x1 = columns.data();
  T *y1 = x1 + m, *x2 = y1 + m, *y2 = x2 + m, *angle = y2 + m;
  for (int64_t j = 0; j < m; ++j) {
    x1[j] = b[j].x1;
    y1[j] = b[j].y1;
    x2[j] = b[j].x2;
    y2[j] = b[j].y2;
    angle[j] = kind == kCiou ? aspect<convention>(b[j]) : T(0);
  }
  for (int64_t i = 0; i < n; ++i) {
    const Box<T> row = a[i];
    const T row_angle = kind == kCiou ? aspect<convention>(row) : T(0);
    T* values = p.values + p.offsets[k] + i * m;
#pragma omp simd
    for (int64_t j = 0; j < m; ++j) {
      values[j] = overlap<kind, convention>(row, Box<T>{x1[j], y1[j], x2[j], y2[j]}, row_angle,
                                            angle[j]);
    }
  }
}

template <int kind, int convention, class T>
static void all_samples(const PairwiseParams<T>& p, int threads) {
  const int64_t pairs = p.samples ? p.offsets[p.samples] : 0;
  parallel_for(p.samples, 8, pairs < 65536 ? 1 : threads, [&](int64_t begin, int64_t end) {
    std::vector<T> columns;
    run_best([&](auto) __attribute__((always_inline)) {
      for (int64_t k = begin; k < end; ++k) sample_pairs<kind, convention>(p, k, columns);
    });
  });
}

template <int kind, class T>
static void of_kind(const PairwiseParams<T>& p, int threads) {
  if (p.convention == kContinuous) return all_samples<kind, kContinuous>(p, threads);
  if (p.convention == kPixel) return all_samples<kind, kPixel>(p, threads);
  all_samples<kind, kVlmR1>(p, threads);
}

template <class T>
void pairwise_box_iou(const PairwiseParams<T>& p, int threads) {
  if (p.kind == kIou) return of_kind<kIou>(p, threads);
  if (p.kind == kGiou) return of_kind<kGiou>(p, threads);
  if (p.kind == kDiou) return of_kind<kDiou>(p, threads);
  of_kind<kCiou>(p, threads);
}

template void pairwise_box_iou(const PairwiseParams<float>&, int);
template void pairwise_box_iou(const PairwiseParams<double>&, int);

}  // namespace fastgrpo
