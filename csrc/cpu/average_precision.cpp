// SPDX-License-Identifier: Apache-2.0
#include "../shared/average_precision.h"

#include <vector>

#include "../params.h"
#include "parallel.h"
#include "simd.h"

namespace fastgrpo {

void average_precision(const ApParams& p, int threads) {
  const auto* boxes = reinterpret_cast<const Box<double>*>(p.boxes);
  const auto* gt_boxes = reinterpret_cast<const Box<double>*>(p.gt_boxes);
  parallel_for(p.samples, 8, p.samples < 32 ? 1 : threads, [&](int64_t begin, int64_t end) {
    std::vector<double> space;
    for (int64_t k = begin; k < end; ++k) {
      const int64_t a = p.start[k], b = p.gt_start[k];
      const ApSample sample{boxes + a,    p.labels + a,     p.scores + a,
                            gt_boxes + b, p.gt_labels + b,  int(p.start[k + 1] - a),
                            int(p.gt_start[k + 1] - b),     p.thresholds,
                            p.num_thresholds, p.max_dets,   p.ranged,
                            p.low,        p.high};
      const int64_t size = ApSpace::bytes(sample.n, sample.m, p.max_dets, p.num_thresholds) / 8;
      if (int64_t(space.size()) < size) space.resize(size);
      run_best([&](auto) __attribute__((always_inline)) {
        average_precision(Serial{}, sample, space.data(), p.ap + k * p.num_thresholds);
      });
    }
  });
}

}  // namespace fastgrpo
