// SPDX-License-Identifier: Apache-2.0
// Matchings on the GPU: one warp per problem, its state in shared memory.
#include "../params.h"
#include "../shared/assignment.h"
#include "../shared/greedy.h"
#include "launch.h"

namespace fastgrpo {

template <class Score>
__global__ void __launch_bounds__(32, 16) match_kernel(MatchParams<Score> p, double* cost) {
  extern __shared__ double space[];
  const int64_t k = blockIdx.x;
  const int64_t at = p.offsets[k];
  const Pairs<Score> pairs{p.scores + at, p.mask ? p.mask + at : nullptr, p.threshold,
                           int(p.a_start[k + 1] - p.a_start[k]),
                           int(p.b_start[k + 1] - p.b_start[k])};
  int64_t* column = p.column + p.a_start[k];
  const Warp warp;
  if (p.method == kOptimal) {
    match_optimal(warp, pairs, cost + at, space, column);
  } else if (p.method == kGreedy) {
    match_greedy(warp, pairs, space, column);
  } else {
    match_greedy_rows(warp, pairs, space, column);
  }
}

template <class Score>
static cudaError_t launch(const MatchParams<Score>& p, int64_t max_rows, int64_t max_cols,
                          double* cost, cudaStream_t stream) {
  const int64_t n = max_rows < max_cols ? max_rows : max_cols;
  const int64_t m = max_rows < max_cols ? max_cols : max_rows;
  const int64_t bytes = p.method == kOptimal ? AssignmentSpace::bytes(n, m)
                                             : GreedySpace::bytes(max_rows, max_cols);
  if (bytes > 48 * 1024) return cudaErrorInvalidValue;
  match_kernel<Score><<<unsigned(p.samples), 32, size_t(bytes), stream>>>(p, cost);
  return cudaGetLastError();
}

}  // namespace fastgrpo

using namespace fastgrpo;

// All pointers to device memory; cost: one double per pair for the optimal method, else unused.
// max_rows, max_cols: the largest sizes of one problem, at most 256 for the optimal method and 2048
// for the greedy ones.
FG_API int fastgrpo_match_boxes(const void* scores, int is_double, const uint8_t* mask,
                                const int64_t* a_start, const int64_t* b_start,
                                const int64_t* offsets, int64_t samples, int method,
                                double threshold, int64_t max_rows, int64_t max_cols, double* cost,
                                int64_t* column, int device, void* stream) {
  if (samples == 0) return cudaSuccess;
  const OnDevice on(device);
  if (on.status != cudaSuccess) return on.status;
  const auto run = [&](auto zero) {
    using Score = decltype(zero);
    const MatchParams<Score> p{static_cast<const Score*>(scores), mask, a_start, b_start, offsets,
                               samples, method, threshold, column};
    return launch(p, max_rows, max_cols, cost, static_cast<cudaStream_t>(stream));
  };
  return is_double ? run(0.0) : run(0.0f);
}
