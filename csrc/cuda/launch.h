// SPDX-License-Identifier: Apache-2.0
// What the launchers share: they are plain C, take raw pointers and a stream, and return a
// cudaError_t, so that the library needs no PyTorch to build and works with any.
#pragma once

#include <cuda_runtime.h>

#define FG_API extern "C" __attribute__((visibility("default")))

namespace fastgrpo {

// Makes `device` current for as long as it lives.
struct OnDevice {
  int before = 0;
  cudaError_t status;
  explicit OnDevice(int device) {
    status = cudaGetDevice(&before);
    if (status == cudaSuccess) status = cudaSetDevice(device);
  }
  ~OnDevice() {
    if (status == cudaSuccess) cudaSetDevice(before);
  }
};

}  // namespace fastgrpo
