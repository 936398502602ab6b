// SPDX-License-Identifier: Apache-2.0
#include "launch.h"

FG_API const char* fastgrpo_error(int status) {
  return cudaGetErrorString(static_cast<cudaError_t>(status));
}
