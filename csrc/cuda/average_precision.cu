// SPDX-License-Identifier: Apache-2.0
// COCO average precision on the GPU: one warp per sample, one lane per IoU threshold.
#include "../shared/average_precision.h"

#include "../params.h"
#include "launch.h"

namespace fastgrpo {

__global__ void __launch_bounds__(32, 16)
    average_precision_kernel(ApParams p, char* space, const int64_t* space_start) {
  const int64_t k = blockIdx.x, a = p.start[k], b = p.gt_start[k];
  const ApSample sample{reinterpret_cast<const Box<double>*>(p.boxes) + a,
                        p.labels + a,
                        p.scores + a,
                        reinterpret_cast<const Box<double>*>(p.gt_boxes) + b,
                        p.gt_labels + b,
                        int(p.start[k + 1] - a),
                        int(p.gt_start[k + 1] - b),
                        p.thresholds,
                        p.num_thresholds,
                        p.max_dets,
                        p.ranged,
                        p.low,
                        p.high};
  average_precision(Warp(), sample, space + space_start[k], p.ap + k * p.num_thresholds);
}

}  // namespace fastgrpo

using namespace fastgrpo;

// Where each sample's working memory starts, (samples + 1) offsets in bytes; host memory only.
FG_API void fastgrpo_average_precision_space(const int64_t* start, const int64_t* gt_start,
                                             int64_t samples, int num_thresholds, int max_dets,
                                             int64_t* space_start) {
  space_start[0] = 0;
  for (int64_t k = 0; k < samples; ++k) {
    const int64_t n = start[k + 1] - start[k], m = gt_start[k + 1] - gt_start[k];
    space_start[k + 1] = space_start[k] + ApSpace::bytes(n, m, max_dets, num_thresholds);
  }
}

// All pointers to device memory.
FG_API int fastgrpo_average_precision(const double* boxes, const int64_t* labels,
                                      const double* scores, const double* gt_boxes,
                                      const int64_t* gt_labels, const int64_t* start,
                                      const int64_t* gt_start, int64_t samples,
                                      const double* thresholds, int num_thresholds, int max_dets,
                                      int ranged, double low, double high, void* space,
                                      const int64_t* space_start, double* ap, int device,
                                      void* stream) {
  if (samples == 0) return cudaSuccess;
  const OnDevice on(device);
  if (on.status != cudaSuccess) return on.status;
  const ApParams p{boxes,    labels,         scores,   gt_boxes,    gt_labels, start, gt_start,
                   samples,  thresholds,     num_thresholds, max_dets, ranged != 0, low, high, ap};
  average_precision_kernel<<<unsigned(samples), 32, 0, static_cast<cudaStream_t>(stream)>>>(
      p, static_cast<char*>(space), space_start);
  return cudaGetLastError();
}
