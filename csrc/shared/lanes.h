// SPDX-License-Identifier: Apache-2.0
// The algorithms in this folder run on the host and on a GPU. They are written for a group of lanes
// that sweeps arrays together: on a GPU the 32 threads of a warp, on the host a single lane, where
// every sweep is an ordinary loop that the compiler vectorises.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define FG_HD __device__ __forceinline__
#define FG_SIMD_MIN(variable)
#else
#define FG_HD inline __attribute__((always_inline))
#define FG_PRAGMA(text) _Pragma(#text)
#define FG_SIMD_MIN(variable) FG_PRAGMA(omp simd reduction(min : variable))
#endif

namespace fastgrpo {

#if !defined(__CUDACC__)
struct Serial {
  static constexpr int lane = 0;
  static constexpr int lanes = 1;
  FG_HD void sync() const {}
  FG_HD double min(double x) const { return x; }
  FG_HD int min(int x) const { return x; }
};
#else
struct Warp {
  int lane = threadIdx.x % 32;
  static constexpr int lanes = 32;
  FG_HD void sync() const { __syncwarp(); }
  FG_HD double min(double x) const {
    for (int step = 16; step > 0; step /= 2) x = fmin(x, __shfl_xor_sync(0xffffffffu, x, step));
    return x;
  }
  FG_HD int min(int x) const { return __reduce_min_sync(0xffffffffu, x); }
};
#endif

}  // namespace fastgrpo
