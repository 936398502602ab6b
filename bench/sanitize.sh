#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Run every kernel under compute-sanitizer: out-of-bounds and misaligned accesses (memcheck), races
# in shared memory (racecheck). Needs a GPU and the CUDA toolkit. Usage: bench/sanitize.sh [case...]
# racecheck is known to report false hazards for bulk asynchronous copies; read its reports.
set -eu
command -v compute-sanitizer >/dev/null || { echo "compute-sanitizer is not on PATH" >&2; exit 1; }
here=$(dirname "$0")
# PyTorch's caching allocator would hide out-of-bounds accesses inside its pools.
export PYTORCH_NO_CUDA_MEMORY_CACHING=1
for tool in memcheck racecheck; do
    echo "== $tool"
    compute-sanitizer --tool "$tool" --error-exitcode 1 --target-processes all \
        "${PYTHON:-python3}" "$here/sanitize.py" "$@"
done
